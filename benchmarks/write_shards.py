"""How fast tars are written, against a plain write of the same bytes.

    python benchmarks/write_shards.py [--samples 600] [--bytes 880000] [--reps 5] [--fsync] [--folder DIR]

Every way writes the same samples (JPEG, JSON, text) to one new file and renames it. The reference (1.00) is
one writev of each sample's payload, without headers, hashes or index. `TarWriter` also hashes every member
and the whole tar and writes the Parquet index that `pipeline.shards` lays beside it; the others do not.
The ways take turns, the best of each counts. Payloads lie in memory, and the files in the page cache:
with --fsync a second table counts the time until they are on the disk.
"""

import argparse
import io
import json
import os
import random
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import webdataset

from pipeline.shards import index_bytes
from pipeline.tar import TarWriter

Sample = list[tuple[str, bytes]]


def payload(samples: int, size: int) -> list[Sample]:
    """Samples of random bytes, about `size` bytes each, with the three members that ours have."""
    generator = random.Random(0)
    result = []
    for number in range(samples):
        key = f"{generator.getrandbits(128):032x}-{number}-0-1024x1024"
        provenance = {"key": key, "uri": f"file:///photos/{key}.jpg", "scores": {"sharpness": 12.5, "noise": 0.75}}
        result.append([(f"{key}.jpg", generator.randbytes(size + generator.randrange(-512, 512))),
                       (f"{key}.txt", b"A photograph of a quiet harbour at dusk. " * 8),
                       (f"{key}.json", json.dumps(provenance | {"text": "x" * 600}).encode())])
    return result


def plain(path: Path, samples: list[Sample]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    for sample in samples:
        os.writev(descriptor, [data for _, data in sample])
    os.close(descriptor)


def ours(path: Path, samples: list[Sample]) -> None:
    with TarWriter(str(path)) as writer:
        for sample in samples:
            writer.add(sample)
    path.with_name(f"{path.name}.index.parquet").write_bytes(index_bytes(writer, "0" * 12))


def by_tarfile(path: Path, samples: list[Sample]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for name, data in sample:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def by_webdataset(path: Path, samples: list[Sample]) -> None:
    options = {"maxsize": 1e15, "maxcount": 10**9, "encoder": False, "verbose": 0}
    with webdataset.ShardWriter(f"{path}%.0s", **options) as writer:    # %.0s: the pattern must take a number
        for sample in samples:
            writer.write({"__key__": sample[0][0].partition(".")[0]}
                         | {name.partition(".")[2]: data for name, data in sample})


WAYS: dict[str, Callable[[Path, list[Sample]], None]] = {
    "plain writev (reference)": plain, "TarWriter, hashes and index": ours, "tarfile": by_tarfile,
    "webdataset.ShardWriter": by_webdataset,
}


def timed(way: Callable[[Path, list[Sample]], None], samples: list[Sample], folder: str, fsync: bool) -> float:
    """Seconds from the first byte to the name under which the file stays."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "new.tar"
        begin = time.perf_counter()
        way(path, samples)
        if fsync:
            for file in Path(scratch).iterdir():
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
        path.rename(path.with_name("hq-000000.tar"))
        return time.perf_counter() - begin


def table(samples: list[Sample], folder: str, reps: int, fsync: bool) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(reps):
        for name, way in WAYS.items():
            seconds[name].append(timed(way, samples, folder, fsync))
    total = sum(len(data) for sample in samples for _, data in sample)
    reference = min(seconds["plain writev (reference)"])
    title = "with fsync" if fsync else "without fsync"
    print(f"{title:30} {'MB/s':>7} {'samples/s':>10} {'of plain':>9} {'median':>7}")
    for name, each in seconds.items():
        best, median = min(each), sorted(each)[len(each) // 2]
        middle = sorted(seconds["plain writev (reference)"])[reps // 2] / median
        print(f"{name:30} {total / best / 1e6:7.0f} {len(samples) / best:10.0f} {reference / best:9.2f} {middle:7.2f}")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--bytes", type=int, default=880_000, help="of the image of one sample")
    parser.add_argument("--reps", type=int, default=5, help="turns of every way; the best counts")
    parser.add_argument("--fsync", action="store_true", help="a second table with fsync before the rename")
    parser.add_argument("--folder", default=None, help="where to write; default: the temporary folder")
    options = parser.parse_args()
    samples = payload(options.samples, options.bytes)
    print(f"{options.samples} samples, best of {options.reps}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for fsync in [False, True] if options.fsync else [False]:
        table(samples, options.folder, options.reps, fsync)


if __name__ == "__main__":
    main()
