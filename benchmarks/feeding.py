"""How fast training is fed: micro-batches through the Loader, against bare loops over the same images.

    python benchmarks/feeding.py [--samples 96] [--side 1024] [--crop 512] [--workers 2] [--recipe supir] [--folder DIR]

Two tables: decode and crop only, as for a GPU that degrades by itself; and the degradation on the CPU as well. The
reference (1.00) of each is one thread that decodes the same JPEGs out of memory, cuts a crop and degrades it, with
neither shards, hashes, order nor processes. The Loader has micro-batches of 4; what its workers made before the clock
starts does not count. `per core`: samples per second of CPU time, of all processes together, which says what the Loader
costs on a machine that is busy with other things.
"""

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import psutil
import torch
from PIL import Image

from degrade import SecondOrderDegrader
from pipeline.decode import decode
from pipeline.shards import index_bytes
from pipeline.tar import TarWriter
from train.batches import Data, Loader

MICRO = 4


def picture(seed: int, side: int) -> bytes:
    """A JPEG with the spectrum of a photograph: noise whose amplitude falls with frequency."""
    noise = np.random.default_rng(seed).standard_normal((side, side, 3)).astype(np.float32)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij"))[..., None]
    plane = np.fft.irfft2(np.fft.rfft2(noise, axes=(0, 1)) / (frequency + 0.01) ** 1.2, axes=(0, 1))
    data = io.BytesIO()
    Image.fromarray((plane / plane.std() * 50 + 120).clip(0, 255).astype(np.uint8)).save(data, "jpeg", quality=95)
    return data.getvalue()


def write(folder: Path, images: list[bytes], shards: int = 2) -> None:
    for number in range(shards):
        name = f"hq-{number:06d}"
        with TarWriter(str(folder / f"{name}.tar")) as writer:
            for key, data in list(enumerate(images))[number::shards]:
                writer.add([(f"{key:08d}.jpg", data), (f"{key:08d}.txt", b"A quiet harbour at dusk. " * 16)])
        (folder / f"{name}.index.parquet").write_bytes(index_bytes(writer, "0" * 12))


def bare(images: list[bytes], crop: int, recipe: str | None) -> Callable[[int], tuple[float, float]]:
    degrader, rng = recipe and SecondOrderDegrader(recipe), np.random.default_rng(0)

    def run(samples: int) -> tuple[float, float]:
        begin, spent = time.perf_counter(), time.process_time()
        for number in range(samples):
            pixels = decode(images[number % len(images)])
            top, left = rng.integers(0, pixels.shape[0] - crop + 1, 2)
            hq = np.ascontiguousarray(pixels[top:top + crop, left:left + crop])
            if degrader:
                degrader.image(hq, str(number))
        return time.perf_counter() - begin, time.process_time() - spent

    run(MICRO)      # compiles, and makes the noise
    return run


def fed(folder: str, crop: int, recipe: str | None, workers: int) -> Iterator[tuple[float, float]]:
    """Yields a way like `bare` whose samples come from a Loader; exhausted, it ends the workers."""
    data = Data(corpus=[folder], crop=crop, recipe=recipe, workers=workers)
    loader = Loader(data, 0, batch=MICRO, micro_batch=MICRO)
    batches = loader.batches()

    def cpu() -> float:
        children = [psutil.Process(worker.pid).cpu_times() for worker in loader._running._workers] if workers else []
        return time.process_time() + sum(times.user + times.system for times in children)

    def run(samples: int) -> tuple[float, float]:
        for _ in range(2 * workers * data.prefetch + 1):        # starts, and takes what was made ahead
            next(batches)
        begin, spent = time.perf_counter(), cpu()
        for _ in range(samples // MICRO):
            next(batches)
        return time.perf_counter() - begin, cpu() - spent

    try:
        yield run
    finally:
        loader.close()


def table(folder: str, images: list[bytes], options: argparse.Namespace, recipe: str | None) -> None:
    title = f"decode, crop, {recipe}" if recipe else "decode, crop"
    print(f"{title:24} {'samples/s':>10} {'ratio':>6} {'per core':>10} {'ratio':>6}")
    reference = None
    for name, workers in (("one thread (reference)", None), ("Loader, no workers", 0),
                          (f"Loader, {options.workers} workers", options.workers)):
        ways = iter([bare(images, options.crop, recipe)]) if workers is None else fed(folder, options.crop, recipe,
                                                                                      workers)
        way = next(ways)
        wall, cpu = (min(each) for each in zip(*(way(options.samples) for _ in range(options.reps)), strict=True))
        next(ways, None)
        rates = options.samples / wall, options.samples / cpu
        reference = reference or rates
        print(f"{name:24} {rates[0]:10.1f} {rates[0] / reference[0]:6.2f} {rates[1]:10.1f} "
              f"{rates[1] / reference[1]:6.2f}", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=96, help="of each turn; a multiple of 4")
    parser.add_argument("--side", type=int, default=1024, help="pixels of each image")
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--recipe", default="supir")
    parser.add_argument("--reps", type=int, default=3, help="turns of every way; the best counts")
    parser.add_argument("--folder", default=None, help="where to write the shards; default: the temporary folder")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        images = [picture(seed, options.side) for seed in range(32)]
        write(Path(folder), images)
        print(f"{options.samples} crops of {options.crop} from JPEGs of {options.side} x {options.side} pixels and "
              f"{sum(map(len, images)) / len(images) / 1e3:.0f} kB, best of {options.reps}, load "
              f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
        for recipe in (None, options.recipe):
            table(folder, images, options, recipe)


if __name__ == "__main__":
    main()
