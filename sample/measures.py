"""How near a picture is to the true one, and how sure a mean difference over pictures is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from degrade.keyed import Draws

EQUAL = 100.0               # dB of a picture that is the true one, where the formula gives infinity
WINDOW, SIGMA = 11, 1.5     # of SSIM: Wang et al. 2004, section III-B
K1, K2 = 0.01, 0.03
RESAMPLES = 10_000
CHUNK = 1000                # resamples drawn at once
# Of BT.601 for studio levels: 16 to 235, as MATLAB's rgb2ycbcr, on which the field computes PSNR and SSIM of Y.
LUMA = np.array([65.481, 128.553, 24.966]) / 255


class Interval(NamedTuple):
    """A mean over images with the bounds of its confidence interval; None where one image gives none."""

    mean: float
    low: float | None
    high: float | None


def luma(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB to (H, W) float64 from 16 to 235."""
    return image.astype(np.float64) @ LUMA + 16


def psnr(image: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over all pixels, peak 255; 100 for equal pictures.

    image, truth: of one shape, uint8, or float with the same peak.

    Raises:
        ValueError: the shapes differ.
    """
    _same(image, truth)
    error = float(np.mean((image.astype(np.float64) - truth.astype(np.float64)) ** 2))
    return EQUAL if error == 0 else min(EQUAL, 10 * math.log10(255 ** 2 / error))


def psnr_y(image: np.ndarray, truth: np.ndarray) -> float:
    """`psnr` of the luma of (H, W, 3) uint8 RGB."""
    return psnr(luma(image), luma(truth))


def ssim(image: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity of the luma, at most 1 (Wang et al. 2004, equation 13; mean over whole windows).

    image, truth: (H, W, 3) uint8 RGB of one shape; sides of 11 pixels or more.

    Raises:
        ValueError: the shapes differ, or a side is shorter than the window.
    """
    _same(image, truth)
    if min(image.shape[:2]) < WINDOW:
        raise ValueError(f"SSIM needs sides of {WINDOW} pixels, not {image.shape[1]} x {image.shape[0]}")
    one, other = luma(image), luma(truth)
    mean, mean_other = _blurred(one), _blurred(other)
    variance = _blurred(one * one) - mean ** 2
    variance_other = _blurred(other * other) - mean_other ** 2
    covariance = _blurred(one * other) - mean * mean_other
    c1, c2 = (K1 * 255) ** 2, (K2 * 255) ** 2
    similar = ((2 * mean * mean_other + c1) * (2 * covariance + c2)
               / ((mean ** 2 + mean_other ** 2 + c1) * (variance + variance_other + c2)))
    return float(similar.mean())


def _blurred(plane: np.ndarray) -> np.ndarray:
    """Under the Gaussian window, where all of it lies inside the picture."""
    kernel, edge = cv2.getGaussianKernel(WINDOW, SIGMA), WINDOW // 2
    return cv2.sepFilter2D(plane, -1, kernel, kernel)[edge:-edge, edge:-edge]


def _same(image: np.ndarray, truth: np.ndarray) -> None:
    if image.shape != truth.shape:
        raise ValueError(f"pictures of one size are compared, not {image.shape} and {truth.shape}")


MEASURES = {"psnr": psnr, "psnr_y": psnr_y, "ssim": ssim}


def interval(values: Sequence[float], seed: int, name: str, resamples: int = RESAMPLES) -> Interval:
    """The mean and its 95 % confidence interval: percentiles of the means of resampled images (Efron 1979).

    values: one per image, such as differences of pairs; seed, name: of the draws, so that they repeat.

    Raises:
        ValueError: there are no values.
    """
    if not len(values):
        raise ValueError(f"{name}: a mean needs at least one image")
    array = np.asarray(values, np.float64)
    if len(array) == 1:
        return Interval(float(array[0]), None, None)
    draws = Draws(seed, name, 0, "evaluate:bootstrap")
    generator = np.random.Generator(np.random.Philox(key=[draws.integer(1 << 64), draws.integer(1 << 64)]))
    means = np.concatenate([array[generator.integers(len(array), size=(min(CHUNK, resamples - start), len(array)))]
                            .mean(axis=1) for start in range(0, resamples, CHUNK)])
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(array.mean()), float(low), float(high))
