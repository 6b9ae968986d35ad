"""Crops: what becomes of some positions of a corpus, whichever process works them out.

Every draw is named by (seed, key, epoch, purpose), so that a micro-batch is the same in each process, at each size of
micro-batch and after each restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch

from degrade.degrader import SecondOrderDegrader
from degrade.keyed import Draws
from degrade.recipe import Recipe
from pipeline.decode import decode

from .corpus import Corpus
from .reader import Reader, Reading, Sample


@dataclass
class Batch:
    """A micro-batch: B crops with their low-quality partners, on one device."""

    positions: list[int]
    keys: list[str]
    epochs: list[int]                       # of the sample's group
    groups: list[str]
    texts: list[str]                        # captions, "" where there is none
    hq: torch.Tensor                        # (B, 3, crop, crop) uint8
    lq: torch.Tensor | None                 # the same; None without a recipe
    # (B, 6) float32: height and width of the image, top and left of the crop, height and width of the crop; SDXL's
    # order of micro-conditioning. Of a flipped image, left counts after flipping.
    sizes: torch.Tensor
    replaced: list[str | None]              # key of the damaged sample in whose place each one is
    reasons: list[str | None]               # what was wrong with that one
    degradation: list[dict[str, Any]] | None    # the parameters of each lq, as `SecondOrderDegrader.draw` gives them

    def __len__(self) -> int:
        return len(self.positions)

    def _each(self, change: Any) -> Batch:
        lq = None if self.lq is None else change(self.lq)
        return replace(self, hq=change(self.hq), lq=lq, sizes=change(self.sizes))

    def to(self, device: torch.device) -> Batch:
        """On a device; from pinned memory without waiting for the copy."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:          # DataLoader calls this
        return self._each(torch.Tensor.pin_memory)

    def share_memory(self) -> Batch:
        """With the tensors in shared memory, where other processes can take them."""
        return self._each(torch.Tensor.share_memory_)


@dataclass(frozen=True)
class LargeEnough:
    """Decodes an image of which a crop can be taken."""

    crop: int

    def __call__(self, data: bytes) -> np.ndarray:
        """(H, W, 3) uint8. Raises ValueError: no image (as `decode`), or one smaller than the crop."""
        pixels = decode(data)
        height, width = pixels.shape[:2]
        if min(height, width) < self.crop:
            raise ValueError(f"an image of {height} x {width} pixels is smaller than the crop of {self.crop}; lower "
                             "data.crop, or select larger tiles")
        return pixels


class Crops:
    """`crops(positions)` is the micro-batch of some positions, on the CPU.

    With a recipe the parameters of each degradation are drawn here; with `degrade` they are applied here too, by the
    CPU route, and otherwise `lq` is left to who has a faster device.
    """

    def __init__(self, corpus: Corpus, reading: Reading, seed: int, *, crop: int, flip: bool, recipe: Recipe | None,
                 degrade: bool) -> None:
        self.reader = Reader(corpus, reading, LargeEnough(crop))
        self.seed, self.crop, self.flip, self.degrade = seed, crop, flip, degrade
        self.degrader = SecondOrderDegrader(recipe, seed) if recipe else None

    def __call__(self, positions: Sequence[int]) -> Batch:
        """Raises as `Reader`."""
        samples = [self.reader[position] for position in positions]
        hq = torch.empty((len(samples), 3, self.crop, self.crop), dtype=torch.uint8)
        sizes = torch.empty((len(samples), 6))
        for sample, planes, size in zip(samples, hq.numpy(), sizes, strict=True):
            pixels, place = self._cropped(sample)
            cv2.split(pixels, list(planes))         # OpenCV: a tenth of the time that torch takes to flip and permute
            size.copy_(torch.tensor(place))
        drawn = self.degrader and [self.degrader.draw(sample.key, (self.crop, self.crop), sample.epoch)
                                   for sample in samples]
        lq = self.degrader.apply(hq, drawn) if drawn and self.degrade else None
        return Batch([sample.position for sample in samples], [sample.key for sample in samples],
                     [sample.epoch for sample in samples], [sample.group for sample in samples],
                     [sample.text or "" for sample in samples], hq, lq, sizes,
                     [sample.replaced for sample in samples], [sample.reason for sample in samples], drawn)

    def _cropped(self, sample: Sample) -> tuple[np.ndarray, tuple[int, ...]]:
        """(crop, crop, 3) uint8 of a sample, and the row of `Batch.sizes`."""
        draws, (height, width) = Draws(self.seed, sample.key, sample.epoch, "crop"), sample.decoded.shape[:2]
        top, left = draws.integer(height - self.crop + 1), draws.integer(width - self.crop + 1)
        flipped = self.flip and draws.chance(0.5)
        start = width - self.crop - left if flipped else left
        pixels = sample.decoded[top:top + self.crop, start:start + self.crop]
        return cv2.flip(pixels, 1) if flipped else pixels, (height, width, top, left, self.crop, self.crop)
