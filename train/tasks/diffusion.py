"""What training of SDXL and of what stands beside it has in common: latents, noise levels, the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from degrade.strict import Strict
from sample import sigmas

from ..named import Named
from ..objective import per_sample, signed

if TYPE_CHECKING:
    from ..batches import Batch

GOLDEN, JITTER = 0.6180339887498949, 1 / 64


class Noising(Strict):
    """How noise levels are drawn and losses weighted. The published weights fit a uniform draw and plain weights."""

    draw: Literal["uniform", "stratified"] = Field("uniform", description="stratified: each sample of a global batch "
                                                   "in a part of the levels of its own, which steadies the loss")
    min_snr: float | None = Field(None, gt=0, description="weight min(SNR, this) / SNR (Hang et al. 2023, equation 6); "
                                                          "5 is theirs, null is the plain objective")


def level_indices(noising: Noising, batch: Batch, draws: Named, level: int | None) -> Tensor:
    """(B,) int64 noise levels 0 … 999, on the CPU."""
    if level is not None:
        return torch.full((len(batch.keys),), level, dtype=torch.int64)
    unit = draws.unit("level")
    if noising.draw == "stratified":
        # Multiples of the golden ratio fill [0, 1) evenly, over every run of positions and so over every global batch.
        places = [position * GOLDEN % 1.0 for position in batch.positions]
        unit = (torch.tensor(places, dtype=torch.float64) + unit * JITTER) % 1.0
    return (unit * sigmas.LEVELS).long()


def encoded(vae: Any, pixels: Tensor, draws: Named) -> Tensor:
    """(B, C, H/8, W/8) scaled float32 latents, drawn from the posterior of uint8 pixels by the samples' own noise."""
    posterior = vae.encode(signed(pixels).to(vae.dtype)).latent_dist
    mean = posterior.mean.float()
    noise = draws.normal("posterior", mean.shape[1:]).to(mean.device)
    return (mean + posterior.std.float() * noise) * vae.config.scaling_factor


def noised(x0: Tensor, noising: Noising, batch: Batch, draws: Named, level: int | None) -> dict[str, Tensor]:
    """The noisy latent, its level, and the noise that a network should find in it."""
    index = level_indices(noising, batch, draws, level).to(x0.device)
    noise = draws.normal("noise", x0.shape[1:]).to(x0.device)
    return {"noisy": sigmas.add_noise(x0, noise, index), "level": index, "noise": noise}


def epsilon_loss(predicted: Tensor, inputs: dict[str, Tensor], noising: Noising) -> dict[str, Tensor]:
    """Squared error of the noise, per sample (Ho et al. 2020, equation 14), perhaps weighted."""
    error = per_sample((predicted.float() - inputs["noise"]) ** 2)
    if noising.min_snr is None:
        return {"loss": error}
    signal, noisy = sigmas.shares(inputs["level"], error)
    snr = (signal / noisy) ** 2
    return {"loss": error * (snr.clamp(max=noising.min_snr) / snr), "error": error}
