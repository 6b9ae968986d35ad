"""Gaussian and shot noise whose every value is a function of the sample's name."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal, TypeVar

import cv2
import numpy as np
import torch

from .canvas import Canvas
from .keyed import BANK, Draws, bank, windows
from .operator import Frame, NotNegativeRange, Operator, Probability, Step, as_float, clipped

Array = TypeVar("Array", np.ndarray, torch.Tensor)
LUMA = (0.2989, 0.587, 0.114)                # the weights that basicsr takes for grey shot noise
WELL = 256                                   # electrons of white at scale 1


class Noise(Operator):
    """Gaussian noise, or shot noise after Real-ESRGAN's "Poisson"; then into 0 … 255, not rounded.

    Grey noise is the same in all channels of a sample, and is the sample's own (basicsr gives one grey field to the
    whole batch). Shot noise has the variance that Poisson counts of 256 levels have, times scale squared; basicsr
    takes as many levels as the image has distinct values, rounded up to a power of two, so that a flat image gets ten
    times the noise of a natural one. That is compat.
    """

    op: Literal["noise"] = "noise"
    gaussian: Probability = 0.5
    sigma: NotNegativeRange = (1.0, 30.0)
    poisson_scale: NotNegativeRange = (0.05, 3.0)
    grey: Probability = 0.4

    def draw(self, draws: Draws, frame: Frame) -> Step:
        if draws.chance(self.gaussian):
            step = {"family": "gaussian", "sigma": draws.uniform(*self.sigma)}
        else:
            step = {"family": "poisson", "scale": draws.uniform(*self.poisson_scale)}
        return step | {"grey": draws.chance(self.grey), "field": draws.field()}

    @staticmethod
    def cpu(image: np.ndarray, step: Step) -> np.ndarray:
        image = as_float(image)
        grey = step["grey"] or image.ndim == 2
        shape = image.shape[:2] if grey else image.shape
        gaussian = step["family"] == "gaussian"
        weight = math.sqrt(0.5) * (step["sigma"] if gaussian else 1.0)
        first, second = windows(step["field"], math.prod(shape))
        noise = cv2.addWeighted(first.reshape(shape), weight, second.reshape(shape), weight, 0)
        if not gaussian:
            level = image if not grey or image.ndim == 2 else cv2.transform(image, np.float32([LUMA]))
            noise = shot(np.clip(level, 0, 255), noise, step["scale"])
        if noise.ndim < image.ndim:
            noise = cv2.merge([noise] * image.shape[2])
        return clipped(cv2.add(image, noise, dst=noise))

    @staticmethod
    def batch(canvas: Canvas, steps: Sequence[Step]) -> Canvas:
        normal = fields(canvas, [step["field"] for step in steps], [step["grey"] for step in steps])
        gaussian = canvas.column([step["family"] == "gaussian" for step in steps]) > 0
        noise = normal * canvas.column([step.get("sigma", 0.0) for step in steps])
        if any(step["family"] == "poisson" for step in steps):
            pixels, level = canvas.pixels, canvas.pixels.clip(0, 255)
            if pixels.shape[1] == 3:
                luma = torch.tensordot(pixels.new_tensor(LUMA), pixels, dims=([0], [1]))[:, None].clip(0, 255)
                level = torch.where(canvas.column([step["grey"] for step in steps]) > 0, luma, level)
            counts = shot(level, normal, canvas.column([step.get("scale", 0.0) for step in steps]))
            noise = torch.where(gaussian, noise, counts)
        return canvas.with_pixels((canvas.pixels + noise).clip(0, 255))


def shot(level: Array, normal: Array, scale: float | Array) -> Array:
    """Shot noise in grey levels, for levels in 0 … 255 and a standard normal of the same shape.

    The Poisson quantile by Cornish and Fisher to the second order, then whole counts: mean, variance and skewness
    follow Poisson from a mean of one count on; the last factor takes the skewness away where the mean falls below, so
    that black stays black.
    """
    mean = level * (WELL / 255)
    skewness = (normal * normal - 1) * (mean / (mean + 0.25)) / 6
    counts = (mean + mean ** 0.5 * normal + skewness).round().clip(0, None)
    return (counts - mean) * (scale * (255 / WELL))


@functools.cache
def _bank_on(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(bank().copy()).to(device)


def fields(canvas: Canvas, names: Sequence[Sequence[int]], grey: Sequence[bool]) -> torch.Tensor:
    """The normals of `keyed.windows` for every sample, laid out as its rows: shape of the pixels."""
    normals = _bank_on(canvas.pixels.device)
    first, second = normals[:BANK], normals[BANK:-1]
    out = torch.zeros_like(canvas.pixels)
    for sample, (name, one, height, width) in enumerate(zip(names, grey, canvas.heights, canvas.widths, strict=True)):
        channels = 1 if one else out.shape[1]
        count = height * width * channels
        total = (_run(first, name[0], count) + _run(second, name[1], count)).view(height, width, channels)
        out[sample, :, :height, :width] = total.permute(2, 0, 1)
    return out.mul_(math.sqrt(0.5))


def _run(numbers: torch.Tensor, start: int, count: int) -> torch.Tensor:
    if start + count <= len(numbers):
        return numbers[start:start + count]
    return numbers[torch.arange(start, start + count, device=numbers.device) % len(numbers)]
