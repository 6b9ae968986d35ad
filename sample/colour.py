"""Colours of a restored image from those of the first stage, which keeps them; the details stay.

The blurs are linear, border included, so one chain of blurs over the difference of both images serves for the low
bands of both, and everything is done one colour plane at a time: beside the result, about four planes of memory.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional

Method = Literal["wavelet", "adain", "none"]
LEVELS = 5                  # blurs of radius 1, 2, 4, 8, 16: what is larger than about 60 pixels is colour
ADAIN_EPSILON = 1e-5        # added to variances


def match(content: torch.Tensor, reference: torch.Tensor, method: Method = "wavelet") -> torch.Tensor:
    """Gives an image the colours of another one of the same size.

    Args:
        content, reference: (B, 3, H, W) float32, in [-1, 1].
        method: `wavelet` takes the low frequencies of the reference (SUPIR's default); `adain` its mean and deviation
            per channel (Huang and Belongie 2017, equation 8); `none` returns the content.

    Returns:
        (B, 3, H, W) float32, around [-1, 1] but not clamped.
    """
    if content.shape != reference.shape:
        raise ValueError(f"colours are matched between images of one size, not {tuple(content.shape)} and "
                         f"{tuple(reference.shape)}")
    if method == "none":
        return content
    try:
        matched = {"wavelet": _wavelet, "adain": _adain}[method]
    except KeyError:
        raise ValueError(f"colours are matched by wavelet, adain or none, not {method!r}") from None
    result = torch.empty_like(content, dtype=torch.float32)
    for image in range(content.shape[0]):
        for channel in range(content.shape[1]):
            result[image, channel] = matched(content[image, channel].float(), reference[image, channel].float())
    return result


def low_band(plane: torch.Tensor, levels: int = LEVELS) -> torch.Tensor:
    """What is left of an (H, W) plane after blurs of radius 1, 2, 4, …"""
    for level in range(levels):
        plane = blur(plane, 2 ** level)
    return plane


def blur(plane: torch.Tensor, radius: int) -> torch.Tensor:
    """An (H, W) plane by the weights 1 2 1, divided by 4, `radius` apart, down and across; edges are repeated."""
    for axis in (0, 1):
        size = plane.shape[axis]
        padding = (0, 0, radius, radius) if axis == 0 else (radius, radius, 0, 0)
        padded = functional.pad(plane[None, None], padding, mode="replicate")[0, 0]
        plane = (padded.narrow(axis, 0, size) + padded.narrow(axis, 2 * radius, size)).mul_(0.25).add_(plane, alpha=0.5)
    return plane


def _wavelet(content: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    # high(content) + low(reference), where high(content) is all that its blurs took away
    return low_band(reference - content).add_(content)


def _adain(content: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    (spread, mean), (wanted_spread, wanted_mean) = (torch.var_mean(plane) for plane in (content, reference))
    return (content - mean) * ((wanted_spread + ADAIN_EPSILON) / (spread + ADAIN_EPSILON)).sqrt() + wanted_mean
