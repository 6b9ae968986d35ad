"""AdamW over what is trained, and its rate as a function of the images seen."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from degrade.strict import ConfigError

from .config import Optimizer
from .parallel import like, local


def rate(config: Optimizer, images: int, seen: int) -> float:
    """The learning rate after `seen` of `images` images."""
    if seen < config.warmup:
        return config.rate * seen / config.warmup
    if config.schedule == "constant":
        return config.rate
    done = min(1.0, (seen - config.warmup) / max(1, images - config.warmup))
    return config.rate * (config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * done)))


def make(config: Optimizer, trained: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """The optimizer; biases, norms and gates are not decayed.

    Raises:
        ConfigError: adamw8bit without bitsandbytes.
    """
    matrices = [parameter for parameter in trained.values() if parameter.ndim > 1]
    others = [parameter for parameter in trained.values() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    options = {"lr": config.rate, "betas": config.betas, "eps": config.eps}
    if config.kind == "adamw8bit":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError("optimizer.kind: adamw8bit needs bitsandbytes: pip install bitsandbytes; or choose adamw")
        import bitsandbytes
        return bitsandbytes.optim.AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


def states(optimizer: torch.optim.Optimizer, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's states, as `NAME OF PARAMETER/NAME OF STATE`; counts of whole numbers as int64."""
    return {f"{name}/{key}": torch.as_tensor(value) for name, parameter in trained.items()
            for key, value in optimizer.state.get(parameter, {}).items() if isinstance(value, Tensor | int)}


def restore(optimizer: torch.optim.Optimizer, trained: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Puts back what `states` gave, this rank's parts."""
    for name, parameter in trained.items():
        state = {key.rpartition("/")[2]: value for key, value in stored.items() if key.rpartition("/")[0] == name}
        optimizer.state[parameter] = {key: _placed(value, parameter) for key, value in state.items()}


def _placed(value: Tensor, parameter: Tensor) -> Tensor | int:
    if value.ndim == 0 and value.dtype == torch.int64:
        return value.item()
    placed = value.to(parameter.device)
    return like(parameter, placed) if value.shape == local(parameter).shape else placed
