"""The draws of a batch: every number a function of (seed, sample, epoch, purpose), wherever the sample is trained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from degrade.keyed import Draws


class Named:
    """Numbers for the samples of a batch, drawn on the CPU: the same for every batch size, rank and device.

    seed: of the run; keys, epochs: of the samples.
    """

    def __init__(self, seed: int, keys: Sequence[str], epochs: Sequence[int]) -> None:
        self.seed, self.samples = seed, list(zip(keys, epochs, strict=True))

    def unit(self, purpose: str) -> Tensor:
        """(B,) float64, uniform in [0, 1)."""
        return torch.tensor([self._draws(sample, purpose).unit() for sample in self.samples], dtype=torch.float64)

    def chance(self, purpose: str, probability: float) -> list[bool]:
        """For each sample, whether something of this probability happens."""
        return (self.unit(purpose) < probability).tolist()

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """(B, *shape) float32 standard normals."""
        return torch.from_numpy(np.stack([self._normals(sample, purpose, shape) for sample in self.samples]))

    def _normals(self, sample: tuple[str, int], purpose: str, shape: Sequence[int]) -> np.ndarray:
        draws = self._draws(sample, purpose)
        counter = np.random.Philox(key=[draws.integer(1 << 64), draws.integer(1 << 64)])
        return np.random.Generator(counter).standard_normal(tuple(shape), dtype=np.float32)

    def _draws(self, sample: tuple[str, int], purpose: str) -> Draws:
        return Draws(self.seed, *sample, f"train:{purpose}")
