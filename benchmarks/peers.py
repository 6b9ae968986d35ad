"""A folder of images to WebDataset tars of 512-pixel tiles: this pipeline against what else one could take.

    python benchmarks/peers.py FOLDER [--copies 1] [--reps 2] [--img2dataset PYTHON]

All scale the shorter side to 512 pixels, keep the aspect, skip smaller images and write JPEG 95 with a JSON.

- clearshard: `pipeline.stages` from ingest to shard, on Ray with 2 CPUs. Each image is decoded three times: to
  measure it, to place its tiles, to write them. Only this way measures every fact, finds exact copies (left out)
  and near ones (kept here), quarantines what is damaged, applies orientation and ICC profiles, writes 4:4:4,
  fsyncs every part, lays a checked index beside each tar, and can be killed and continued at any moment.
- script: decode with cv2 or Pillow, resize, `webdataset.ShardWriter`; a JSON with the file's name. One process,
  or two that share the list, without Ray. Errors are skipped; profiles are not looked at; cv2 turns by EXIF.
- img2dataset, if `--img2dataset` names a Python that has it: fetches the folder from a web server on loopback
  (it reads URLs alone), two processes of 16 threads, resizes with cv2 INTER_AREA, writes JSON and Parquet.

Outside the clock: imports, copying the files, img2dataset's list and server. Ray's start has a row of its own.
The best of the turns counts (clearshard without the start has one more, which warms Ray's workers); the
reference (1.00) is the cv2 script in one process.
"""

import argparse
import http.server
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import quote

import cv2
import numpy as np
import webdataset
from PIL import Image

from pipeline.cluster import Cluster
from pipeline.config import Corpus, Range, Select, Shard, Source, Tile
from pipeline.selection import DEFAULTS
from pipeline.stages import STAGES, Session
from pipeline.storage import Folder

SIZE = 512
QUALITY = 95
IMG2DATASET = """
import sys
from img2dataset import download
download(url_list=sys.argv[1], output_folder=sys.argv[2], processes_count=2, thread_count=16, image_size=512,
         resize_mode="keep_ratio", resize_only_if_bigger=True, min_image_size=512, encode_quality=95,
         output_format="webdataset", input_format="txt", number_sample_per_shard=1000, enable_wandb=False)
"""


def corpus(images: Path) -> Corpus:
    """One tile per image and no thresholds, so that the work is like the others'."""
    return Corpus(
        sources=(Source(uri=str(images), kind="files"),), max_error_rate=1.0,
        select=Select(min_side=SIZE, max_aspect=1000, keep_near_duplicates=True,
                      facts={name: Range() for name in DEFAULTS}),
        tile=Tile(mode="whole", size=SIZE, min_texture=0), shard=Shard(quality=QUALITY))


def clearshard(cluster: Cluster, images: Path, out: Path) -> None:
    session = Session(Folder.at(str(out)), corpus(images), cluster)
    for stage in STAGES.values():
        stage.run(session)


def clearshard_and_ray(images: Path, out: Path) -> None:
    cluster = Cluster(workers=2)
    cluster.start()
    clearshard(cluster, images, out)
    cluster.stop()


def resized(size: tuple[int, int]) -> tuple[int, int] | None:
    """(width, height) with a shorter side of SIZE; None if that would enlarge."""
    scale = SIZE / min(size)
    return None if scale > 1 else (round(size[0] * scale), round(size[1] * scale))


def by_cv2(path: Path) -> bytes | None:
    image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    target = resized(image.shape[1::-1]) if image is not None else None
    if target is None:
        return None
    image = cv2.resize(image, target, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()


def by_pillow(path: Path) -> bytes | None:
    with Image.open(path) as image:
        target = resized(image.size)
        if target is None:
            return None
        sink = io.BytesIO()
        image.convert("RGB").resize(target, Image.Resampling.BOX).save(sink, "JPEG", quality=QUALITY)
        return sink.getvalue()


def script(convert: Callable[[Path], bytes | None], images: Path, out: Path, part: int = 0, parts: int = 1) -> None:
    """What one writes in an afternoon."""
    files = [path for path in sorted(images.rglob("*")) if path.is_file()][part::parts]
    with webdataset.ShardWriter(f"{out}/{part}-%06d.tar", maxcount=1000, encoder=False, verbose=0) as writer:
        for number, path in enumerate(files):
            try:
                data = convert(path)
            except (OSError, ValueError, SyntaxError, cv2.error):
                continue
            if data is not None:
                writer.write({"__key__": f"{part}-{number:08d}", "jpg": data,
                              "json": json.dumps({"name": path.name}).encode()})


def script_twice(pool: ProcessPoolExecutor, convert: Callable[[Path], bytes | None], images: Path, out: Path) -> None:
    for done in [pool.submit(script, convert, images, out, part, 2) for part in range(2)]:
        done.result()


def prepare() -> None:
    """One thread for cv2, and libtiff's complaints about broken files go nowhere."""
    cv2.setNumThreads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


class Silent(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def img2dataset(python: str, port: int, images: Path, out: Path) -> None:
    urls = [f"http://127.0.0.1:{port}/{quote(str(path.relative_to(images)))}"
            for path in sorted(images.rglob("*")) if path.is_file()]
    listing = out / "urls.txt"
    listing.write_text("\n".join(urls))
    subprocess.run([python, "-c", IMG2DATASET, str(listing), str(out / "tars")], check=True, cwd=out,
                   env=os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)


def samples_in(out: Path) -> int:
    """Images in the tars that a way wrote."""
    return sum(name.endswith(".jpg") for path in out.rglob("*.tar") for name in tarfile.open(path).getnames())


def copied(folder: Path, copies: int, into: Path) -> int:
    """The folder's files, `copies` times; every copy has a few bytes of its own at its end, or it were a copy."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for copy in range(copies):
        (into / f"{copy:04d}").mkdir(parents=True)
        for number, path in enumerate(files):
            shutil.copyfile(path, into / f"{copy:04d}" / f"{number:05d}-{path.name}")
            with open(into / f"{copy:04d}" / f"{number:05d}-{path.name}", "ab") as file:
                file.write(b"%08d" % copy * (copy > 0))
    return len(files) * copies


def serve(images: Path) -> http.server.ThreadingHTTPServer:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(images)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def measure(ways: dict[str, Callable[[Path], None]], scratch: Path, reps: int) -> dict[str, tuple[float, int]]:
    """Best seconds and samples written of every way."""
    best: dict[str, tuple[float, int]] = {}
    for _ in range(reps):
        for name, way in ways.items():
            with tempfile.TemporaryDirectory(dir=scratch) as out:
                begin = time.perf_counter()
                way(Path(out))
                seconds = time.perf_counter() - begin
                if name not in best or seconds < best[name][0]:
                    best[name] = seconds, samples_in(Path(out))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="images")
    parser.add_argument("--copies", type=int, default=1, help="how often each file is taken")
    parser.add_argument("--reps", type=int, default=2, help="turns of every way; the best counts")
    parser.add_argument("--img2dataset", metavar="PYTHON", help="a Python with img2dataset installed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="clearshard-benchmark-") as scratch:
        compare(options, Path(scratch))


def compare(options: argparse.Namespace, scratch: Path) -> None:
    images, cluster = scratch / "images", Cluster(workers=2)
    count = copied(options.folder, options.copies, images)
    with ProcessPoolExecutor(2, initializer=prepare) as pool, ProcessPoolExecutor(1, initializer=prepare) as alone:
        ways = {"script, cv2, 1 process (reference)": lambda out: alone.submit(script, by_cv2, images, out).result(),
                "script, Pillow, 1 process": lambda out: alone.submit(script, by_pillow, images, out).result(),
                "script, cv2, 2 processes": partial(script_twice, pool, by_cv2, images),
                "script, Pillow, 2 processes": partial(script_twice, pool, by_pillow, images),
                "clearshard, 2 CPUs, with Ray's start": partial(clearshard_and_ray, images)}
        if options.img2dataset:
            ways["img2dataset, 2 processes"] = partial(img2dataset, options.img2dataset,
                                                       serve(images).server_port, images)
        else:
            print("img2dataset: skipped; install it elsewhere and name that Python with --img2dataset")
        best = measure(ways, scratch, options.reps)
        cluster.start()
        ways = {"clearshard, 2 CPUs": partial(clearshard, cluster, images)}
        best |= measure(ways, scratch, options.reps + 1)    # the first turn warms the workers
        cluster.stop()
    show(best, count, options.reps)


def show(best: dict[str, tuple[float, int]], count: int, reps: int) -> None:
    reference = best["script, cv2, 1 process (reference)"][0]
    print(f"{count} files, best of {reps}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    print(f"{'':38} {'seconds':>8} {'files/s':>8} {'samples':>8} {'ratio':>6}")
    for name, (seconds, samples) in best.items():
        print(f"{name:38} {seconds:8.1f} {count / seconds:8.1f} {samples:8} {reference / seconds:6.2f}")


if __name__ == "__main__":
    main()
