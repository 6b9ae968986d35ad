"""What every operator is: its ranges, how its parameters are drawn, and what it does on either route.

A drawn operator is a *step*: plain data such as `{"op": "noise", "family": "gaussian", "sigma": 12.4, …}`. On the CPU
route an image is (H, W) or (H, W, 3), uint8 or float32; on the torch route a batch is a `Canvas`. Both count in grey
levels, 0 to 255.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import cv2
import numpy as np
from pydantic import AfterValidator, Field

from .canvas import Canvas
from .keyed import Draws
from .strict import Strict

Step = dict[str, Any]
Size = tuple[int, int]                       # height, width
Probability = Annotated[float, Field(ge=0, le=1)]


def _ordered(ends: tuple) -> tuple:
    if ends[0] > ends[1]:
        raise ValueError(f"the low end {ends[0]} is above the high end {ends[1]}")
    return ends


def _some(weights: dict) -> dict:
    if not sum(weights.values()) > 0:
        raise ValueError("needs at least one weight above 0")
    return weights


Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Range = Annotated[tuple[Finite, Finite], AfterValidator(_ordered)]
PositiveRange = Annotated[tuple[Positive, Positive], AfterValidator(_ordered)]
NotNegativeRange = Annotated[tuple[NotNegative, NotNegative], AfterValidator(_ordered)]
Weights = AfterValidator(_some)


@dataclass(frozen=True)
class Frame:
    """Where a draw stands: the sizes of the input, of the output and of the image at this step."""

    hq: Size
    scale: int
    now: Size
    compat: bool = False                     # draw as basicsr does, where the two differ

    @property
    def lq(self) -> Size:
        return self.hq[0] // self.scale, self.hq[1] // self.scale

    def at(self, size: Size) -> Frame:
        return replace(self, now=size)


class Operator(Strict):
    """One kind of damage; `probability` is that of its being applied to a sample."""

    op: str
    probability: Probability = 1.0

    def draw(self, draws: Draws, frame: Frame) -> Step:
        """Its parameters for one sample, without `op`."""
        raise NotImplementedError

    @staticmethod
    def cpu(image: np.ndarray, step: Step) -> np.ndarray:
        raise NotImplementedError

    @staticmethod
    def batch(canvas: Canvas, steps: Sequence[Step]) -> Canvas:
        raise NotImplementedError


def as_float(image: np.ndarray) -> np.ndarray:
    return image if image.dtype == np.float32 else image.astype(np.float32)


def as_bytes(image: np.ndarray) -> np.ndarray:
    """Rounded, half to even, and saturated."""
    return image if image.dtype == np.uint8 else cv2.addWeighted(image, 1, image, 0, 0, dtype=cv2.CV_8U)


def clipped(image: np.ndarray) -> np.ndarray:
    """Into 0 … 255, in place."""
    return np.clip(image, 0, 255, out=image)
