"""How many images a second `score` manages, against bare decoding loops over the same files.

    python benchmarks/decode_and_score.py FOLDER [--processes 2] [--repeats 5]

Every process walks the whole list; files are read beforehand. Loops take turns, the best of each counts.
The reference (1.00) is a bare full-size cv2.imdecode loop.
"""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from pipeline.decode import ImageRefused, decode
from pipeline.scores import score

LOOPS = {
    "cv2.imdecode": lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR),
    "Pillow, RGB": lambda data: Image.open(BytesIO(data)).convert("RGB"),
    "decode (upright sRGB)": decode,
    "score (decode and all facts)": score,
}
_files: list[bytes] = []


def load(folder: Path) -> list[bytes]:
    """Bytes of the files under `folder` that every loop can read."""
    readable = []
    for path in sorted(folder.rglob("*")):
        data = path.read_bytes() if path.is_file() else b""
        try:
            decode(data)
            if LOOPS["cv2.imdecode"](data) is not None:
                readable.append(data)
        except (ImageRefused, cv2.error):
            continue
    return readable


def start(folder: Path) -> None:
    """Set up one worker process."""
    cv2.setNumThreads(1)
    _files.extend(load(folder))


def run(name: str) -> int:
    """One pass of one loop; the number of images."""
    for data in _files:
        LOOPS[name](data)
    return len(_files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    best = dict.fromkeys(LOOPS, float("inf"))
    with ProcessPoolExecutor(options.processes, initializer=start, initargs=(options.folder,)) as pool:
        list(pool.map(run, ["cv2.imdecode"] * options.processes))
        for _ in range(options.repeats):
            for name in LOOPS:
                begin = time.perf_counter()
                images = sum(pool.map(run, [name] * options.processes))
                best[name] = min(best[name], time.perf_counter() - begin)
    reference = best["cv2.imdecode"]
    print(f"{images} images in {options.processes} processes, best of {options.repeats}\n")
    print(f"{'loop':30} {'images/s':>9} {'ms/image':>9} {'of imdecode':>12}")
    for name, seconds in best.items():
        each = seconds * options.processes / images * 1000
        print(f"{name:30} {images / seconds:9.1f} {each:9.2f} {reference / seconds:12.2f}")


if __name__ == "__main__":
    main()
