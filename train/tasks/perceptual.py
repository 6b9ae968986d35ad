"""LPIPS as a loss, by pyiqa (extra `iqa`, non-commercial licence) and the weights that it fetches."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from degrade.strict import ConfigError

Perceptual = Callable[[Tensor, Tensor], Tensor]     # (B, 3, H, W) in [-1, 1], twice -> (B,)


def perceptual(device: torch.device) -> Perceptual:
    """LPIPS with VGG features (Zhang et al. 2018), as a loss per image.

    Raises:
        ConfigError: pyiqa is not installed, or its weights are not here and cannot be fetched.
    """
    if importlib.util.find_spec("pyiqa") is None:
        raise ConfigError("task.perceptual needs pyiqa, of a non-commercial licence: pip install 'clearshard[iqa]'; or "
                          "set task.perceptual to 0")
    import pyiqa
    try:
        metric = pyiqa.create_metric("lpips-vgg", as_loss=True, loss_reduction="none", device=device)
    except Exception as error:      # of the network, of the hub, of the disk: pyiqa lets all through
        raise ConfigError(f"task.perceptual: the weights of LPIPS could not be loaded ({error}); fetch them once where "
                          "there is a network, or set task.perceptual to 0") from None

    def distance(image: Tensor, truth: Tensor) -> Tensor:
        return metric((image.clamp(-1, 1) + 1) / 2, (truth + 1) / 2).flatten()
    return distance
