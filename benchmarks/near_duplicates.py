"""Near-duplicate search at corpus size: time, memory, recall, and a ratio to faiss's multi-index hashing.

    python benchmarks/near_duplicates.py [--count 20000000] [--distance 4]

The hashes are random, with 5% planted copies at 0 to `distance` flipped bits and 1% identical ones. Pairs are
searched between distinct hashes: the identical ones alone are 2e10 pairs. Clusters take all hashes; their
column "pairs" counts members that are not kept. Peak memory is that of the whole process so far.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable

import numpy as np

from pipeline.copies import clusters
from pipeline.near import near_pairs

try:
    import faiss
except ImportError:
    faiss = None

ROW = "{:<26}{:>12}{:>5}{:>10}{:>17}{:>9}{:>9}{:>10}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--count", type=int, default=20_000_000, help="hashes")
    options.add_argument("--distance", type=int, default=4, help="bits, 0 to 16")
    options.add_argument("--reference-count", type=int, default=500_000, help="hashes given to faiss too")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--mirrored", action="store_true", help="clusters also match mirrored hashes")
    chosen = options.parse_args()
    r, threads = chosen.distance, chosen.threads
    print(ROW.format("search", "count", "r", "pairs", "planted", "wall s", "CPU s", "peak GB"))
    report_search("near_pairs", chosen.count, r, lambda hashes: found_by_near_pairs(hashes, r, threads))
    report_clusters(chosen.count, r, threads, chosen.mirrored)
    if faiss is None:
        print("faiss is not installed: no reference. `uv pip install faiss-cpu` adds it")
        return
    faiss.omp_set_num_threads(threads)
    count = min(chosen.count, chosen.reference_count)
    own, pairs = report_search("near_pairs", count, r, lambda hashes: found_by_near_pairs(hashes, r, threads))
    name = f"faiss {faiss.__version__} MultiHash"
    reference, same = report_search(name, count, r, lambda hashes: found_by_faiss(hashes, r))
    verdict = "the same pairs" if np.array_equal(pairs, same) else "DIFFERENT pairs"
    print(f"near_pairs is {reference / own:.1f} times as fast as faiss at {count} hashes, {verdict}")


def planted_hashes(count: int, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random hashes (count,) uint64 whose last rows are copies; the rows of each original and of its copy."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    hashes[: count // 100] = hashes[:1]
    copy = np.arange(count - count // 20, count)
    original = rng.integers(0, count - copy.size, copy.size)
    hashes[copy] = hashes[original]
    flips = rng.integers(0, r + 1, copy.size)
    for flip in range(r):
        bit = np.uint64(1) << rng.integers(0, 64, copy.size, dtype=np.uint64)
        hashes[copy] ^= np.where(flip < flips, bit, np.uint64(0))
    return hashes, original, copy


def found_by_near_pairs(distinct: np.ndarray, r: int, threads: int) -> np.ndarray:
    found = [i << 32 | j for i, j, _ in near_pairs(distinct, r, threads=threads)]
    return np.concatenate([np.empty(0, np.int64), *found])   # a plain [] would round the keys to float64


def found_by_faiss(distinct: np.ndarray, r: int) -> np.ndarray:
    """With 3 hashes of 21 bits one of them differs in at most r // 3 bits: the setting is exact."""
    index = faiss.IndexBinaryMultiHash(64, 3, 21)
    index.nflip = r // 3
    codes = distinct.view(np.uint8).reshape(-1, 8)
    index.add(codes)
    found = []
    for start in range(0, len(codes), 100_000):
        limits, _, j = index.range_search(codes[start : start + 100_000], r + 1)   # strictly below the radius
        i = np.repeat(np.arange(start, start + limits.size - 1), np.diff(limits).astype(np.int64))
        found.append((i << 32 | j)[i < j])
    return np.concatenate(found)


def report_search(
    name: str, count: int, r: int, search: Callable[[np.ndarray], np.ndarray]
) -> tuple[float, np.ndarray]:
    """Prints a row; gives the seconds and the pairs of distinct hashes as sorted (i << 32 | j)."""
    hashes, original, copy = planted_hashes(count, r)
    distinct = np.sort(hashes)
    distinct = distinct[np.append(True, distinct[1:] != distinct[:-1])]
    clock = time.perf_counter(), time.process_time()
    found = np.sort(search(distinct))
    times = time.perf_counter() - clock[0], time.process_time() - clock[1]
    i, j = np.searchsorted(distinct, hashes[original]), np.searchsorted(distinct, hashes[copy])
    planted = np.minimum(i, j) << 32 | np.maximum(i, j)
    recalled = int(((i == j) | np.isin(planted, found)).sum())
    print_row(name, count, r, found.size, f"{recalled}/{copy.size}", times)
    if recalled < copy.size:
        sys.exit(f"{name} missed {copy.size - recalled} planted pairs")
    return times[0], found


def report_clusters(count: int, r: int, threads: int, mirrored: bool) -> None:
    """Members instead of pairs; a planted copy counts as found when it and its original are not both kept."""
    hashes, original, copy = planted_hashes(count, r)
    rng = np.random.default_rng(1)
    mirrors = rng.integers(0, 2**64, count, dtype=np.uint64) if mirrored else None
    rank = rng.permutation(count)
    clock = time.perf_counter(), time.process_time()
    result = clusters(hashes, rank, r, mirrored=mirrors, threads=threads)
    times = time.perf_counter() - clock[0], time.process_time() - clock[1]
    recalled = int((~(result.keeper[original] & result.keeper[copy])).sum())
    members, name = int((~result.keeper).sum()), "clusters, mirrored" if mirrored else "clusters"
    print_row(name, count, r, members, f"{recalled}/{copy.size}", times)
    if recalled < copy.size or int(result.distance.max()) > r:
        sys.exit("clusters kept both ends of a planted pair, or has a member too far from its keeper")


def print_row(name: str, count: int, r: int, pairs: int, planted: str, times: tuple[float, float]) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20    # Linux counts KiB
    print(ROW.format(name, count, r, pairs, planted, *map("{:.1f}".format, times), f"{peak:.2f}"), flush=True)


if __name__ == "__main__":
    main()
