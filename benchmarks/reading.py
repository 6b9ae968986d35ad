"""How fast samples are read in training order, against plain reads of the same bytes and against webdataset.

    python benchmarks/reading.py [--samples 600] [--side 1024] [--shards 4] [--reps 3] [--folder DIR]

Every way reads each sample of the same shards once, in one thread, out of the page cache; with `decode`, cv2 makes
pixels of each image. The reference (1.00) of both tables is a loop of `os.pread` over the ranges of the samples, in the
order in which the reader takes them, from files that are open already; it checks, splits and parses nothing.
webdataset reads whole tars from front to back (`shuffle`: with its buffer of 1000). The ways take turns, the best of
each counts.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import webdataset

from pipeline.shards import index_bytes
from pipeline.tar import TarWriter
from train import Corpus, Reader, Reading
from train.corpus import Index


def write(folder: Path, samples: int, shards: int, side: int) -> None:
    """Shards of noise that a JPEG encoder makes about as large as photographs, with caption and JSON."""
    rng, said = np.random.default_rng(0), {}
    for number in range(shards):
        name = f"hq-{number:06d}"
        with TarWriter(str(folder / f"{name}.tar")) as writer:
            for sample in range(number, samples, shards):
                coarse = rng.integers(0, 256, (side // 4, side // 4, 3), np.uint8)
                pixels = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
                data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
                key = f"{sample:032x}"
                writer.add([(f"{key}.jpg", data), (f"{key}.txt", b"A quiet harbour at dusk. " * 16),
                            (f"{key}.json", json.dumps({"key": key, "text": "x" * 600}).encode())])
        (folder / f"{name}.index.parquet").write_bytes(index_bytes(writer, "0" * 12))
        said[name] = {"samples": len(writer.members) // 3, "bytes": writer.size, "xxh3": writer.xxh3}
    (folder / "corpus.json").write_text(json.dumps({"shards": said}))


def pixels(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)


class Plain:
    """The reference: ranges that are known beforehand, in the reader's order."""

    def __init__(self, corpus: Corpus, reader: Reader, samples: int) -> None:
        self.ranges = []
        files = [os.open(shard.folder.local + f"/{shard.name}.tar", os.O_RDONLY) for shard in corpus.groups["hq"]]
        indexes = [Index.of(shard) for shard in corpus.groups["hq"]]
        for place in map(reader.order, range(samples)):
            _, members = indexes[place.shard].sample(place.index)
            start, end = members[0].offset, members[-1].offset + members[-1].size
            self.ranges.append((files[place.shard], end - start, start, members[0].size))

    def __call__(self, decode: bool) -> Iterator:
        for file, size, offset, image in self.ranges:
            data = os.pread(file, size, offset)
            yield pixels(memoryview(data)[:image]) if decode else data


def ways(folder: Path, samples: int, shards: int) -> dict[str, Callable[[bool], Iterator]]:
    corpus = Corpus.open(str(folder))
    order = Reading(window=max(1, shards // 2))
    plain = Plain(corpus, Reader(corpus, order), samples)

    def ours(decode: bool) -> Iterator:
        return map(Reader(corpus, order, decode=pixels if decode else None).__getitem__, range(samples))

    def stock(decode: bool, shuffle: int = 0) -> Iterator:
        urls = [str(path) for path in sorted(folder.glob("*.tar"))]
        dataset = webdataset.WebDataset(urls, shardshuffle=False).shuffle(shuffle)
        for sample in dataset:
            yield pixels(sample["jpg"]) if decode else (sample["jpg"], sample["txt"], json.loads(sample["json"]))

    return {"pread (reference)": plain, "Reader": ours, "webdataset": stock,
            "webdataset, shuffle": lambda decode: stock(decode, 1000)}


def table(each: dict[str, Callable], samples: int, size: int, reps: int, decode: bool) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in each}
    for _ in range(reps):
        for name, way in each.items():
            begin = time.perf_counter()
            count = sum(1 for _ in way(decode))
            seconds[name].append(time.perf_counter() - begin)
            assert count == samples
    reference = min(seconds["pread (reference)"])
    title = "with decoding by cv2" if decode else "bytes"
    print(f"{title:24} {'samples/s':>10} {'MB/s':>7} {'µs/sample':>10} {'ratio':>6}")
    for name, taken in seconds.items():
        best = min(taken)
        print(f"{name:24} {samples / best:10.0f} {size / best / 1e6:7.0f} {best / samples * 1e6:10.0f} "
              f"{reference / best:6.2f}")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--side", type=int, default=1024, help="pixels of each image")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--reps", type=int, default=3, help="turns of every way; the best counts")
    parser.add_argument("--folder", default=None, help="where to write the shards; default: the temporary folder")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write(Path(folder), options.samples, options.shards, options.side)
        each, size = ways(Path(folder), options.samples, options.shards), sum(
            path.stat().st_size for path in Path(folder).glob("*.tar"))
        print(f"{options.samples} samples of {size / options.samples / 1e3:.0f} kB in {options.shards} shards, best of "
              f"{options.reps}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
        for decode in (False, True):
            table(each, options.samples, size, options.reps, decode)


if __name__ == "__main__":
    main()
