"""The mini: an untrained SDXL of two and a half million parameters, small enough to train on one machine.

Its SUPIR, prior and control and both encoders, stays under 19 MB in half precision. Two widths follow from that: a
connector has 64 channels of attention in a head, so the UNet's lower levels are multiples of 64, and its hidden layer
has 128 (`connectors.ZeroSFT`), so wider levels would be spent on connectors. The latent has eight channels and not
four, because a small autoencoder needs the room.
"""

from __future__ import annotations

import os

from diffusers import AutoencoderKL, UNet2DConditionModel

from . import tiny_sdxl
from .tiny_llava import one_thread

LATENT_CHANNELS = 8
UNET_CHANNELS, HEADS, GROUPS = (64, 64, 64), (2, 2, 2), 16      # heads of 32 channels
VAE_CHANNELS = (16, 32, 64, 96)


def unet() -> UNet2DConditionModel:
    """The prior: (B, 8, h, w) noisy latents to their noise; sides of multiples of 4."""
    return tiny_sdxl.unet(UNET_CHANNELS, HEADS, LATENT_CHANNELS, GROUPS)


def autoencoder() -> AutoencoderKL:
    """(B, 3, 8h, 8w) pixels to (B, 8, h, w) latents. Its training measures the scaling_factor, 1 until then."""
    return tiny_sdxl.autoencoder(VAE_CHANNELS, LATENT_CHANNELS, scaling_factor=1.0)


def build(folder: str | os.PathLike, seed: int = 0) -> None:
    """Saves it in diffusers' layout: autoencoder and UNet as PyTorch initialises them, text encoders as the tiny's."""
    with one_thread():
        tiny_sdxl.assemble(seed, unet, autoencoder, finish=None).save_pretrained(folder)
