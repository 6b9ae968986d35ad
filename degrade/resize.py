"""Resizing by drawn scales and filters, most of which alias when they reduce, as those of the published recipes do.

"area" and "bicubic_antialias" do not: the latter is the filter of MATLAB and Pillow, stretched by the scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import cv2
import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator

from .canvas import Canvas, gather
from .filters import resized
from .keyed import Draws
from .operator import Frame, NotNegative, Operator, PositiveRange, Step, Weights, as_float
from .strict import Strict
from .taps import Mode, row_taps, taps

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


def _by_taps(image: np.ndarray, size: tuple[int, int], mode: Mode) -> np.ndarray:
    """What OpenCV leaves to rounding: which pixel is nearest, and where an enlarged pixel's area begins."""
    rows, columns = (row_taps(old, new, mode) for old, new in zip(image.shape, size, strict=False))
    return resized(image, rows, columns)


def resampled(canvas: Canvas, pixels: torch.Tensor, axis: int, old: Sequence[int], new: Sequence[int],
              modes: Sequence[Mode]) -> torch.Tensor:
    """Rows (axis 2) or columns (axis 3) of each sample from `old` to `new` many, by its own filter."""
    places, weights = taps(canvas, old, new, modes)
    view = (slice(None), None, slice(None), None) if axis == 2 else (slice(None), None, None, slice(None))
    total = 0
    for place, weight in zip(places.unbind(2), weights.unbind(2), strict=True):
        total = total + gather(pixels, axis, place) * weight[view]
    return total
