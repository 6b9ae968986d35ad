"""Latents larger than a network can take: windows, their weights, and a denoiser that is evaluated window by window.

What is blended is D, the denoised latent, in every step; the sampler then steps once over the whole latent. The
released code steps in every window and blends the results. For the samplers here that is the same: a step is a sum of
x, noise and opinions with factors that depend on sigma alone, and a weighted mean of such sums is the sum of weighted
means. (Measured over eight steps: 1e-6.) One sampler then serves both, and noise and pull need no slicing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from .guidance import Denoise

TILE, STRIDE = 128, 64          # latent pixels; SDXL was trained on 128 x 128, and the released code has these
SPREAD = 0.01                   # variance of the weights in squared tiles; the released code's


class Window(NamedTuple):
    """A part of a latent: rows top … bottom - 1, columns left … right - 1."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def slices(self) -> tuple:
        return ..., slice(self.top, self.bottom), slice(self.left, self.right)


WindowDenoise = Callable[[torch.Tensor, float, Sequence[Window]], torch.Tensor]


def windows(height: int, width: int, tile: int = TILE, stride: int = STRIDE) -> list[Window]:
    """Windows that cover a latent, row by row; the last of a row or column is flush with the edge.

    All have the same size: that of a tile, or of the latent along a side that is shorter than a tile.
    """
    if not 0 < stride <= tile:
        raise ValueError(f"windows of {tile} every {stride} leave gaps; the stride must be between 1 and the tile")
    return [Window(top, min(top + tile, height), left, min(left + tile, width))
            for top in _starts(height, tile, stride) for left in _starts(width, tile, stride)]


def _starts(length: int, tile: int, stride: int) -> list[int]:
    last = max(length - tile, 0)
    return [*range(0, last, stride), last]


def weights(height: int, width: int, *, released: bool = False) -> torch.Tensor:
    """(height, width) float64: a Gaussian hill over a window, its deviation a tenth of each side.

    The released code centres it at height / 2 vertically, half a pixel too low, and at (width - 1) / 2 horizontally,
    and gives it a constant factor, which makes no difference after normalisation. By default it is symmetric.
    """
    rows = torch.arange(height, dtype=torch.float64) - (height / 2 if released else (height - 1) / 2)
    columns = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    hill = torch.outer(torch.exp(-(rows / height) ** 2 / (2 * SPREAD)),
                       torch.exp(-(columns / width) ** 2 / (2 * SPREAD)))
    return hill / (2 * torch.pi * SPREAD) if released else hill


def shares(layout: Sequence[Window], height: int, width: int, *, released: bool = False) -> Iterator[torch.Tensor]:
    """What each window contributes to the blend, (h, w) float32 each; over all windows they sum to 1 everywhere."""
    hill = weights(layout[0].bottom - layout[0].top, layout[0].right - layout[0].left, released=released)
    total = torch.zeros(height, width, dtype=torch.float64)
    for window in layout:
        total[window.slices] += hill
    return ((hill / total[window.slices]).float() for window in layout)


def cut(whole: torch.Tensor, layout: Sequence[Window]) -> torch.Tensor:
    """(B, C, H, W) to (N B, C, h, w): the windows one after the other, each with all images of the batch.

    A denoiser for windows cuts its control latent by this, to have it in the order of its x.
    """
    return torch.cat([whole[window.slices] for window in layout])


def tiled(denoise: WindowDenoise, *, tile: int = TILE, stride: int = STRIDE, batch: int = 1,
          released: bool = False) -> Denoise:
    """Makes a denoiser for latents of any size out of one for windows.

    Args:
        denoise: `(x, sigma, windows) -> D` with x as from `cut`; what else depends on the place, such as the control
            latent or a caption per tile, it looks up by the windows.
        tile, stride: latent pixels.
        batch: windows that are evaluated together; memory grows with it and with nothing else.
        released: weights as in the released code.
    """
    def whole(x: torch.Tensor, sigma: float) -> torch.Tensor:
        height, width = x.shape[-2:]
        layout = windows(height, width, tile, stride)
        blend, share = torch.zeros_like(x, dtype=torch.float32), shares(layout, height, width, released=released)
        for first in range(0, len(layout), batch):
            some = layout[first:first + batch]
            parts = denoise(cut(x, some), sigma, some).float().chunk(len(some))
            for window, part in zip(some, parts, strict=True):
                blend[window.slices] += part * next(share).to(part.device)
        return blend

    return whole
