"""Sharpening: the unsharp masking that precedes Real-ESRGAN's chain, and the over-sharpening of cameras and apps."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
from pydantic import Field

from .blur import separable
from .canvas import Canvas
from .filters import filtered
from .keyed import Draws
from .operator import Frame, NotNegative, NotNegativeRange, Operator, PositiveRange, Step, as_float, clipped


class Usm(Operator):
    """Unsharp masking where the detail is above a threshold, with a softened mask (Real-ESRGAN's USM).

    residual = image - blurred; mask = blurred(|residual| > threshold); image + mask (clip(image + weight residual) -
    image). The Gaussian has `radius` (made odd) pixels and OpenCV's sigma for them: 51 pixels, 8.0.
    """

    op: Literal["usm"] = "usm"
    weight: NotNegative = 0.5
    radius: int = Field(50, ge=3, le=200, description="pixels of the Gaussian's window, made odd")
    threshold: NotNegative = Field(10.0, description="grey levels")

    def draw(self, draws: Draws, frame: Frame) -> Step:
        return {"weight": self.weight, "radius": self.radius, "threshold": self.threshold}

    @staticmethod
    def cpu(image: np.ndarray, step: Step) -> np.ndarray:
        image = as_float(image)
        window = _window(step["radius"])
        residual = cv2.subtract(image, filtered(image, window, window))
        mask = (np.abs(residual) > step["threshold"]).astype(np.float32)
        change = clipped(cv2.scaleAdd(residual, step["weight"], image))
        change = cv2.subtract(change, image, dst=change)
        change = cv2.multiply(change, filtered(mask, window, window), dst=change)
        return cv2.add(image, change, dst=change)

    @staticmethod
    def batch(canvas: Canvas, steps: Sequence[Step]) -> Canvas:
        windows = [(_window(step["radius"]),) * 2 for step in steps]
        image = canvas.pixels
        residual = image - separable(canvas, windows)
        mask = (residual.abs() > canvas.column([step["threshold"] for step in steps])).float()
        mask = separable(canvas.with_pixels(mask), windows)
        sharp = (image + canvas.column([step["weight"] for step in steps]) * residual).clip(0, 255)
        return canvas.with_pixels(image + mask * (sharp - image))


@functools.cache
def _window(radius: int) -> np.ndarray:
    return cv2.getGaussianKernel(radius + 1 - radius % 2, 0, cv2.CV_32F).T


class Sharpen(Operator):
    """Over-sharpening: image + amount (image - Gaussian), clipped. Leaves the bright and dark halos of cameras."""

    op: Literal["sharpen"] = "sharpen"
    amount: NotNegativeRange = (0.5, 2.0)
    sigma: PositiveRange = Field((0.5, 2.5), description="pixels")

    def draw(self, draws: Draws, frame: Frame) -> Step:
        return {"amount": draws.uniform(*self.amount), "sigma": draws.uniform(*self.sigma)}

    @staticmethod
    def cpu(image: np.ndarray, step: Step) -> np.ndarray:
        image = as_float(image)
        residual = cv2.subtract(image, filtered(image, *_gaussian(step["sigma"])))
        return clipped(cv2.scaleAdd(residual, step["amount"], image))

    @staticmethod
    def batch(canvas: Canvas, steps: Sequence[Step]) -> Canvas:
        image = canvas.pixels
        residual = image - separable(canvas, [_gaussian(step["sigma"]) for step in steps])
        return canvas.with_pixels((image + canvas.column([step["amount"] for step in steps]) * residual).clip(0, 255))


def _gaussian(sigma: float) -> tuple[np.ndarray, np.ndarray]:
    line = cv2.getGaussianKernel(2 * math.ceil(3 * sigma) + 1, sigma, cv2.CV_32F).T
    return line, line
