"""SDXL's noise: the one place for its schedule, its sigmas and its scalings, for sampling and for training alike.

Two coordinates of one process are in use. *Variance preserving* (DDPM, training):
`x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise`. *Variance exploding* (Karras et al. 2022, "EDM", the samplers):
`x = x0 + sigma noise`, with `sigma = sqrt((1 - alpha_bar) / alpha_bar)`. The second is the first divided by
`sqrt(alpha_bar)`, hence the network, which was trained on the first, gets `x / sqrt(sigma**2 + 1)`.

Noise levels have an index 0 … 999, from nearly clean to nearly noise. Everything is computed in float64.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch

LEVELS = 1000
BETA_FIRST, BETA_LAST = 0.00085, 0.012      # linear in sqrt(beta): SDXL's scheduler configuration
Prediction = Literal["epsilon", "v_prediction", "sample"]       # what a network returns; the names of diffusers
Network = Callable[[torch.Tensor, int], torch.Tensor]           # (input, index of the noise level) -> prediction


def betas() -> torch.Tensor:
    """(1000,) float64: the variance that each forward step adds (Ho et al. 2020; "scaled linear")."""
    return torch.linspace(BETA_FIRST ** 0.5, BETA_LAST ** 0.5, LEVELS, dtype=torch.float64) ** 2


def alpha_bars() -> torch.Tensor:
    """(1000,) float64, descending: the share of the signal's variance at each noise level."""
    return torch.cumprod(1 - betas(), 0)


@functools.cache
def levels() -> tuple[float, ...]:
    """The 1000 sigmas, ascending from 0.0292 to 14.6146."""
    alpha_bar = alpha_bars()
    return tuple(((1 - alpha_bar) / alpha_bar).sqrt().tolist())


def table() -> torch.Tensor:
    """(1000,) float32, ascending: the same."""
    return torch.tensor(levels(), dtype=torch.float32)


def index_of(sigma: float) -> int:
    """The index of the noise level nearest to sigma."""
    known = levels()
    above = min(bisect.bisect_left(known, sigma), LEVELS - 1)
    return above - 1 if above and sigma - known[above - 1] <= known[above] - sigma else above


# Spacings: N steps as (N + 1,) float32 sigmas, descending, and 0 at the end.


def released(steps: int) -> torch.Tensor:
    """From the noisiest level downwards, evenly by index: what SUPIR's released sampler visits."""
    _positive(steps)
    # By numpy, whose rounding decides a few indices: 99 steps visit 110, which exact arithmetic would make 111.
    return _at(np.linspace(LEVELS - 1, 0, steps, endpoint=False).astype(int).tolist())


def karras(steps: int, rho: float = 7.0) -> torch.Tensor:
    """Evenly in sigma**(1/rho) between the ends of `released` (EDM, equation 5)."""
    ends = released(steps)
    first, last = ends[0].double() ** (1 / rho), ends[-2].double() ** (1 / rho)
    return _ended((first + torch.linspace(0, 1, steps, dtype=torch.float64) * (last - first)) ** rho)


def trailing(steps: int) -> torch.Tensor:
    """The last index of each of N equal parts: few-step models as SDXL-Lightning (Lin et al. 2024, Table 2)."""
    _positive(steps)
    return _at([round(LEVELS - step * LEVELS / steps) - 1 for step in range(steps)])


def leading(steps: int) -> torch.Tensor:
    """The second index of each of N equal parts: SDXL as Stability AI configured it (Lin et al. 2024, Table 2)."""
    _positive(steps)
    second = steps < LEVELS             # a thousand parts have no second index
    return _at([step * (LEVELS // steps) + second for step in reversed(range(steps))])


def _positive(steps: int) -> None:
    if not 1 <= steps <= LEVELS:
        raise ValueError(f"a schedule has 1 to {LEVELS} steps, not {steps}")


def _at(indices: list[int]) -> torch.Tensor:
    return _ended(torch.tensor([levels()[index] for index in indices], dtype=torch.float64))


def _ended(sigmas: torch.Tensor) -> torch.Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


# Networks as denoisers.


def scalings(sigma: float, prediction: Prediction = "epsilon") -> tuple[float, float, float]:
    """`(c_skip, c_out, c_in)` with `D(x) = c_skip x + c_out F(c_in x)` (EDM, Table 1; v: Salimans and Ho 2022)."""
    c_in = 1 / math.sqrt(sigma ** 2 + 1)
    return {"epsilon": (1.0, -sigma, c_in),
            "v_prediction": (c_in ** 2, -sigma * c_in, c_in),
            "sample": (0.0, 1.0, c_in)}[_known(prediction)]


def denoiser(network: Network, prediction: Prediction = "epsilon") -> Callable[[torch.Tensor, float], torch.Tensor]:
    """Makes `denoise(x, sigma) -> D` of a network that knows 1000 noise levels.

    `x` and `D` are float32 `(B, C, H, W)` in `x0 + sigma noise` coordinates. Sigma is snapped to the nearest level, in
    the scalings too, as the released code does. The network casts its input to the dtype that it computes in.
    """
    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        index = index_of(sigma)
        c_skip, c_out, c_in = scalings(levels()[index], prediction)
        return c_skip * x + c_out * network(x * c_in, index).float()

    return denoise


# Training: everything in variance-preserving coordinates, one noise level per sample.


@functools.cache
def _roots(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    alpha_bar = alpha_bars()
    return alpha_bar.sqrt().float().to(device), (1 - alpha_bar).sqrt().float().to(device)


def shares(index: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(sqrt(alpha_bar), sqrt(1 - alpha_bar))` of noise levels (B,), each float32 (B, 1, …) to multiply `like` with."""
    return tuple(root[index].view(-1, *[1] * (like.dim() - 1)) for root in _roots(like.device))


def add_noise(x0: torch.Tensor, noise: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise` (Ho et al. 2020, equation 4).

    x0, noise: (B, …) float32. index: (B,) int64 noise levels 0 … 999.
    """
    signal, noisy = shares(index, x0)
    return signal * x0 + noisy * noise


def target(x0: torch.Tensor, noise: torch.Tensor, index: torch.Tensor, prediction: Prediction) -> torch.Tensor:
    """What a network of this kind should return for `add_noise(x0, noise, index)`."""
    if _known(prediction) == "v_prediction":
        signal, noisy = shares(index, x0)
        return signal * noise - noisy * x0
    return noise if prediction == "epsilon" else x0


def clean(x: torch.Tensor, predicted: torch.Tensor, index: torch.Tensor, prediction: Prediction) -> torch.Tensor:
    """The x0 that a prediction on `x = add_noise(…)` means."""
    signal, noisy = shares(index, x)
    if _known(prediction) == "epsilon":
        return (x - noisy * predicted) / signal
    if prediction == "v_prediction":
        return signal * x - noisy * predicted
    return predicted


def noise_in(x: torch.Tensor, predicted: torch.Tensor, index: torch.Tensor, prediction: Prediction) -> torch.Tensor:
    """The noise that a prediction on `x = add_noise(…)` means."""
    signal, noisy = shares(index, x)
    if _known(prediction) == "sample":
        return (x - signal * predicted) / noisy
    if prediction == "v_prediction":
        return noisy * x + signal * predicted
    return predicted


def _known(prediction: str) -> str:
    kinds = get_args(Prediction)
    if prediction not in kinds:
        raise ValueError(f"a network predicts one of {', '.join(kinds)}, not {prediction!r}")
    return prediction
