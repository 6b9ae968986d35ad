"""A SUPIR of random weights over the tiny SDXL: every part in its place, so that the image given matters."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from .robust import RobustEncoder
from .supir import SupirAdaptor
from .supir_folder import write
from .tiny_llava import one_thread

STRENGTH = 0.3      # of what is zero in a fresh adaptor, as a share of a random layer's usual spread
LICENCE = "none: random numbers"


@torch.no_grad()
def stir(module: nn.Module, strength: float = STRENGTH) -> None:
    """Gives every layer that is zero small random weights, and moves the others a little."""
    for parameter in module.parameters():
        usual = max(1, parameter[0].numel()) ** -0.5
        parameter += torch.randn_like(parameter) * (strength if not parameter.any() else 0.1 * strength) * usual


def assemble(prior: Path, seed: int = 0) -> tuple[SupirAdaptor, RobustEncoder]:
    """Adaptor and robust encoder of a prior; the caller's random generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adaptor = SupirAdaptor.from_unet(UNet2DConditionModel.from_pretrained(prior / "unet"))
        robust = RobustEncoder.from_vae(AutoencoderKL.from_pretrained(prior / "vae"))
        stir(adaptor)
        stir(robust)
    return adaptor.eval(), robust.eval()


def build(folder: str | os.PathLike, prior: Path, seed: int = 0) -> None:
    """Saves them beside the prior, which is referred to by a relative path."""
    with one_thread():
        write(Path(folder), *assemble(prior, seed), prior, licence=LICENCE)
