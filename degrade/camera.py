"""The noise of a camera: shot and read noise on the sensor's linear values, behind a Bayer mosaic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from .canvas import Canvas
from .keyed import Draws, windows
from .noise import UNIT, fields
from .operator import Frame, NotNegativeRange, Operator, Step, as_float, clipped

Array = TypeVar("Array", np.ndarray, torch.Tensor)
# Bilinear demosaicing: what the neighbours of each colour on the RGGB mosaic add up to.
CROSS = np.float32([[0, 1, 0], [1, 4, 1], [0, 1, 0]]) / 4
BOX = np.float32([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 4


class Camera(Operator):
    """Signal-dependent noise: variance shot x + read^2 of the linear value x in [0, 1] (Foi et al. 2008).

    The image is linearised (inverse sRGB curve), sampled on an RGGB mosaic, given noise, clipped, demosaiced
    bilinearly and encoded again, so that the noise is coarse and its colours are correlated, as in a developed
    photograph. Greyscale images have no mosaic.
    """

    op: Literal["camera"] = "camera"
    shot: NotNegativeRange = Field((1e-4, 1.2e-2), description="variance per unit of linear signal")
    read: NotNegativeRange = Field((5e-4, 2e-2), description="standard deviation in the dark, linear units")

    def draw(self, draws: Draws, frame: Frame) -> Step:
        return {"shot": draws.uniform(*self.shot), "read": draws.uniform(*self.read), "field": draws.field()}

    @staticmethod
    def cpu(image: np.ndarray, step: Step) -> np.ndarray:
        linear = to_linear(np.clip(as_float(image) / np.float32(255), 0, 1))
        height, width = linear.shape[:2]
        raw = linear if linear.ndim == 2 else np.einsum("hwc,chw->hw", linear, mosaic(height, width))
        first, second = windows(step["field"], height * width)
        normal = (first.astype(np.float32) + second).reshape(height, width) * np.float32(UNIT)
        raw = np.clip(raw + normal * np.sqrt(raw * np.float32(step["shot"]) + np.float32(step["read"] ** 2)), 0, 1)
        if linear.ndim == 3:
            raw = cv2.merge([cv2.filter2D(raw * colour, cv2.CV_32F, kernel, borderType=cv2.BORDER_REFLECT_101)
                             for colour, kernel in zip(mosaic(height, width), (BOX, CROSS, BOX), strict=True)])
        return clipped(to_srgb(np.clip(raw, 0, 1)) * np.float32(255))

    @staticmethod
    def batch(canvas: Canvas, steps: Sequence[Step]) -> Canvas:
        linear = to_linear(canvas.pixels.clip(0, 255) / 255)
        colours, height, width = linear.shape[1:]
        pattern = canvas.upload(mosaic(height, width)) if colours == 3 else torch.ones_like(linear[:1, 0])[None, 0]
        raw = (linear * pattern).sum(1, keepdim=True)
        normal = fields(canvas.with_pixels(raw), [step["field"] for step in steps], [True] * len(steps))
        shot, read = (canvas.column([step[name] for step in steps]) for name in ("shot", "read"))
        raw = canvas.with_pixels((raw + normal * (raw * shot + read ** 2).sqrt()).clip(0, 1))
        if colours == 3:
            planes = raw.padded(1, 1, 1, 1, "reflect") * canvas.upload(_padded_mosaic(height, width))
            kernels = canvas.upload(np.stack([BOX, CROSS, BOX]))[:, None]
            raw = raw.with_pixels(F.conv2d(planes, kernels, groups=3))
        return canvas.with_pixels((to_srgb(raw.pixels.clip(0, 1)) * 255).clip(0, 255))


def mosaic(height: int, width: int) -> np.ndarray:
    """Which pixels of an RGGB sensor see red, green and blue: (3, H, W) float32, 0 or 1."""
    row, column = np.indices((height, width)) % 2
    return np.stack([(row == 0) & (column == 0), row != column, (row == 1) & (column == 1)]).astype(np.float32)


def _padded_mosaic(height: int, width: int) -> np.ndarray:
    """The mosaic with a reflected border of one, which continues its pattern."""
    return mosaic(height + 2, width + 2)[[2, 1, 0]]


def to_linear(encoded: Array) -> Array:
    """The inverse of the sRGB curve (IEC 61966-2-1), [0, 1] to [0, 1]."""
    where = torch.where if isinstance(encoded, torch.Tensor) else np.where
    return where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def to_srgb(linear: Array) -> Array:
    """The sRGB curve (IEC 61966-2-1), [0, 1] to [0, 1]."""
    where = torch.where if isinstance(linear, torch.Tensor) else np.where
    return where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
