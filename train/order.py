"""The order of training samples: a pure function of (seed, position), with no state and no table of samples.

A position is one integer that counts samples over the whole run. From it follow, by arithmetic alone:

1. its group, so that groups are mixed by weight, evenly and exactly (`Mixture`);
2. its epoch and its number in that epoch of the group: `divmod(turn of the group, samples of the group)`;
3. its shard and its place there: an epoch permutes the shards of a group, cuts them into windows of a few,
   and permutes the samples of each window (`GroupOrder`).

So every sample comes once per epoch of its group, a run of positions touches the shards of one window (two, at a
border), and what is remembered is per shard, not per sample. Nothing here reads or writes a file.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_right
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple, TypeVar

import numpy as np

from .corpus import CorpusError

Integer = TypeVar("Integer", int, np.ndarray)
MASK = 2**64 - 1
ROUNDS = 6          # of the Feistel network; four give a pseudo-random permutation (Luby and Rackoff, 1988)
BLOCK = 1024        # positions within which groups change places; small against a window, large against a period


class OrderError(CorpusError):
    """An order that cannot be made: no samples, weights that are no weights."""


def hashed(*name: object, words: int = 1) -> tuple[int, ...]:
    """Up to eight 64-bit numbers that depend on a name alone, the same on every machine."""
    text = "\0".join(map(str, name)).encode()
    return struct.unpack(f"<{words}Q", blake2b(text, digest_size=8 * words).digest())


def scrambled(x: Integer) -> Integer:
    """The finaliser of SplitMix64 (Steele et al., 2014); for an int or a uint64 array in [0, 2**64)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


class Permutation:
    """A permutation of 0 … size - 1 by a name, computed for each number alone.

    A Feistel network over pairs of Z_a × Z_b with a·b just above `size` ("generalized Feistel", Black and Rogaway,
    2002, section 5); a number that leaves the range goes round again until it is back.
    """

    def __init__(self, size: int, *name: object) -> None:
        self.size = size
        self.a = max(1, math.isqrt(max(size - 1, 0)) + 1)
        self.b = max(1, -(-size // self.a))
        self.keys = hashed(*name, words=ROUNDS)

    def __call__(self, number: int) -> int:
        while (number := self._once(number)) >= self.size:
            pass
        return number

    def table(self) -> np.ndarray:
        """All of it: (size,) int64."""
        numbers = self._once(np.arange(self.size, dtype=np.uint64))
        while (outside := numbers >= self.size).any():
            numbers[outside] = self._once(numbers[outside])
        return numbers.astype(np.int64)

    def _once(self, number: Integer) -> Integer:
        a, b = self.a, self.b
        left, right = number // b, number % b
        for even, odd in zip(self.keys[::2], self.keys[1::2], strict=True):
            left = (left + scrambled(right ^ even) % a) % a
            right = (right + scrambled(left ^ odd) % b) % b
        return left * b + right


class Mixture:
    """Which group each position belongs to, by weight, and which turn of that group it is.

    Of the first n positions a group has n·weight / (sum of weights), to within the number of groups. The turns are
    spread evenly (Bresenham's line, group by group), and then change places within blocks of `BLOCK` positions:
    without that, a group with every 256th turn would always be the same image of a batch of 256.
    """

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        for group, weight in weights.items():
            if not (math.isfinite(weight) and weight > 0):
                raise OrderError(f"the weight of group {group!r} is {weight}: it must be above 0; a group that is not "
                                 "to be read is left out")
        if not weights:
            raise OrderError("no group to read: give at least one weight")
        exact = {group: Fraction(str(weight)) for group, weight in sorted(weights.items())}
        scale = Fraction(math.lcm(*(weight.denominator for weight in exact.values())))
        scale /= math.gcd(*(int(weight * scale) for weight in exact.values()))
        self.weights = {group: int(weight * scale) for group, weight in exact.items()}      # equal mixtures are equal
        self.total = sum(self.weights.values())
        self._block = lru_cache(64)(lambda block: Permutation(BLOCK, seed, "mixture", block))

    def __call__(self, position: int) -> tuple[str, int]:
        """(group, turn of that group) of a position."""
        if len(self.weights) == 1:
            return next(iter(self.weights)), position
        block, slot = divmod(position, BLOCK)
        rest, total = block * BLOCK + self._block(block)(slot), self.total
        for group, weight in self.weights.items():
            turns = rest * weight // total
            if (rest + 1) * weight // total > turns:
                return group, turns
            rest, total = rest - turns, total - weight
        raise AssertionError("the last group takes every position that is left")


class Window(NamedTuple):
    """A few shards of an epoch whose samples are mixed."""

    shards: list[int]
    ends: list[int]             # running sum of their samples
    permutation: Permutation


class Place(NamedTuple):
    """Where the sample of a position lies."""

    group: str
    epoch: int                  # of this group
    window: int                 # of this epoch
    shard: int                  # among the shards of the group
    index: int                  # among the samples of the shard


class GroupOrder:
    """The order of one group's samples, epoch after epoch.

    `sizes`: samples of each shard, int64. It keeps one number per shard, for the epochs that are looked at.
    """

    def __init__(self, group: str, sizes: np.ndarray, seed: int, window: int) -> None:
        self.group, self.seed, self.per_window = group, seed, window
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.samples = int(self.sizes.sum())
        if self.samples == 0:
            raise OrderError(f"group {group!r} has no samples: leave it out of the weights, or add shards to it")
        self.windows = -(-len(self.sizes) // window)
        self._epoch = lru_cache(3)(self._lay_out)
        self.window = lru_cache(8)(self._window)

    def place(self, turn: int) -> Place:
        epoch, number = divmod(turn, self.samples)
        return self.at(epoch, number)

    def at(self, epoch: int, number: int) -> Place:
        """Sample `number` of an epoch, in the order in which they come."""
        _, ends = self._epoch(epoch)
        at = bisect_right(ends, number)
        window = self.window(epoch, at)
        number = window.permutation(number - (int(ends[at - 1]) if at else 0))
        slot = bisect_right(window.ends, number)
        return Place(self.group, epoch, at, window.shards[slot], number - (window.ends[slot - 1] if slot else 0))

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of an epoch in their order, and the number of samples until the end of each window."""
        order = Permutation(len(self.sizes), self.seed, self.group, epoch, "shards").table()
        samples = np.add.reduceat(self.sizes[order], np.arange(0, len(order), self.per_window))
        return order.astype(np.int32), np.cumsum(samples)

    def _window(self, epoch: int, number: int) -> Window:
        order, _ = self._epoch(epoch)
        shards = order[number * self.per_window:(number + 1) * self.per_window]
        ends = np.cumsum(self.sizes[shards]).tolist()
        return Window(shards.tolist(), ends, Permutation(ends[-1], self.seed, self.group, epoch, number))


class Order:
    """position -> place, for several groups.

    `sizes`: for each group the samples of its shards; `weights`: how often each group comes, in any unit (a group
    without a weight is not read). Threads may share one.

    Raises:
        OrderError: a group without samples, a weight that is not above 0, a window without shards.
    """

    def __init__(self, sizes: Mapping[str, np.ndarray], weights: Mapping[str, float], seed: int = 0,
                 window: int = 16) -> None:
        if window < 1:
            raise OrderError(f"a window of {window} shards: it must hold at least 1")
        self.seed, self.mixture = seed, Mixture(weights, seed)
        self.groups = {group: GroupOrder(group, sizes[group], seed, window) for group in self.mixture.weights}

    def __call__(self, position: int) -> Place:
        if position < 0:
            raise IndexError(f"position {position}: positions count from 0")
        group, turn = self.mixture(position)
        return self.groups[group].place(turn)

    def substitute(self, position: int, attempt: int) -> Place:
        """What stands in for the sample of a position: another one of its group and epoch, by a keyed draw.

        Raises:
            OrderError: the group has one sample only.
        """
        group, turn = self.mixture(position)
        order = self.groups[group]
        if order.samples == 1:
            raise OrderError(f"group {group!r} has one sample only, so nothing can stand in for it")
        epoch, number = divmod(turn, order.samples)
        step = hashed(self.seed, position, attempt, "substitute")[0] % (order.samples - 1)
        return order.at(epoch, (number + 1 + step) % order.samples)

    def shards_ahead(self, group: str, epoch: int, window: int) -> list[int]:
        """The shards of a window and then those of the next one, in which an epoch may end."""
        order = self.groups[group]
        after = (epoch, window + 1) if window + 1 < order.windows else (epoch + 1, 0)
        return list(dict.fromkeys([*order.window(epoch, window).shards, *order.window(*after).shards]))


def rank_positions(step: int, global_batch: int, rank: int, ranks: int) -> range:
    """The positions that one rank takes of the global batch of a step.

    Raises:
        ValueError: the batch cannot be split evenly over the ranks.
    """
    if global_batch % ranks or not 0 <= rank < ranks:
        raise ValueError(f"a global batch of {global_batch} for rank {rank} of {ranks}: it must be a multiple of the "
                         "number of ranks, and ranks count from 0")
    share = global_batch // ranks
    start = step * global_batch + rank * share
    return range(start, start + share)
