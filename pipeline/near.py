"""Near duplicates: all pairs of 64-bit perceptual hashes within a Hamming distance.

The search is exact. Cut the bits into n = r + k blocks: two hashes at distance r or less agree on at least k
whole blocks, so sorting once by each choice of k blocks brings every such pair into a run of equal keys
(Manku, Jain and Das Sarma, "Detecting near-duplicates for web crawling", WWW 2007, section 3; Norouzi,
Punjani and Fleet, "Fast search in Hamming space with multi-index hashing", CVPR 2012). Three things make it
cheap in numpy:

- a table is the hashes themselves with the key's bits moved to the top. Moving bits does not change a Hamming
  distance, so a plain sort of integers is all the work and no row numbers travel with it;
- a pair is reported only by the first table that can see it, which its XOR tells: nothing has to be
  remembered;
- a run that is still long (skewed data) is the same problem with fewer bits left, solved by the same
  function.
"""

from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, islice
from math import comb
from typing import NamedTuple

import numpy as np

MAX_DISTANCE = 16     # a quarter of the bits: past this, unrelated pictures are "near" and no table helps
CHUNK = 1 << 18       # pairs looked at together: the temporaries stay in cache
SLICE = 1 << 20       # rows of a table whose runs are listed together
LONG_RUN = 1 << 22    # a run with more pairs than this is cut by its remaining bits

# Seconds per table, per row sorted, per pair in a run, per pair all against all: one AVX-512 core, numpy 2.4.
# Only the ratios matter, and only for speed.
TABLE_COST, ROW_COST, RUN_PAIR_COST, PAIR_COST = 3e-4, 2.5e-8, 2e-9, 8e-10

Pairs = Iterator[tuple[np.ndarray, np.ndarray]]


def near_pairs(
    hashes: np.ndarray,
    max_distance: int,
    *,
    queries: np.ndarray | None = None,
    threads: int = 2,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """All pairs of hashes within a Hamming distance, each exactly once, in chunks of bounded size.

    hashes: (N,) uint64. max_distance: 0 to 16 bits. queries: (N,) uint64, the hash of each mirrored picture.
    Yields (i, j, distance): int64, int64 and uint8 arrays of equal length, in no particular order. Without
    queries i < j and the distance is between hashes[i] and hashes[j]; with them i != j and it is between
    queries[i] and hashes[j]. threads - 1 of the threads sort tables ahead while the caller's compares; a
    table takes 8 N bytes (16 N with queries) and there are up to threads + 1. N equal hashes are N (N - 1) /
    2 pairs: where that matters use `clusters`, or ask about the distinct hashes. Raises ValueError for
    another dtype, shape or range.
    """
    check(hashes, max_distance, threads)
    if queries is not None:
        check_same_length("queries", queries, hashes, np.uint64)
    return _measured(hashes, queries, max_distance, threads)


def _measured(hashes, queries, max_distance, threads):
    left, right = (hashes, None) if queries is None else (queries, hashes)
    for i, j in join(left, right, max_distance, threads):
        if queries is None:
            i, j = np.minimum(i, j), np.maximum(i, j)
        else:
            others = i != j
            i, j = i[others], j[others]
        if i.size:
            yield i, j, np.bitwise_count(left[i] ^ hashes[j])


def join(left: np.ndarray, right: np.ndarray | None, r: int, threads: int) -> Pairs:
    """Positions (i, j) with hamming(left[i], right[j]) <= r; without right, each pair within left once."""
    other = left if right is None else right
    if not (left.size and other.size):
        return
    bits, weights = _varying_bits(left, other)
    k = _choose_key(weights, left.size + (0 if right is None else right.size), left.size * other.size, r)
    if k == 0:
        yield from _all_pairs(left, right, r)
        return
    blocks = _blocks(bits, weights, r + k)
    a = _Distinct(left, blocks)
    b = a if right is None else _Distinct(right, blocks)
    if right is None:
        yield from a.equal_pairs()
    for table in _sorted_tables(a, b, blocks, k, threads):
        for x, y in table.matches(r):
            yield from _expand(a, np.searchsorted(a.values, x), b, np.searchsorted(b.values, y))


def _varying_bits(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bits in which any two values differ, and each one's worth in a key: -log2 P(a random pair agrees)."""
    ones = int(np.bitwise_or.reduce(left) | np.bitwise_or.reduce(right))
    zeros = int(~np.bitwise_and.reduce(left) | ~np.bitwise_and.reduce(right))
    bits = np.array([bit for bit in range(64) if (ones & zeros) >> bit & 1], np.uint64)
    p, q = (_sample(v, bits).mean(0) for v in (left, right))
    return bits, -np.log2(np.maximum(p * q + (1 - p) * (1 - q), 0.25))


def _sample(values: np.ndarray, bits: np.ndarray) -> np.ndarray:
    return (values[:: values.size // 4096 + 1, None] >> bits) & np.uint64(1)


def _choose_key(weights: np.ndarray, rows: int, pairs: int, r: int) -> int:
    """How many of r + k blocks make a key; 0: all against all. Longer keys: more tables, shorter runs."""
    best, choice, k = pairs * PAIR_COST, 0, 1
    while r + k <= weights.size and comb(r + k, k) * (TABLE_COST + rows * ROW_COST) < best:
        agree = 2.0 ** (-weights.sum() * k / (r + k))
        cost = comb(r + k, k) * (TABLE_COST + rows * ROW_COST + pairs * agree * RUN_PAIR_COST)
        if cost < best:
            best, choice = cost, k
        k += 1
    return choice


def _blocks(bits: np.ndarray, weights: np.ndarray, count: int) -> list[list[int]]:
    """The bits dealt to blocks of about equal worth, the most telling first."""
    blocks, load = [[] for _ in range(count)], np.zeros(count)
    for number in np.argsort(-weights, kind="stable"):
        lightest = int(np.argmin(load))
        blocks[lightest].append(int(bits[number]))
        load[lightest] += weights[number] + 1e-9    # a bit of no measured worth still has to be spread
    return blocks


def _move_bits(values: np.ndarray, sources: list[int]) -> np.ndarray:
    """Values whose bit t is bit sources[t] of the given ones."""
    masks = defaultdict(int)
    for target, source in enumerate(sources):
        masks[target - source] |= 1 << source
    moved = np.zeros_like(values)
    for start in range(0, values.size, CHUNK // 4):
        part, out = values[start : start + CHUNK // 4], moved[start : start + CHUNK // 4]
        for shift, mask in masks.items():
            chosen = part & np.uint64(mask)
            out |= chosen << np.uint64(shift) if shift >= 0 else chosen >> np.uint64(-shift)
    return moved


class _Distinct:
    """Values with their bits laid out block by block, each once and sorted, and the rows that hold each."""

    def __init__(self, values: np.ndarray, blocks: list[list[int]]):
        laid = _move_bits(values, [bit for block in blocks for bit in block])
        self.order = np.argsort(laid)
        laid = laid[self.order]
        starts = run_starts(laid)
        self.values = laid if starts.size == laid.size else laid[starts]
        self.bounds = np.append(starts, laid.size)

    def equal_pairs(self) -> Pairs:
        start, stop = self.bounds[:-1], self.bounds[1:]
        shared = np.flatnonzero(stop - start > 1)
        for group, at in _spans(start[shared], stop[shared]):
            for row, other in _spans(at + 1, stop[shared[group]]):
                yield self.order[at[row]], self.order[other]


def _expand(a: _Distinct, p: np.ndarray, b: _Distinct, q: np.ndarray) -> Pairs:
    """Pairs of rows from pairs of distinct values."""
    if a.values.size == a.order.size and b.values.size == b.order.size:
        yield a.order[p], b.order[q]
        return
    for pair, i in _spans(a.bounds[p], a.bounds[p + 1]):
        other = q[pair]
        for row, j in _spans(b.bounds[other], b.bounds[other + 1]):
            yield a.order[i[row]], b.order[j]


class _Table(NamedTuple):
    a: np.ndarray               # sorted, the key's bits on top
    b: np.ndarray | None        # the other side; None: pairs within a
    shift: int                  # bits below the key
    restore: list[int]          # the way back to the order of the blocks
    earlier: list[int]          # masks of blocks: where one of them agrees, an earlier table has the pair

    def matches(self, r: int) -> Pairs:
        """Pairs of values in the order of the blocks: equal keys, within r, in no earlier table."""
        for x, y in _in_runs(self.a, self.b, self.shift, r):
            new = np.ones(x.size, bool)
            for mask in self.earlier:
                new &= (x ^ y) & np.uint64(mask) != 0
            if new.any():
                yield _move_bits(x[new], self.restore), _move_bits(y[new], self.restore)


def _sorted_tables(a: _Distinct, b: _Distinct, blocks: list, k: int, threads: int) -> Iterator[_Table]:
    """One table per choice of k blocks, sorted ahead by the other threads (numpy's sort releases the GIL)."""
    keys = combinations(range(len(blocks)), k)
    if threads == 1:
        yield from (_table(a, b, blocks, key) for key in keys)
        return
    pool, ahead = ThreadPoolExecutor(threads - 1), deque()
    try:
        while True:
            for key in islice(keys, threads - len(ahead)):
                ahead.append(pool.submit(_table, a, b, blocks, key))
            if not ahead:
                return
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)     # the caller may stop early


def _table(a: _Distinct, b: _Distinct, blocks: list[list[int]], key: tuple[int, ...]) -> _Table:
    sources, place, masks = [], np.cumsum([0] + [len(block) for block in blocks]), {}
    for number in [*(n for n in range(len(blocks)) if n not in key), *key]:
        masks[number] = (1 << len(blocks[number])) - 1 << len(sources)
        sources += range(place[number], place[number + 1])
    tables = [_move_bits(side.values, sources) for side in ((a,) if a is b else (a, b))]
    for table in tables:
        table.sort()
    # Tables come in lexicographic order of their keys, so a pair is new here when its first k agreeing blocks
    # are the key: of the blocks before the key's last one, only the key's own agree.
    earlier = [masks[number] for number in range(key[-1]) if number not in key]
    shift = len(sources) - sum(len(blocks[number]) for number in key)
    return _Table(tables[0], None if a is b else tables[1], shift, np.argsort(sources).tolist(), earlier)


def _in_runs(a: np.ndarray, b: np.ndarray | None, shift: int, r: int) -> Pairs:
    """Pairs of values of sorted tables that agree above `shift` and lie within r."""
    start = 0
    while start < a.size:
        stop = _run_end(a, min(start + SLICE, a.size) - 1, shift)
        part = a[start:stop]
        keys = part >> np.uint64(shift)
        first = run_starts(keys)
        low, keys = np.uint64((1 << shift) - 1), keys[first] << np.uint64(shift)
        length = np.diff(first, append=part.size)
        begin = first if b is None else np.searchsorted(b, keys)
        end = first + length if b is None else np.searchsorted(b, keys | low, side="right")
        other = part if b is None else b
        long = length * (end - begin) > LONG_RUN
        for run in np.flatnonzero(long):
            x, y = part[first[run] : first[run] + length[run]], other[begin[run] : end[run]]
            for i, j in join(x, None if b is None else y, r, 1):
                yield x[i], y[j]
        end = np.repeat(np.where(long, 0, end), length)
        begin = np.arange(1, part.size + 1) if b is None else np.repeat(begin, length)
        for i, j in _spans(begin, end):
            x, y = part[i], other[j]
            near = np.flatnonzero(np.bitwise_count(x ^ y) <= r)
            if near.size:
                yield x[near], y[near]
        start = stop


def run_starts(values: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.concatenate((np.ones(min(values.size, 1), bool), values[1:] != values[:-1])))


def _run_end(table: np.ndarray, row: int, shift: int) -> int:
    """One past the last row with the key of this row."""
    return int(np.searchsorted(table, table[row] | np.uint64((1 << shift) - 1), side="right"))


def _spans(start: np.ndarray, stop: np.ndarray) -> Pairs:
    """(row, n) for each row and each n in [start[row], stop[row]), CHUNK of them at a time."""
    count = np.maximum(stop - start, 0)
    ends = np.cumsum(count)
    offset = start - (ends - count)
    for low in range(0, int(ends[-1]) if ends.size else 0, CHUNK):
        high = min(low + CHUNK, int(ends[-1]))
        first, last = np.searchsorted(ends, (low, high - 1), side="right")
        rows = np.arange(first, last + 1)
        times = np.diff(np.minimum(ends[rows], high), prepend=low)
        yield np.repeat(rows, times), np.repeat(offset[rows], times) + np.arange(low, high)


def _all_pairs(left: np.ndarray, right: np.ndarray | None, r: int) -> Pairs:
    """Every pair compared, a tile at a time: for few rows, or where no key tells them apart."""
    other = left if right is None else right
    width = min(other.size, 4096)
    height = CHUNK // width
    for top in range(0, left.size, height):
        for begin in range(top // width * width if right is None else 0, other.size, width):
            tile = left[top : top + height, None] ^ other[begin : begin + width]
            i, j = np.divmod(np.flatnonzero(np.bitwise_count(tile) <= r), tile.shape[1])
            i, j = i + top, j + begin
            if right is None:
                i, j = i[i < j], j[i < j]
            if i.size:
                yield i, j


def check(hashes: np.ndarray, max_distance: int, threads: int) -> None:
    if not isinstance(hashes, np.ndarray) or hashes.dtype != np.uint64 or hashes.ndim != 1:
        raise ValueError(f"hashes must be a (N,) uint64 array, not {_describe_array(hashes)}")
    if not isinstance(max_distance, int | np.integer) or not 0 <= max_distance <= MAX_DISTANCE:
        raise ValueError(f"max_distance must be an integer from 0 to {MAX_DISTANCE}, not {max_distance!r}")
    if not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads must be an integer of at least 1, not {threads!r}")


def check_same_length(name: str, values: np.ndarray, hashes: np.ndarray, dtype: type | None) -> None:
    kind = "uint64" if dtype else "integer or float"
    wanted = f"a ({hashes.size},) {kind} array like hashes"
    fits = isinstance(values, np.ndarray) and values.shape == hashes.shape
    if not fits or (values.dtype != dtype if dtype else values.dtype.kind not in "iuf"):
        raise ValueError(f"{name} must be {wanted}, not {_describe_array(values)}")
    if values.dtype.kind == "f" and np.isnan(values).any():
        raise ValueError(f"{name}[{int(np.isnan(values).argmax())}] is NaN: give every item a number")


def _describe_array(values: object) -> str:
    return f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
