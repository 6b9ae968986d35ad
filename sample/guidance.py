"""What is put around a network while sampling: text guidance, control scale, churn, the pull towards a known image."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import Field

from degrade.strict import Strict

Denoise = Callable[[torch.Tensor, float], torch.Tensor]     # (x, sigma) -> D: (B, C, H, W) float32, all of one sigma
# (x, sigma, control scale) -> D for the negative and for the positive prompt, in whatever batches fit
Both = Callable[[torch.Tensor, float, float], tuple[torch.Tensor, torch.Tensor]]
Alone = Callable[[torch.Tensor, float, float], torch.Tensor]        # the same, of the positive prompt only

# The schedules below divide by this. The released code writes the table's last sigma, 14.61464, rounded.
SIGMA_MAX = 14.6146


class Linear(Strict):
    """A scale that goes in a straight line with sigma."""

    low: float = Field(description="at sigma 0, where details are made")
    high: float = Field(description="at the highest sigma, where the composition is made")

    def at(self, sigma: float) -> float:
        return self.low + (self.high - self.low) * sigma / SIGMA_MAX


class Guidance(Linear):
    """Weight of the positive over the negative prompt; at 1 the negative one has no effect."""


class Control(Linear):
    """How much of the control branch reaches the UNet; 0 is plain SDXL."""


class Churn(Strict):
    """Noise that is added before a step, so that the step corrects earlier errors (EDM, algorithm 2)."""

    amount: float = Field(0.0, ge=0, description="over all steps; 0 makes sampling deterministic")
    noise: float = Field(1.0, gt=0, description="standard deviation of the added noise; above 1 adds detail")
    t_min: float = Field(0.0, ge=0, description="no churn below this sigma")
    t_max: float | None = Field(None, gt=0, description="nor above this one; null: no bound")

    def gamma(self, sigma: float, steps: int) -> float:
        """By which share sigma is raised before a step."""
        return min(self.amount / steps, math.sqrt(2) - 1) if self._within(sigma) else 0.0

    def before(self, raised: float, steps: int) -> float:
        """The sigma of the schedule from which `gamma` led to this one."""
        sigma = raised / (1 + min(self.amount / steps, math.sqrt(2) - 1))
        return sigma if self._within(sigma) else raised

    def _within(self, sigma: float) -> bool:
        return self.t_min <= sigma and (self.t_max is None or sigma <= self.t_max)


@dataclass(frozen=True)
class Restore:
    """A pull of what is denoised towards a known latent: `D += (sigma / SIGMA_MAX)**tau (centre - D)`.

    The sigma is that before churn. The paper (section 3.3, algorithm 1) pulls towards the low-quality latent at every
    step: `gate=0`. The released code pulls towards the plain encoder's latent of the first stage's image, and not in
    steps that end below a sigma of 0.05.
    """

    centre: torch.Tensor        # (B or 1, C, H, W), scaled as the sampled latent
    tau: float                  # the larger, the weaker; the paper's is 4
    gate: float = 0.05

    def __call__(self, denoised: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
        if self.gate and sigma_next <= self.gate:
            return denoised
        return denoised + (self.centre - denoised) * (sigma / SIGMA_MAX) ** self.tau


def guided(both: Both, guidance: Guidance, control: Control, before: Callable[[float], float] = float,
           alone: Alone | None = None) -> Denoise:
    """Classifier-free guidance (Ho and Salimans 2022): `negative + weight (positive - negative)`.

    The weight goes by the sigma that the network sees, the control scale by that of the schedule before churn, as in
    the released code: `before` leads from the one to the other (`Churn.before`). Where the weight is exactly 1 and
    `alone` is given, only the positive prompt is evaluated.
    """
    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        weight, scale = guidance.at(sigma), control.at(before(sigma))
        if weight == 1 and alone is not None:
            return alone(x, sigma, scale).float()
        negative, positive = both(x, sigma, scale)
        return torch.lerp(negative.float(), positive.float(), weight)

    return denoise
