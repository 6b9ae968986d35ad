"""Samplers: functions of a denoiser, a start and sigmas.

Everything here is float32 whatever the network computes in: a start in bfloat16 would round the first sigma from
14.6146 to 14.625 and all that follows with it. Images of a batch do not influence each other.

A sampler calls `on_step` after every step. To cancel, that function raises; `Cancelled` is there for it, and whatever
it raises passes through untouched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch

from .guidance import Churn, Denoise, Restore
from .noise import Noise


class Cancelled(Exception):
    """Somebody no longer wants the result."""


class Progress(NamedTuple):
    """Where a sampler is, after a step."""

    step: int                   # how many are done, from 1
    total: int
    sigma: float                # of x before the step
    x: torch.Tensor             # (B, C, H, W) float32, after it
    denoised: torch.Tensor      # the same shape: the network's present opinion of the result, good for previews


OnStep = Callable[[Progress], object]


def start(noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Unit noise (B, C, H, W) to that of the first sigma: `noise sqrt(1 + sigma**2)`.

    The square root is the deviation of noise and a latent of unit variance together. As the released code does it.
    """
    return noise.float() * torch.sqrt(1 + sigmas[0].float() ** 2).item()


@torch.no_grad()
def edm(denoise: Denoise, x: torch.Tensor, sigmas: torch.Tensor, *, churn: Churn | None = None,
        restore: Restore | None = None, noise: Noise | None = None, on_step: OnStep | None = None) -> torch.Tensor:
    """Euler steps with churn and a pull towards a known latent (SUPIR, algorithm 1; EDM, algorithm 2, first order).

    The printed algorithm and the released sampler differ only in `restore`: see `Restore`.

    Args:
        denoise: see `guidance.Denoise`; called once per step.
        x: (B, C, H, W) noise of the first sigma, from `start`.
        sigmas: (N + 1,) descending, 0 at the end, from `sigmas`.
        churn: without it the sampler is deterministic.
        noise: needed with churn.

    Returns:
        (B, C, H, W) float32.
    """
    x, levels, churn = x.float(), sigmas.tolist(), churn or Churn()
    steps = len(levels) - 1
    for step, (sigma, sigma_next) in enumerate(pairwise(levels)):
        gamma = churn.gamma(sigma, steps)
        raised = sigma * (1 + gamma)
        if gamma:
            x = x + _asked(noise)(step, x) * (churn.noise * math.sqrt(raised ** 2 - sigma ** 2))
        denoised = denoise(x, raised).float()
        if restore:
            denoised = restore(denoised, sigma, sigma_next)
        x = torch.lerp(denoised, x, sigma_next / raised)
        _tell(on_step, step, steps, sigma, x, denoised)
    return x


def euler(denoise: Denoise, x: torch.Tensor, sigmas: torch.Tensor, *, restore: Restore | None = None,
          on_step: OnStep | None = None) -> torch.Tensor:
    """Plain Euler steps, which few-step models are distilled for; as `edm` without churn."""
    return edm(denoise, x, sigmas, restore=restore, on_step=on_step)


@torch.no_grad()
def dpmpp_2m_sde(denoise: Denoise, x: torch.Tensor, sigmas: torch.Tensor, *, eta: float = 1.0, s_noise: float = 1.0,
                 restore: Restore | None = None, noise: Noise | None = None, released: bool = False,
                 on_step: OnStep | None = None) -> torch.Tensor:
    """DPM-Solver++(2M) as an SDE (Lu et al. 2022, section 5; midpoint form), for `karras` sigmas.

    Args:
        eta: share of the noise that is renewed; 0 is the deterministic DPM-Solver++(2M).
        s_noise: standard deviation of the renewed noise.
        noise: needed with eta > 0.
        released: adds no noise in the first step, as SUPIR's released sampler, although the step shrinks the noise
            that is there as if some were added.

    Other arguments and the result are those of `edm`.
    """
    x, levels = x.float(), sigmas.tolist()
    steps, last, h_last = len(levels) - 1, None, 0.0
    for step, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma).float()
        if restore:
            denoised = restore(denoised, sigma, sigma_next)
        if sigma_next == 0:
            x = denoised                            # the limit; as numbers, 0 times infinity
        else:
            h = math.log(sigma / sigma_next)
            # A straight line through the last two opinions, at the middle of the step
            middle = denoised if last is None else denoised + (denoised - last) * (h / (2 * h_last))
            x = (sigma_next / sigma * math.exp(-eta * h)) * x - math.expm1(-(1 + eta) * h) * middle
            if eta and not (released and step == 0):
                x = x + _asked(noise)(step, x) * (s_noise * sigma_next * math.sqrt(-math.expm1(-2 * eta * h)))
            last, h_last = denoised, h
        _tell(on_step, step, steps, sigma, x, denoised)
    return x


def _asked(noise: Noise | None) -> Noise:
    if noise is None:
        raise ValueError("this sampler adds noise: give noise=KeyedNoise(seed, keys), or turn churn or eta to 0")
    return noise


def _tell(on_step: OnStep | None, step: int, steps: int, sigma: float, x: torch.Tensor,
          denoised: torch.Tensor) -> None:
    if on_step:
        on_step(Progress(step + 1, steps, sigma, x, denoised))
