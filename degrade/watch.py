"""Are the values of a batch in [0, 1]? Asked without making the host wait for a GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch


class ValuesRefused(ValueError):
    """NaN or values outside [0, 1]; the message names the key and the values."""


def refuse_outside(images: torch.Tensor, keys: Sequence[str]) -> None:
    """Raises ValuesRefused for the first of a batch of floating-point images that is not in [0, 1]."""
    _refuse(_extremes(images), keys)


class Watch:
    """Checks the range of images: at once on the CPU, one batch late on a GPU.

    There the extremes are copied to pinned memory behind the batch's own work, and read once the device has passed
    that point: `see` never waits, `check` does.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[torch.cuda.Event, torch.Tensor, list[str]]] = deque()

    def see(self, images: torch.Tensor, keys: Sequence[str]) -> None:
        """Looks at a batch, and raises for it or for an earlier one."""
        while self._pending and self._pending[0][0].query():
            _refuse(*self._pending.popleft()[1:])
        if not images.is_floating_point():
            return
        if not images.is_cuda:
            refuse_outside(images, keys)
            return
        extremes = _extremes(images)
        copy = torch.empty(extremes.shape, dtype=extremes.dtype, pin_memory=True)
        copy.copy_(extremes, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((event, copy, list(keys)))

    def check(self) -> None:
        """Waits for every batch that was seen, and raises if one was bad."""
        while self._pending:
            event, extremes, keys = self._pending.popleft()
            event.synchronize()
            _refuse(extremes, keys)

    def __reduce__(self) -> tuple:
        return Watch, ()                     # events stay with their process


def _extremes(images: torch.Tensor) -> torch.Tensor:
    return torch.stack([images.flatten(1).amin(1), images.flatten(1).amax(1)], 1)


def _refuse(extremes: torch.Tensor, keys: Sequence[str]) -> None:
    for (low, high), key in zip(extremes.tolist(), keys, strict=True):
        if not (low >= 0 and high <= 1):
            raise ValuesRefused(f"{key}: floating-point images are in [0, 1], and this one goes from {low:g} to "
                                f"{high:g}; divide by 255, clip, or drop images with NaN")
