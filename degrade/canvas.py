"""A batch of images of different sizes in one tensor, for the torch route.

The sizes are known on the host, because they are drawn there: no operator has to ask the device for anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Canvas:
    """Images in the top left corners of a tensor; what lies beyond their sizes means nothing."""

    pixels: torch.Tensor                # (B, C, H, W) float32 in grey levels, 0 to 255
    heights: tuple[int, ...]
    widths: tuple[int, ...]

    def upload(self, values: Sequence | np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Numbers from the host as a tensor beside the pixels, without waiting for the device."""
        tensor = torch.as_tensor(np.asarray(values)).to(dtype)
        if self.pixels.is_cuda:
            return tensor.pin_memory().to(self.pixels.device, non_blocking=True)
        return tensor.to(self.pixels.device)

    def column(self, values: Sequence[float]) -> torch.Tensor:
        """A number per sample, (B, 1, 1, 1)."""
        return self.upload(np.asarray(values, np.float32)).view(-1, 1, 1, 1)

    def with_pixels(self, pixels: torch.Tensor) -> Canvas:
        return Canvas(pixels, self.heights, self.widths)

    def take(self, samples: Sequence[int]) -> Canvas:
        """Some of the samples, cropped to the largest of them."""
        if list(samples) == list(range(len(self.heights))):
            return self
        heights, widths = (tuple(sizes[i] for i in samples) for sizes in (self.heights, self.widths))
        pixels = self.pixels[:, :, :max(heights), :max(widths)]
        return Canvas(pixels.index_select(0, self.upload(samples, torch.int64)), heights, widths)

    def put(self, samples: Sequence[int], part: Canvas) -> Canvas:
        """The batch with some of its samples replaced."""
        if len(samples) == len(self.heights):
            return part
        heights, widths = list(self.heights), list(self.widths)
        for i, height, width in zip(samples, part.heights, part.widths, strict=True):
            heights[i], widths[i] = height, width
        rest = self.pixels[:, :, :max(heights), :max(widths)]
        pixels = rest.new_zeros(*rest.shape[:2], max(heights), max(widths))
        pixels[:, :, :rest.shape[2], :rest.shape[3]] = rest
        target = pixels[:, :, :part.pixels.shape[2], :part.pixels.shape[3]]
        target.index_copy_(0, self.upload(samples, torch.int64), part.pixels[:, :, :target.shape[2], :target.shape[3]])
        return Canvas(pixels, tuple(heights), tuple(widths))

    def padded(self, top: int, bottom: int, left: int, right: int, border: str) -> torch.Tensor:
        """The pixels with a border that continues each sample at its own edge: "reflect" (101) or "replicate"."""
        pixels = gather(self.pixels, 2, self._indices(self.heights, -top, self.pixels.shape[2] + bottom, border))
        return gather(pixels, 3, self._indices(self.widths, -left, self.pixels.shape[3] + right, border))

    def last_row_repeated(self) -> Canvas:
        """What lies below each sample is its last row."""
        return self.with_pixels(gather(self.pixels, 2, self._indices(self.heights, 0, self.pixels.shape[2],
                                                                     "replicate")))

    def _indices(self, sizes: tuple[int, ...], start: int, stop: int, border: str) -> torch.Tensor:
        last = self.upload(sizes, torch.int64)[:, None] - 1
        place = torch.arange(start, stop, device=self.pixels.device)
        if border == "replicate":
            return torch.minimum(place.clamp(min=0), last)
        period = (2 * last).clamp(min=1)                  # a single row is its own reflection
        place = place % period
        return torch.minimum(torch.minimum(place, period - place), last)


def gather(pixels: torch.Tensor, axis: int, places: torch.Tensor) -> torch.Tensor:
    """Rows (axis 2) or columns (axis 3) by number, per sample: places (B, N) -> N rows or columns."""
    shape = list(pixels.shape)
    shape[axis] = places.shape[1]
    view = places[:, None, :, None] if axis == 2 else places[:, None, None, :]
    return pixels.gather(axis, view.expand(shape))
