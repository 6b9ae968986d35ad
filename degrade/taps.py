"""Which pixels make each pixel of a resized row, and with what weight: one arithmetic for both routes.

Positions are in float64, because they decide which pixels are taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Literal, TypeVar

import numpy as np
import torch

from .canvas import Canvas

Array = TypeVar("Array", np.ndarray, torch.Tensor)
Mode = Literal["nearest", "area", "bilinear", "bicubic", "lanczos", "bicubic_antialias"]


def row_taps(old: int, new: int, mode: Mode) -> tuple[np.ndarray, np.ndarray]:
    """`taps` of one image, on the CPU: (new, T) int64 and float32."""
    ratio = np.array([[old / new]])
    steps, target = np.arange(_count(mode, old, new)), np.arange(new, dtype=np.float64)
    places, weights = _mode_taps(np, mode, ratio, target, steps, old - 1)
    return places[0].clip(0, old - 1).astype(np.int64), weights[0].astype(np.float32)


def taps(canvas: Canvas, old: Sequence[int], new: Sequence[int], modes: Sequence[Mode]
         ) -> tuple[torch.Tensor, torch.Tensor]:
    """Places and weights beside the pixels of a canvas, for rows of `old` pixels: (B, max(new), T) int64 and float32.

    Cubic: Keys with a = -0.75, antialiased with a = -0.5. Lanczos: 4 lobes. Area: the overlap of the new pixel with
    each old one. Beyond the border the last pixel repeats, but the antialiased filter is cut there.
    """
    ratio = canvas.upload([o / n for o, n in zip(old, new, strict=True)], torch.float64)[:, None]
    last = canvas.upload(old, torch.int64)[:, None, None] - 1
    target = torch.arange(max(new), device=ratio.device, dtype=torch.float64)
    steps = torch.arange(max(map(_count, modes, old, new)), device=ratio.device)
    places = weights = None
    for mode in sorted(set(modes)):
        found = _mode_taps(torch, mode, ratio, target, steps, last)
        if places is None:
            places, weights = found
        else:
            mine = canvas.upload([other == mode for other in modes], torch.bool)[:, None, None]
            places, weights = (torch.where(mine, new, old) for new, old in zip(found, (places, weights), strict=True))
    return torch.minimum(places.long().clamp(min=0), last), weights.float()


def _count(mode: Mode, old: int, new: int) -> int:
    ratio = old / new
    return {"nearest": 1, "bilinear": 2, "bicubic": 4, "lanczos": 8, "area": math.ceil(ratio) + 1,
            "bicubic_antialias": math.ceil(4 * max(ratio, 1)) + 1}[mode]


def _mode_taps(xp: ModuleType, mode: Mode, ratio: Array, target: Array, steps: Array, last: Array | int
               ) -> tuple[Array, Array]:
    """Places, which may lie beyond the border, and weights: (B, N, T) for ratios (B, 1), N targets and T steps."""
    centre = (target + 0.5) * ratio - 0.5
    if mode == "area":
        start = target * ratio
        places = xp.floor(start + 1e-9)[..., None] + steps
        overlap = xp.minimum(places + 1, (start + ratio)[..., None]) - xp.maximum(places, start[..., None])
        weights = overlap.clip(0, None)
    elif mode == "nearest":
        places = xp.floor(centre + 0.5)[..., None] + steps
        weights = (steps == 0) + 0.0 * places
    elif mode == "bicubic_antialias":
        stretch = ratio.clip(1, None)
        places = xp.floor(centre - 2 * stretch)[..., None] + steps
        weights = _cubic(xp, abs(places - centre[..., None]) / stretch[..., None], -0.5)
        weights = weights * ((places >= 0) & (places <= last))
    else:
        before = {"bilinear": 0, "bicubic": 1, "lanczos": 3}[mode]
        places = (xp.floor(centre) - before)[..., None] + steps
        distance = abs(places - centre[..., None])
        weights = (1 - distance).clip(0, None) if mode == "bilinear" else \
            _cubic(xp, distance, -0.75) if mode == "bicubic" else _lanczos(xp, distance)
    return places, weights / weights.sum(-1)[..., None]


def _cubic(xp: ModuleType, x: Array, a: float) -> Array:
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return xp.where(x <= 1, near, xp.where(x < 2, far, 0.0 * x))


def _lanczos(xp: ModuleType, x: Array) -> Array:
    return xp.where(x < 4, xp.sinc(x) * xp.sinc(x / 4), 0.0 * x)
