"""Blur kernels: the shapes of Real-ESRGAN and motion, and their sum of separable kernels.

A kernel is described by plain data, for example `{"kind": "aniso", "size": 13, "sigma_x": 2.1, "sigma_y": 0.4,
"theta": 0.3}`; every kernel here is point-symmetric, so correlation and convolution are the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import special

# L1 distance between a kernel and its separable sum. Photographs differ by 0.005 grey levels on average, 0.5 at most.
TOLERANCE = 8e-3


def kernel(spec: dict[str, Any]) -> np.ndarray:
    """The kernel of a description, (size, size) float64, sum 1.

    Gaussian: exp(-q/2) with q the Mahalanobis distance; generalised: exp(-q^beta/2); plateau: 1/(1 + q^beta)
    (Real-ESRGAN, Wang et al. 2021, section 3.1, after Liu et al. 2020). Sinc: J1(cutoff r) cutoff / (2 pi r)
    (ibid. section 3.3).
    """
    kind, size = spec["kind"], spec["size"]
    axis = np.arange(size) - (size - 1) / 2
    if kind == "sinc":
        values = _sinc(axis, spec["cutoff"])
    elif kind == "motion":
        values = _motion(axis, spec["length"], spec["theta"])
    else:
        distance = _mahalanobis(axis, spec)
        if kind.startswith("plateau"):
            values = 1 / (distance ** spec["beta"] + 1)
        else:
            values = np.exp(-0.5 * distance ** spec.get("beta", 1.0))
    return values / values.sum()


def _mahalanobis(axis: np.ndarray, spec: dict[str, Any]) -> np.ndarray:
    cosine, sine = np.cos(spec.get("theta", 0.0)), np.sin(spec.get("theta", 0.0))
    along = (cosine * axis[None, :] + sine * axis[:, None]) / spec["sigma_x"]
    across = (cosine * axis[:, None] - sine * axis[None, :]) / spec.get("sigma_y", spec["sigma_x"])
    return along ** 2 + across ** 2


def _sinc(axis: np.ndarray, cutoff: float) -> np.ndarray:
    radius = np.hypot(axis[:, None], axis[None, :])
    centre = len(axis) // 2
    radius[centre, centre] = 1
    values = cutoff * special.j1(cutoff * radius) / (2 * np.pi * radius)
    values[centre, centre] = cutoff ** 2 / (4 * np.pi)
    return values


def _motion(axis: np.ndarray, length: float, theta: float) -> np.ndarray:
    """A line of `length` pixels at angle `theta`, one pixel thick, with soft ends and sides."""
    along = np.cos(theta) * axis[None, :] + np.sin(theta) * axis[:, None]
    across = np.cos(theta) * axis[:, None] - np.sin(theta) * axis[None, :]
    return np.clip(1 - np.abs(across), 0, 1) * np.clip((length + 1) / 2 - np.abs(along), 0, 1)


def factors(spec: dict[str, Any], tolerance: float = TOLERANCE) -> tuple[np.ndarray, np.ndarray]:
    """A kernel as a sum of separable ones: columns (R, K) and rows (R, K) float32 whose outer products add up to it.

    Tails that together weigh less than half the tolerance are cut (the true support is often far below the nominal
    size) and the smallest singular values are left out, so that the L1 distance stays within the tolerance; the sum
    stays 1. A point-symmetric kernel splits into a part that is even on both axes and one that is odd on both; a
    quarter of each describes it, so the decomposition is of matrices of a quarter of the size, and every factor comes
    out exactly symmetric or antisymmetric, which filters exploit.
    """
    centre = spec["size"] // 2
    fold = np.full(centre + 1, 2.0)                   # how often a quarter's row occurs in the whole kernel
    fold[0] = 1
    if spec["kind"] == "iso":
        line = np.exp(-0.5 * (np.arange(centre + 1) / spec["sigma_x"]) ** 2)
        keep = _support(fold * line / (fold @ line), tolerance / 4)
        line = _unfold(line[None, :keep] / (fold[:keep] @ line[:keep]), np.ones(1))
        return line, line
    half = kernel(spec)[centre:]
    right, left = half[:, centre:], half[:, centre::-1]
    size = np.abs(right) + np.abs(left)
    keep = max(_support(size @ fold, tolerance / 4), _support(fold @ size, tolerance / 4))
    right, left = right[:keep, :keep], left[:keep, :keep]
    circular = "sigma_y" not in spec and "theta" not in spec               # the same on both sides: no odd part
    parts = right[None] if circular else np.stack([right + left, right - left]) / 2
    return _separated(parts, fold[:keep], tolerance / 2)


def _separated(parts: np.ndarray, fold: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """The even and, if there is one, the odd quarter (n, n) as columns and rows of whole kernels, largest first."""
    weight = np.sqrt(fold)
    left, values, right = np.linalg.svd(parts * np.outer(weight, weight))
    order = np.argsort(-values, axis=None, kind="stable")
    signs = np.where(order < len(fold), 1.0, -1.0)
    columns = (left.transpose(0, 2, 1) * (values[..., None] / weight)).reshape(-1, len(fold))[order]
    rows = (right / weight).reshape(-1, len(fold))[order]
    outer = columns[:, :, None] * rows[:, None, :]
    totals = np.cumsum((columns @ fold) * (rows @ fold) * (signs > 0))
    scale = 1 / np.where(totals > 0.5, totals, 1)              # the sum stays 1, and the error counts what that costs
    error = sum(np.abs(part - np.cumsum(outer * (signs == sign)[:, None, None], axis=0) * scale[:, None, None])
                for part, sign in zip(parts, (1, -1), strict=False))
    error = error.reshape(len(order), -1) @ np.outer(fold, fold).ravel()
    rank = 1 + int(np.argmax(error <= max(tolerance, error[-1])))
    return _unfold(columns[:rank] * scale[rank - 1], signs[:rank]), _unfold(rows[:rank], signs[:rank])


def _support(weight: np.ndarray, tolerance: float) -> int:
    """How many entries from the centre outwards are needed so that the rest weighs at most `tolerance`."""
    tail = np.cumsum(weight[::-1])[::-1]
    return max(1, int(np.count_nonzero(tail > tolerance)))


def _unfold(lines: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Halves from the centre outwards (R, n) to whole lines (R, 2n - 1) float32, even or odd by sign."""
    return np.concatenate([lines[:, :0:-1] * signs[:, None], lines], axis=1).astype(np.float32)
