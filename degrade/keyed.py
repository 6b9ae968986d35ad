"""Every random draw has a name: numbers that are functions of (seed, key, epoch, purpose) and of nothing else.

There is no generator state: a cryptographic hash of the name serves as the counter-based generator, so a draw is the
same on every machine, in every process and at every position of a batch, and adding a draw changes no other.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import TypeVar

import numpy as np
import torch
from scipy import special

Value = TypeVar("Value")
Array = TypeVar("Array", np.ndarray, torch.Tensor)
BANK = 1 << 21          # normals in each of two rings; a 512-pixel RGB image takes 0.8 million
MARGIN = 1 << 20        # how many of them stand at the end again
STEPS = 4096            # of one standard deviation


class Draws:
    """The uniform numbers of one purpose, in the order in which they are asked for."""

    def __init__(self, seed: int, key: str, epoch: int, purpose: str) -> None:
        self._name = f"{seed}\0{key}\0{epoch}\0{purpose}\0".encode()
        self._block = 0
        self._numbers: list[int] = []

    def _next(self) -> int:
        if not self._numbers:
            digest = blake2b(self._name + struct.pack("<I", self._block)).digest()
            self._numbers = list(struct.unpack("<8Q", digest))
            self._block += 1
        return self._numbers.pop()

    def unit(self) -> float:
        """Uniform in [0, 1), 53 bits."""
        return (self._next() >> 11) * 2.0 ** -53

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.unit()

    def integer(self, count: int) -> int:
        """Uniform in 0 … count - 1 (bias below count / 2**64)."""
        return self._next() % count

    def chance(self, probability: float) -> bool:
        return self.unit() < probability

    def choice(self, values: Sequence[Value] | Mapping[Value, float]) -> Value:
        """One of a sequence, each as likely; or one of a mapping, by weight."""
        if not isinstance(values, Mapping):
            return values[self.integer(len(values))]
        at = self.unit() * math.fsum(values.values())
        possible = [(value, weight) for value, weight in values.items() if weight]
        for value, weight in possible:
            at -= weight
            if at < 0:
                return value
        return possible[-1][0]               # rounding of the sum

    def field(self) -> list[int]:
        """Names a field of normals: see `normals`."""
        return [self.integer(BANK), self.integer(BANK - 1)]


@functools.cache
def banks() -> tuple[np.ndarray, np.ndarray]:
    """Two rings of standard normals in steps of 1/4096, int16, the same in every process and version.

    2**21 and 2**21 - 1 numbers, then the beginning once more, so that most runs are slices. The raw output of a bit
    generator is guaranteed by numpy, its distributions are not; hence the quantiles here.
    """
    raw = np.random.Philox(key=0xC1EA25AA4D).random_raw(2 * BANK)
    normal = special.ndtri(((raw >> np.uint64(11)) + 0.5) * 2.0 ** -53)
    steps = np.rint(normal * STEPS).astype(np.int16)
    return tuple(np.concatenate([ring, ring[:MARGIN]]) for ring in (steps[:BANK], steps[BANK:-1]))


def windows(field: Sequence[int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The two runs of `count` normals whose sum, times sqrt(1/2) / STEPS, is the field: (count,) int16 each.

    One run would repeat with the bank, and two samples whose runs overlap would share noise. The sum of two, from
    rings whose lengths have no common divisor, has 4e12 different fields and repeats after 4e12.
    """
    return tuple(run(ring, start, count) for ring, start in zip(banks(), field, strict=True))


def run(ring: Array, start: int, count: int) -> Array:
    """`count` numbers of a ring from `start` on; a ring ends in MARGIN numbers of its beginning."""
    if start + count <= len(ring):
        return ring[start:start + count]
    round_trip = ring[:len(ring) - MARGIN]
    pieces, left = [round_trip[start:]], count - (len(round_trip) - start)
    while left > 0:
        pieces.append(round_trip[:left])
        left -= len(round_trip)
    return (np.concatenate if isinstance(ring, np.ndarray) else torch.cat)(pieces)
