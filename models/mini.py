"""The mini: an untrained SDXL of two and a half million parameters, small enough to train on one machine.

Its SUPIR, prior and control and both encoders, stays under 19 MB in half precision. Two widths follow from that: a
connector has 64 channels of attention in a head, so the UNet's lower levels are multiples of 64, and its hidden layer
has 128 (`connectors.ZeroSFT`), so wider levels would be spent on connectors. A pixel of the latent stands for 4 x 4 of
the picture and not for 8 x 8, because a small autoencoder that is trained for an hour needs the room.
"""

from __future__ import annotations

import os

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from . import tiny_sdxl
from .tiny_llava import one_thread

LATENT_CHANNELS = 4
UNET_CHANNELS, HEADS, GROUPS = (64, 64, 64), (2, 2, 2), 16      # heads of 32 channels
VAE_CHANNELS = (16, 48, 96)
LOG_VARIANCE = -6.0         # of the untrained autoencoder's posterior


def unet() -> UNet2DConditionModel:
    """The prior: (B, 4, h, w) noisy latents to their noise; sides of multiples of 4."""
    return tiny_sdxl.unet(UNET_CHANNELS, HEADS, LATENT_CHANNELS, GROUPS)


def autoencoder() -> AutoencoderKL:
    """(B, 3, 4h, 4w) pixels to (B, 4, h, w) latents. Its training measures the scaling_factor, 1 until then."""
    vae = tiny_sdxl.autoencoder(VAE_CHANNELS, LATENT_CHANNELS, scaling_factor=1.0)
    with torch.no_grad():       # as drawn, the noise of the posterior is stronger than the picture
        vae.quant_conv.weight[LATENT_CHANNELS:] = 0
        vae.quant_conv.bias[LATENT_CHANNELS:] = LOG_VARIANCE
    return vae


def build(folder: str | os.PathLike, seed: int = 0) -> None:
    """Saves it in diffusers' layout: autoencoder and UNet as PyTorch initialises them, text encoders as the tiny's."""
    with one_thread():
        tiny_sdxl.assemble(seed, unet, autoencoder, finish=None).save_pretrained(folder)
