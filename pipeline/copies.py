"""Clusters of near duplicates around their best item."""

from typing import NamedTuple

import numpy as np

from .near import SLICE, Pairs, check, check_same_length, join, run_starts

MAX_EDGES = 1 << 24   # pairs held at once, 8 bytes each


class Clusters(NamedTuple):
    """One row per item: who stays, and who is a copy of whom. All arrays are (N,)."""

    cluster: np.ndarray    # int64: index of the cluster's keeper; -1 for an item alone
    keeper: np.ndarray     # bool: True for the keeper of a cluster and for an item alone
    distance: np.ndarray   # uint8: Hamming distance to the keeper, in [0, max_distance]; 0 for keepers
    mirrored: np.ndarray   # bool: the item matches the mirrored picture of its keeper better than the picture


def clusters(
    hashes: np.ndarray,
    rank: np.ndarray,
    max_distance: int,
    *,
    mirrored: np.ndarray | None = None,
    threads: int = 2,
) -> Clusters:
    """Groups of near duplicates around their best item: every member is within max_distance of its keeper.

    Items are walked from the highest rank to the lowest (ties: the lower index first). An item that nobody
    claimed becomes a keeper and claims every unclaimed item within max_distance of its hash, or of its
    mirrored hash. So no keeper lies within max_distance of a better keeper. Connected components are not
    used: they chain a to b to c until pictures that share nothing are "duplicates" of each other, and the
    larger the corpus the longer the chains.

    hashes: (N,) uint64. rank: (N,) integers or floats without NaN, higher is better; with distinct ranks the
    result does not depend on the order of the items. max_distance: 0 to 16 bits. mirrored: (N,) uint64, the
    hash of each mirrored picture. Equal hashes are one point of the search, and at most MAX_EDGES pairs are
    held, however many there are: about 120 bytes of memory per item, 170 with mirrored. Raises ValueError for
    another dtype, shape or range.
    """
    check(hashes, max_distance, threads)
    check_same_length("rank", rank, hashes, None)
    if mirrored is not None:
        check_same_length("mirrored", mirrored, hashes, np.uint64)
    best_first = np.argsort(rank[::-1], kind="stable")[::-1]
    best_first = hashes.size - 1 - best_first       # reversed twice: descending, ties still by index
    best, group = _distinct_in_order(hashes[best_first])
    best = best_first[best]
    owner = _claim(hashes[best], None if mirrored is None else mirrored[best], max_distance, threads)
    keeper_of = np.empty(hashes.size, np.int64)
    keeper_of[best_first] = best[owner[group]]
    return _columns(hashes, mirrored, keeper_of)


def _columns(hashes: np.ndarray, mirrored: np.ndarray | None, keeper_of: np.ndarray) -> Clusters:
    """The public columns from the index of each item's keeper."""
    keeper = keeper_of == np.arange(keeper_of.size)
    alone = np.bincount(keeper_of, minlength=keeper_of.size)[keeper_of] == 1
    distance = np.bitwise_count(hashes ^ hashes[keeper_of])
    flipped = np.zeros(hashes.size, bool)
    if mirrored is not None:
        through_mirror = np.bitwise_count(hashes ^ mirrored[keeper_of])
        flipped = through_mirror < distance
        flipped &= ~keeper                          # a symmetric picture is not a copy of itself
        distance = np.where(flipped, through_mirror, distance)
    return Clusters(np.where(alone, -1, keeper_of), keeper, distance, flipped)


def _distinct_in_order(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each distinct value first stands, ascending, and for each row which of those is its own."""
    order = np.argsort(values)
    starts = run_starts(values[order])
    first = np.minimum.reduceat(order, starts) if values.size else order
    by_position = np.argsort(first)
    place = np.empty_like(by_position)
    place[by_position] = np.arange(place.size)
    group = np.empty(values.size, np.int64)
    group[order] = np.repeat(place, np.diff(starts, append=values.size))
    return first[by_position], group


def _claim(values: np.ndarray, mirrored: np.ndarray | None, max_distance: int, threads: int) -> np.ndarray:
    """The keeper of each value, by position; values are distinct and stand best first.

    Dense data has more pairs than memory. Then only a better part is decided, its keepers claim what they can
    of the rest (a stream that needs one number per row), and what is left, much thinner now, is tried again.
    """
    owner = np.arange(values.size)
    todo, size = owner.copy(), values.size
    while todo.size:
        head, rest = todo[:size], todo[size:]
        edges = _edges(values[head], None if mirrored is None else mirrored[head], max_distance, threads)
        if edges is None:
            size = (head.size + 1) // 2
            continue
        claims = _walk(edges, head.size)
        owner[head[claims & 0xFFFFFFFF]] = head[claims >> 32]
        if rest.size:
            keepers = head[owner[head] == head]
            best = np.full(rest.size, keepers.size)
            for source in (values, mirrored) if mirrored is not None else (values,):
                for i, j in join(source[keepers], values[rest], max_distance, threads):
                    np.minimum.at(best, j, i)
            claimed = best < keepers.size
            owner[rest[claimed]] = keepers[best[claimed]]
            rest = rest[~claimed]
        todo, size = rest, rest.size
    return owner


def _edges(values: np.ndarray, mirrored: np.ndarray | None, r: int, threads: int) -> np.ndarray | None:
    """Sorted (better << 32 | worse) of all near pairs, int64; None when there are more than MAX_EDGES."""
    parts, total = [np.empty(0, np.int64)], 0
    for better, worse in _claimable(values, mirrored, r, threads):
        parts.append(better << 32 | worse)
        total += better.size
        if total > MAX_EDGES:
            return None
    return np.sort(np.concatenate(parts))


def _claimable(values: np.ndarray, mirrored: np.ndarray | None, r: int, threads: int) -> Pairs:
    for i, j in join(values, None, r, threads):
        yield np.minimum(i, j), np.maximum(i, j)
    if mirrored is not None:
        for i, j in join(mirrored, values, r, threads):
            yield i[i < j], j[i < j]


def _walk(edges: np.ndarray, size: int) -> np.ndarray:
    """The edges by which a keeper claims: in order of the better end, so that end's own fate is known."""
    taken, claims = bytearray(size), bytearray(edges.size)
    for start in range(0, edges.size, SLICE):       # Python integers are large: a slice at a time
        part = edges[start : start + SLICE]
        for number, i, j in zip(range(start, start + part.size), (part >> 32).tolist(),
                                (part & 0xFFFFFFFF).tolist(), strict=True):
            if not taken[i] and not taken[j]:
                taken[j] = claims[number] = 1
    return edges[np.frombuffer(claims, bool)]
