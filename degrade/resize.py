"""Resizing by drawn scales and filters, most of which alias when they reduce, as those of the published recipes do.

"area" and "bicubic_antialias" do not: the latter is the filter of MATLAB and Pillow, stretched by the scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import cv2
import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator

from .canvas import Canvas, gather
from .keyed import Draws
from .operator import Frame, NotNegative, Operator, PositiveRange, Step, Weights, as_float
from .strict import Strict

Mode = Literal["nearest", "area", "bilinear", "bicubic", "lanczos", "bicubic_antialias"]
LARGEST = 8                                  # times that one step may enlarge
CV_MODES = {"area": cv2.INTER_AREA, "bilinear": cv2.INTER_LINEAR,
            "bicubic": cv2.INTER_CUBIC, "lanczos": cv2.INTER_LANCZOS4}


class Scale(Strict):
    """How a scale is drawn: up from 1 to the high end, down from the low end to 1, or kept."""

    up: NotNegative = 0.0
    down: NotNegative = 0.0
    keep: NotNegative = 0.0
    range: PositiveRange

    @model_validator(mode="after")
    def _possible(self) -> Scale:
        if not self.up + self.down + self.keep > 0:
            raise ValueError("one of up, down and keep needs a weight above 0")
        if self.range[1] > LARGEST:
            raise ValueError(f"range {list(self.range)} enlarges beyond {LARGEST} times")
        if (self.up and self.range[1] < 1) or (self.down and self.range[0] > 1):
            raise ValueError(f"range {list(self.range)} has no room for " +
                             ("down" if self.down and self.range[0] > 1 else "up"))
        return self

    def draw(self, draws: Draws) -> float:
        way = draws.choice({"up": self.up, "down": self.down, "keep": self.keep})
        low, high = self.range
        return {"up": lambda: draws.uniform(1, high), "down": lambda: draws.uniform(low, 1), "keep": lambda: 1.0}[way]()


class Resize(Operator):
    """To a drawn multiple (`scale`) or fraction (`shrink`) of a size, or exactly to it.

    Every filter maps pixel centres by the true ratio of the sizes. In compat the scale itself is used, as basicsr
    does where it resizes relative to the current size: sizes are whole, so the far edge drifts by up to pixels. There
    "area" is torch's adaptive pooling, here it is the exact mean over each pixel's area.
    """

    op: Literal["resize"] = "resize"
    to: Literal["current", "lq", "hq"] = Field("current", description="the size that scale and shrink refer to")
    scale: Scale | None = None
    shrink: PositiveRange | None = Field(None, description="divides the size by a uniform draw")
    modes: Annotated[dict[Mode, NotNegative], Weights] = Field({"area": 1.0, "bilinear": 1.0, "bicubic": 1.0})

    @model_validator(mode="after")
    def _one_way(self) -> Resize:
        if self.scale and self.shrink:
            raise ValueError("give scale or shrink, not both")
        if self.shrink and self.shrink[0] < 1 / LARGEST:
            raise ValueError(f"shrink {list(self.shrink)} enlarges beyond {LARGEST} times")
        if self.to == "current" and not (self.scale or self.shrink):
            raise ValueError('resizing to "current" changes nothing: give scale, shrink, or to: lq or hq')
        return self

    @property
    def exact(self) -> bool:
        return not (self.scale or self.shrink)

    def draw(self, draws: Draws, frame: Frame) -> Step:
        if self.to == "lq":          # whole only where the size itself is meant: basicsr scales H / 4, not H // 4
            height, width = frame.lq if self.exact else (side / frame.scale for side in frame.hq)
        else:
            height, width = frame.now if self.to == "current" else frame.hq
        factor = self.scale.draw(draws) if self.scale else 1 / draws.uniform(*self.shrink) if self.shrink else 1.0
        step = {"height": max(1, int(height * factor)), "width": max(1, int(width * factor)),
                "mode": draws.choice(self.modes)}
        return step | ({"factor": factor} if self.to == "current" else {})

    @staticmethod
    def cpu(image: np.ndarray, step: Step) -> np.ndarray:
        if image.shape[:2] == (step["height"], step["width"]):
            return image
        if step["mode"] == "bicubic_antialias":
            return _by_pillow(as_float(image), (step["width"], step["height"]))
        enlarged = step["height"] > image.shape[0] or step["width"] > image.shape[1]
        if step["mode"] == "nearest" or (step["mode"] == "area" and enlarged):
            return _by_taps(as_float(image), (step["height"], step["width"]), step["mode"])
        return cv2.resize(as_float(image), (step["width"], step["height"]), interpolation=CV_MODES[step["mode"]])

    @staticmethod
    def batch(canvas: Canvas, steps: Sequence[Step]) -> Canvas:
        modes = [step["mode"] for step in steps]
        heights, widths = (tuple(step[name] for step in steps) for name in ("height", "width"))
        pixels = resampled(canvas, canvas.pixels, 3, canvas.widths, widths, modes)
        return Canvas(resampled(canvas, pixels, 2, canvas.heights, heights, modes), heights, widths)


def _by_pillow(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    planes = [np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC)) for plane in cv2.split(image)]
    return cv2.merge(planes) if len(planes) > 1 else planes[0]


def row_taps(old: int, new: int, mode: Mode) -> tuple[np.ndarray, np.ndarray]:
    """`taps` of one image: (new, T) places and weights."""
    places, weights = taps(Canvas(torch.empty(0), (), ()), [old], [new], [mode])
    return places[0].numpy(), weights[0].numpy()


def _by_taps(image: np.ndarray, size: tuple[int, int], mode: Mode) -> np.ndarray:
    """What OpenCV leaves to rounding: which pixel is nearest, and where an enlarged pixel's area begins."""
    for axis, (old, new) in enumerate(zip(image.shape, size, strict=False)):
        places, weights = row_taps(old, new, mode)
        shape = [-1 if a == axis else 1 for a in range(image.ndim)]
        image = sum(image.take(places[:, tap], axis) * weights[:, tap].reshape(shape) for tap in range(places.shape[1]))
    return image


def resampled(canvas: Canvas, pixels: torch.Tensor, axis: int, old: Sequence[int], new: Sequence[int],
              modes: Sequence[Mode]) -> torch.Tensor:
    """Rows (axis 2) or columns (axis 3) of each sample from `old` to `new` many, by its own filter."""
    places, weights = taps(canvas, old, new, modes)
    view = (slice(None), None, slice(None), None) if axis == 2 else (slice(None), None, None, slice(None))
    total = 0
    for place, weight in zip(places.unbind(2), weights.unbind(2), strict=True):
        total = total + gather(pixels, axis, place) * weight[view]
    return total


def taps(canvas: Canvas, old: Sequence[int], new: Sequence[int], modes: Sequence[Mode]
         ) -> tuple[torch.Tensor, torch.Tensor]:
    """Which pixels make each new one, and with what weight: (B, max(new), T) int64 and float32.

    Cubic: Keys with a = -0.75, antialiased with a = -0.5. Lanczos: 4 lobes. Area: the overlap of the new pixel with
    each old one. Beyond the border the last pixel repeats, but the antialiased filter is cut there. The arithmetic of
    positions is in float64: it decides which pixels are taken.
    """
    ratios = [o / n if o != n else 1.0 for o, n in zip(old, new, strict=True)]
    reach = {"nearest": lambda r: 1, "bilinear": lambda r: 2, "bicubic": lambda r: 4, "lanczos": lambda r: 8,
             "area": lambda r: math.ceil(r) + 1, "bicubic_antialias": lambda r: math.ceil(4 * max(r, 1)) + 1}
    count = max(reach[mode](r) for mode, r in zip(modes, ratios, strict=True))
    ratio = canvas.upload(ratios, torch.float64)[:, None]
    stretch = ratio.clamp(min=1)
    last = canvas.upload(old, torch.int64)[:, None, None] - 1
    target = torch.arange(max(new), device=ratio.device, dtype=torch.float64)
    centre, start = (target + 0.5) * ratio - 0.5, target * ratio
    first = {"nearest": (centre + 0.5).floor(), "area": (start + 1e-9).floor(), "bilinear": centre.floor(),
             "bicubic": centre.floor() - 1, "lanczos": centre.floor() - 3,
             "bicubic_antialias": (centre - 2 * stretch).floor()}
    present = sorted(set(modes))
    which = canvas.upload([present.index(mode) for mode in modes], torch.int64)[:, None]
    origin = sum(first[mode] * (which == i) for i, mode in enumerate(present))
    places = origin[..., None] + torch.arange(count, device=ratio.device)
    distance = (places - centre[..., None]).abs()
    weights = {
        "nearest": lambda: (places == origin[..., None]).double(),
        "area": lambda: ((torch.minimum(places + 1, (start + ratio)[..., None])
                          - torch.maximum(places, start[..., None])).clamp(min=0) / ratio[..., None]),
        "bilinear": lambda: (1 - distance).clamp(min=0),
        "bicubic": lambda: _cubic(distance),
        "lanczos": lambda: _lanczos(distance),
        "bicubic_antialias": lambda: _cubic(distance / stretch[..., None], -0.5) * ((places >= 0) & (places <= last))}
    weight = sum(weights[mode]() * (which == i)[..., None] for i, mode in enumerate(present))
    weight = weight / weight.sum(2, keepdim=True)
    return torch.minimum(places.long().clamp(min=0), last), weight.float()


def _cubic(x: torch.Tensor, a: float = -0.75) -> torch.Tensor:
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _lanczos(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x < 4, torch.sinc(x) * torch.sinc(x / 4), torch.zeros_like(x))
