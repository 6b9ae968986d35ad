"""Blur by a kernel of its own for every sample: Gaussian families, plateau, sinc (ringing) and motion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field, model_validator

from .canvas import Canvas
from .filters import filtered, filtered_rows
from .kernels import factors
from .keyed import Draws
from .operator import Frame, NotNegative, Operator, PositiveRange, Probability, Range, Step, Weights, as_float
from .resize import Resize
from .taps import row_taps

Kind = Literal["iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso", "motion"]


def _odd(sizes: tuple[int, int]) -> tuple[int, int]:
    if sizes[0] > sizes[1] or not (sizes[0] % 2 and sizes[1] % 2):
        raise ValueError(f"kernel sizes are odd and in order, e.g. [7, 21], not {list(sizes)}")
    return sizes


class Blur(Operator):
    """Correlation with a drawn kernel, borders reflected (101).

    In compat the exponent of a plateau kernel is drawn as basicsr does it: its range is cut at 1, and with the
    published range [1, 2] half of all kernels get exactly 1. The default draws it evenly over the range.
    """

    op: Literal["blur"] = "blur"
    size: Annotated[tuple[Annotated[int, Field(ge=1, le=101)], Annotated[int, Field(ge=1, le=101)]],
                    AfterValidator(_odd)] = Field((7, 21), description="odd kernel sizes, each as likely")
    sinc: Probability = Field(0.0, description="probability of a sinc kernel instead of the kinds below")
    cutoff: PositiveRange | None = Field(None, description="of sinc, radians; default: from pi/3 below size 13, pi/5 "
                                                           "above, to pi")
    kinds: Annotated[dict[Kind, NotNegative], Weights] = Field({"iso": 1.0})
    sigma: PositiveRange = Field((0.2, 3.0), description="pixels, along both axes of the kernel")
    rotation: Range = (-math.pi, math.pi)
    beta_gaussian: PositiveRange = Field((0.5, 4.0), description="exponent of generalized kernels; half below 1")
    beta_plateau: PositiveRange = Field((1.0, 2.0), description="exponent of plateau kernels")
    length: PositiveRange = Field((3.0, 15.0), description="of motion, pixels")

    @model_validator(mode="after")
    def _cutoff_in_band(self) -> Blur:
        if self.cutoff and self.cutoff[1] > math.pi + 1e-9:
            raise ValueError(f"cutoff {self.cutoff[1]} is above pi, the highest frequency of a pixel grid")
        return self

    def draw(self, draws: Draws, frame: Frame) -> Step:
        low, high = self.size
        size = low + 2 * draws.integer((high - low) // 2 + 1)
        if draws.chance(self.sinc):
            cutoff = self.cutoff or (math.pi / (3 if size < 13 else 5), math.pi)
            return {"kernel": {"kind": "sinc", "size": size, "cutoff": draws.uniform(*cutoff)}}
        kind = draws.choice(self.kinds)
        kernel = {"kind": kind, "size": size}
        if kind == "motion":
            return {"kernel": kernel | {"length": draws.uniform(*self.length), "theta": draws.uniform(*self.rotation)}}
        kernel["sigma_x"] = draws.uniform(*self.sigma)
        if kind.endswith("aniso"):
            kernel |= {"sigma_y": draws.uniform(*self.sigma), "theta": draws.uniform(*self.rotation)}
        if kind.startswith("generalized"):
            kernel["beta"] = _halved(draws, *self.beta_gaussian)
        elif kind.startswith("plateau"):
            kernel["beta"] = (_halved if frame.compat else Draws.uniform)(draws, *self.beta_plateau)
        return {"kernel": kernel}

    @staticmethod
    def cpu(image: np.ndarray, step: Step) -> np.ndarray:
        return filtered(as_float(image), *factors(step["kernel"]))

    @staticmethod
    def cpu_then_resize(image: np.ndarray, step: Step, resize: Step) -> np.ndarray:
        """Blur and the resize that follows; only those rows are blurred that the smaller image needs."""
        if resize["height"] >= len(image):
            return Resize.cpu(Blur.cpu(image, step), resize)
        columns, rows = factors(step["kernel"])
        return Resize.cpu(filtered_rows(as_float(image), columns, rows,
                                        *row_taps(len(image), resize["height"], resize["mode"])), resize)

    @staticmethod
    def batch(canvas: Canvas, steps: Sequence[Step]) -> Canvas:
        return canvas.with_pixels(separable(canvas, [factors(step["kernel"]) for step in steps]))


def _halved(draws: Draws, low: float, high: float) -> float:
    """Half of the draws below 1, half above, as Real-ESRGAN draws its exponents."""
    ends = (low, 1.0) if draws.chance(0.5) else (1.0, high)
    return draws.uniform(*ends)


def separable(canvas: Canvas, kernels: Sequence[tuple[np.ndarray, np.ndarray]]) -> torch.Tensor:
    """Each sample filtered by its own sum of separable kernels, given as columns (R, K) and rows (R, K).

    Samples are sorted by the number of their kernels, so that each pass runs over those that still have one.
    """
    ranks = [len(columns) for columns, _ in kernels]
    order = sorted(range(len(ranks)), key=lambda i: -ranks[i])
    reach = max(columns.shape[1] for columns, _ in kernels) // 2
    weights = np.zeros((2, max(ranks), len(ranks), 2 * reach + 1), np.float32)
    for place, i in enumerate(order):
        for axis, lines in enumerate(kernels[i]):
            margin = reach - lines.shape[1] // 2
            weights[axis, :ranks[i], place, margin:margin + lines.shape[1]] = lines
    sorted_canvas = canvas.take(order)
    padded = sorted_canvas.padded(reach, reach, reach, reach, "reflect")
    channels = padded.shape[1]
    columns, rows = canvas.upload(weights).repeat_interleave(channels, dim=2)[..., None]
    total = torch.zeros_like(sorted_canvas.pixels)
    for rank in range(max(ranks)):
        count = sum(r > rank for r in ranks)
        groups = count * channels
        part = padded[:count].reshape(1, groups, *padded.shape[2:])
        part = F.conv2d(part, rows[rank, :groups].transpose(1, 2)[:, None], groups=groups)
        part = F.conv2d(part, columns[rank, :groups][:, None], groups=groups)
        total[:count] += part.view(count, channels, *total.shape[2:])
    back = canvas.upload(np.argsort(order), torch.int64)
    return total.index_select(0, back)
