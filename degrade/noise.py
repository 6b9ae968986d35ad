"""Gaussian and shot noise whose every value is a function of the sample's name."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from .canvas import Canvas
from .keyed import STEPS, Draws, banks, run, windows
from .native import inlined, native
from .operator import Frame, NotNegativeRange, Operator, Probability, Step, as_float

LUMA = (0.2989, 0.587, 0.114)                # the weights that basicsr takes for grey shot noise
UNIT = math.sqrt(0.5) / STEPS                # what makes the sum of two runs a standard normal
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
        values = np.ascontiguousarray(as_float(image)).reshape(-1)
        grey = step["grey"] and image.ndim == 3
        noise = np.empty(len(values) // (3 if grey else 1), np.float32)
        first, second = windows(step["field"], len(noise))
        if step["family"] == "gaussian":
            _gaussian(first, second, step["sigma"] * UNIT, noise)
        else:
            levels = values
            if grey:
                _luma(values, levels := np.empty_like(noise))
            _shots(levels, first, second, step["scale"], noise)
        out = np.empty_like(values)
        _added(values, noise, out)
        return out.reshape(image.shape)

    @staticmethod
    def batch(canvas: Canvas, steps: Sequence[Step]) -> Canvas:
        normal = fields(canvas, [step["field"] for step in steps], [step["grey"] for step in steps])
        gaussian = canvas.column([step["family"] == "gaussian" for step in steps]) > 0
        noise = normal * canvas.column([step.get("sigma", 0.0) for step in steps])
        if any(step["family"] == "poisson" for step in steps):
            pixels, level = canvas.pixels, canvas.pixels.clip(0, 255)
            if pixels.shape[1] == 3:
                luma = sum(weight * plane for weight, plane in zip(LUMA, pixels.unbind(1), strict=True))[:, None]
                level = torch.where(canvas.column([step["grey"] for step in steps]) > 0, luma.clip(0, 255), level)
            counts = shot(level, normal, canvas.column([step.get("scale", 0.0) for step in steps]))
            noise = torch.where(gaussian, noise, counts)
        return canvas.with_pixels((canvas.pixels + noise).clip(0, 255))


def shot(level: torch.Tensor, normal: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Shot noise in grey levels, for levels in 0 … 255 and standard normals.

    The Poisson quantile by Cornish and Fisher to the second order, then whole counts: mean, variance and skewness
    follow Poisson from a mean of one count on; a factor takes the skewness away where the mean falls below, so that
    black stays black.
    """
    mean = level * (WELL / 255)
    skewness = (normal * normal - 1) * mean / (6 * mean + 1.5)
    counts = (mean + mean.sqrt() * normal + skewness).round().clip(min=0)
    return (counts - mean) * (scale * (255 / WELL))


@inlined
def _shot(level, normal, scale):
    """`shot` of one value."""
    mean = np.float32(WELL / 255) * level
    skewness = (normal * normal - np.float32(1)) * mean / (np.float32(6) * mean + np.float32(1.5))
    counts = np.int32(max(mean + np.sqrt(mean) * normal + skewness, np.float32(0)) + np.float32(0.5))
    return (np.float32(counts) - mean) * np.float32(scale * (255 / WELL))


@inlined
def _within(value):
    return min(max(value, np.float32(0)), np.float32(255))


@native
def _gaussian(first, second, weight, out):
    for i in range(len(out)):
        out[i] = (np.float32(first[i]) + np.float32(second[i])) * np.float32(weight)


@native
def _shots(levels, first, second, scale, out):
    for i in range(len(out)):
        normal = (np.float32(first[i]) + np.float32(second[i])) * np.float32(UNIT)
        out[i] = _shot(_within(levels[i]), normal, scale)


@native
def _luma(image, out):
    for i in range(len(out)):
        out[i] = (np.float32(LUMA[0]) * image[3 * i] + np.float32(LUMA[1]) * image[3 * i + 1]
                  + np.float32(LUMA[2]) * image[3 * i + 2])


@native
def _added(image, noise, out):
    """Noise per value, or per pixel of three values, spelled out for the sake of vector instructions."""
    if len(noise) == len(image):
        for i in range(len(image)):
            out[i] = _within(image[i] + noise[i])
    else:
        for i in range(len(noise)):
            out[3 * i] = _within(image[3 * i] + noise[i])
            out[3 * i + 1] = _within(image[3 * i + 1] + noise[i])
            out[3 * i + 2] = _within(image[3 * i + 2] + noise[i])


@functools.cache
def _rings_on(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.from_numpy(ring.copy()).to(device) for ring in banks())


def fields(canvas: Canvas, names: Sequence[Sequence[int]], grey: Sequence[bool]) -> torch.Tensor:
    """The normals of `keyed.windows` for every sample, laid out as its rows: shape of the pixels."""
    rings = _rings_on(canvas.pixels.device)
    out = torch.zeros_like(canvas.pixels)
    for sample, (name, one, height, width) in enumerate(zip(names, grey, canvas.heights, canvas.widths, strict=True)):
        channels = 1 if one else out.shape[1]
        count = height * width * channels
        total = sum(run(ring, start, count).float() for ring, start in zip(rings, name, strict=True))
        out[sample, :, :height, :width] = total.view(height, width, channels).permute(2, 0, 1)
    return out.mul_(UNIT)
