"""How many images a second the whole `score` stage manages, against bare decoding loops over the same files.

    python benchmarks/score_job.py FOLDER... [--processes 2] [--reps 3] [--copies 1] [--all]

Timed is the real `ScoreJob` through `pipeline.cluster.Cluster`: units to Ray workers, files read, decoded and
measured, parts written with fsync. Outside the clock: starting Ray, one untimed pass that warms its workers,
ingest. The reference (1.00) is a full-size cv2.imdecode of the same files in as many processes, also warm, each
file read within the loop and errors skipped; Pillow's RGB conversion is a second one. Nothing but decoding
happens in those. The ways take turns, the best of each counts. Files that a way cannot read are left out, as they
would cost the others alone (`--all` keeps them). `--copies` lists every file so many times, by hard links, for a
longer run: few files make one-image parts, and what is slow and comes last shows.
benchmarks/decode_and_score.py measures the same function without the job around it.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from pipeline.cluster import Cluster
from pipeline.config import Corpus, Source
from pipeline.decode import ImageRefused
from pipeline.ingest import ingest
from pipeline.score import ScoreJob
from pipeline.scores import score
from pipeline.storage import Folder


def by_cv2(path: Path) -> bool:
    try:
        return cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR) is not None
    except cv2.error:
        return False


def by_pillow(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.convert("RGB")
        return True
    except Exception:
        return False


def prepare() -> None:
    """Sets up a process of the loops: one thread, and libtiff's complaints about broken files go nowhere."""
    cv2.setNumThreads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def by_score(path: Path) -> bool:
    try:
        return bool(score(path.read_bytes()))
    except ImageRefused:
        return False


def listed(folders: list[Path], everything: bool) -> list[Path]:
    """The files of the folders, those that every way can read unless `everything`."""
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    if everything:
        return files
    with ProcessPoolExecutor(2, initializer=prepare) as pool:
        answers = list(zip(*(pool.map(way, files) for way in (by_cv2, by_pillow, by_score)), strict=True))
    left_out = [path.name for path, answer in zip(files, answers, strict=True) if not all(answer)]
    print(f"left out, not read by all: {', '.join(left_out) or 'none'}")
    return [path for path, answer in zip(files, answers, strict=True) if all(answer)]


def linked(files: list[Path], copies: int, into: Path) -> list[Path]:
    """Every file, `copies` times, under `into`."""
    result = []
    for copy in range(copies):
        for number, path in enumerate(files):
            target = into / f"{copy:04d}" / f"{number:05d}-{path.name}"
            target.parent.mkdir(exist_ok=True, parents=True)
            try:
                os.link(path, target)
            except OSError:         # another disk
                shutil.copyfile(path, target)
            result.append(target)
    return result


def score_pass(cluster: Cluster, workspace: Folder) -> tuple[float, int, str]:
    """Scores everything anew: (seconds, images with scores, what to say of it)."""
    for name in ("scores", "quarantine"):
        shutil.rmtree(f"{workspace}/{name}", ignore_errors=True)
    job = ScoreJob(workspace, Corpus().score)
    begin = time.perf_counter()
    units = job.pending()
    totals = cluster.run(job, units)
    return time.perf_counter() - begin, totals.rows - totals.failed, f"{len(units)} units"


def loop_pass(pool: ProcessPoolExecutor, decode: Callable[[Path], bool], files: list[Path]) -> tuple[float, int, str]:
    begin = time.perf_counter()
    done = sum(pool.map(decode, files, chunksize=max(1, min(16, len(files) // 64))))
    return time.perf_counter() - begin, done, ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="images")
    parser.add_argument("--processes", type=int, default=2, help="of each loop, and Ray's CPUs")
    parser.add_argument("--reps", type=int, default=3, help="turns of every way; the best counts")
    parser.add_argument("--copies", type=int, default=1, help="how often each file is listed")
    parser.add_argument("--all", action="store_true", help="also files that one of the ways cannot read")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="clearshard-benchmark-") as scratch:
        files = linked(listed(options.folders, options.all), options.copies, Path(scratch) / "images")
        measure(files, scratch, options.processes, options.reps)


def measure(files: list[Path], scratch: str, processes: int, reps: int) -> None:
    workspace, cluster = Folder.at(f"{scratch}/workspace"), Cluster(workers=processes)
    ingest(workspace, Corpus(sources=(Source(uri=f"{scratch}/images", kind="files"),)))
    begin = time.perf_counter()
    cluster.start()
    started = time.perf_counter() - begin
    with ProcessPoolExecutor(processes, initializer=prepare) as pool:
        ways = {"cv2.imdecode loop (reference)": partial(loop_pass, pool, by_cv2, files),
                "Pillow loop, RGB": partial(loop_pass, pool, by_pillow, files),
                "score stage": partial(score_pass, cluster, workspace)}
        warm = {name: way()[0] for name, way in ways.items()}
        results = {name: [] for name in ways}
        for _ in range(reps):
            for name, way in ways.items():
                results[name].append(way())
    cluster.stop()
    print(f"{len(files)} files, {processes} processes, best of {reps}; load {os.getloadavg()[0]:.1f} on "
          f"{os.cpu_count()} cores\nnot counted: Ray's start {started:.1f} s, first pass {warm['score stage']:.1f} s\n")
    show(results, len(files))


def show(results: dict[str, list[tuple[float, int, str]]], files: int) -> None:
    reference = min(results["cv2.imdecode loop (reference)"])[0]
    print(f"{'':30} {'files/s':>8} {'readable':>9} {'of imdecode':>12}")
    for name, turns in results.items():
        seconds, readable, note = min(turns)
        print(f"{name:30} {files / seconds:8.1f} {readable:9} {reference / seconds:12.2f}  {note}")


if __name__ == "__main__":
    main()
