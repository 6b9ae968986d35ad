"""Resident memory and time of the stages that touch no image, at growing numbers of rows.

    python benchmarks/memory.py [--rows 10000 100000 1000000]

For each size a fresh process (the driver) ingests a Parquet table of paths that need not exist, and runs dedup,
select and plan on Ray with 2 CPUs over made-up scores and tiles, which processes of their own write. Then
everything is asked again with nothing to do, and select after a changed threshold. The driver's memory is its
peak resident set so far (resource.getrusage), so a row shows what its stage added; the last lines of each size
have the largest peak of a Ray worker and the driver's growth against the smallest size. Seconds are of one run.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cluster import Cluster
from pipeline.config import Corpus, Range, Select, Source
from pipeline.plan import PlanJob
from pipeline.score import SCORES, ScoreJob
from pipeline.selection import DEFAULTS
from pipeline.stages import STAGES, Session
from pipeline.storage import Folder
from pipeline.tables import TILES, digest
from pipeline.tile import TileJob


def corpus(workspace: Folder, sharpness: float = 0.1) -> Corpus:
    """Keeps about 0.9 of the rows; `sharpness` is uniform in [0, 1] here."""
    facts = {name: Range() for name in DEFAULTS} | {"sharpness": Range(min=sharpness)}
    return Corpus(sources=(Source(uri=str(workspace / "listing.parquet")),), select=Select(facts=facts))


def write_listing(workspace: Folder, rows: int) -> None:
    """A table of paths, licences and captions."""
    schema = pa.schema([("uri", pa.string()), ("licence", pa.string()), ("text", pa.string())])
    Path(str(workspace)).mkdir(parents=True)
    with pq.ParquetWriter(str(workspace / "listing.parquet"), schema) as writer:
        for start in range(0, rows, 50_000):
            numbers = range(start, min(rows, start + 50_000))
            writer.write_table(pa.table([[f"file:///photos/{n // 1000:05d}/IMG_{n:09d}.jpg" for n in numbers],
                                         ["CC-BY-4.0"] * len(numbers), [f"A photograph, number {n}" for n in numbers]],
                                        schema=schema))


def write_scores(workspace: Folder) -> None:
    """The parts that `score` would write: random facts and hashes, one row in 50 with the bytes of another."""
    job, generator = ScoreJob(workspace, corpus(workspace).score), np.random.default_rng(0)
    for unit in job.pending():
        refs = job.input.read(unit.parts["input"], ["ref"])["ref"]
        known = {"ref": refs, "uid": pa.array([digest(n, length=32) for n in generator.integers(0, 2**24, len(refs))]),
                 "format": pa.array(["jpeg"] * len(refs)), "mode": pa.array(["RGB"] * len(refs))}
        columns = [known.get(field.name, _random(field, len(refs), generator)) for field in SCORES]
        job.output.write(unit.key, unit.inputs, pa.table(columns, names=SCORES.names), content=unit.inputs)


def _random(field: pa.Field, count: int, generator: np.random.Generator) -> pa.Array:
    if pa.types.is_floating(field.type):
        return pa.array(generator.random(count), field.type)
    if pa.types.is_boolean(field.type):
        return pa.array(generator.random(count) < 0.1)
    if field.type == pa.uint64():
        return pa.array(generator.integers(0, 2**64, count, dtype=np.uint64))
    return pa.array(generator.integers(2000, 4000, count), field.type) if pa.types.is_integer(field.type) else \
        pa.nulls(count, field.type)


def write_tiles(workspace: Folder) -> None:
    """The parts that `tile` would write: two tiles for each kept image."""
    job = TileJob(workspace, corpus(workspace))
    tiles = [{"x": x, "y": 0, "width": 1024, "height": 1024, "out_width": 1024, "out_height": 1024, "texture": 0.5}
             for x in (0, 1024)]
    for unit in job.pending():
        rows = job.input.read(unit.parts["input"]).to_pylist()
        kept = [{"ref": row["ref"], "uid": row["uid"], "group": row["group"], "tiles": tiles}
                for row in rows if row["kept"]]
        job.output.write(unit.key, unit.inputs, pa.Table.from_pylist(kept, schema=TILES), content=unit.inputs)


def elsewhere(function: Callable, workspace: Folder, *rows: int) -> None:
    """In a process of its own, whose memory is not counted. (Nor may this one grow: a child starts with its peak.)"""
    subprocess.run([sys.executable, __file__, "--only", function.__name__, "--at", str(workspace),
                    *(["--rows", *map(str, rows)] if rows else [])], check=True)


def driver(workspace: Folder) -> None:
    """The measured process; prints name, seconds and peak memory of each step."""
    cluster = Cluster(workers=2)
    session = Session(workspace, corpus(workspace), cluster)
    report("imports", 0.0)

    def step(name: str, *actions: Callable[[], object]) -> None:
        begin = time.perf_counter()
        for action in actions:
            action()
        report(name, time.perf_counter() - begin)

    def stage(*names: str) -> list[Callable[[], object]]:
        return [lambda name=name: STAGES[name].run(session) for name in names]

    step("ingest", *stage("ingest"))
    elsewhere(write_scores, workspace)
    step("start of Ray", cluster.start)
    step("score: all are done", *stage("score"))
    step("dedup", *stage("dedup"))
    step("select", *stage("select"))
    elsewhere(write_tiles, workspace)
    plan = PlanJob(workspace, session.corpus)
    step("plan", lambda: session.run(plan))
    step("ingest again, nothing new", *stage("ingest"))
    step("the rest, nothing to do", *stage("score", "dedup", "select", "tile"), lambda: session.run(plan))
    session.corpus = corpus(workspace, 0.2)
    step("select, new threshold", *stage("select"))
    cluster.stop()


def report(name: str, seconds: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(name, f"{seconds:.2f}", f"{peak:.0f}", sep="\t", flush=True)


def watch(process: int, peaks: dict[str, float]) -> None:
    """Notes the largest peak (MB) of any Ray worker under a process, until that ends."""
    while psutil.pid_exists(process):
        try:
            for child in psutil.Process(process).children(recursive=True):
                if (child.cmdline() or [""])[0].startswith("ray::"):
                    status = Path(f"/proc/{child.pid}/status").read_text()
                    peak = float(status.partition("VmHWM:")[2].split()[0]) / 1024
                    peaks["worker"] = max(peaks.get("worker", 0.0), peak)
        except (psutil.Error, OSError, IndexError):
            pass        # it ended meanwhile
        time.sleep(0.3)


def measure(rows: int) -> tuple[dict[str, tuple[float, float]], float]:
    """Seconds and driver's peak (MB) of each step, and the largest worker's peak."""
    with tempfile.TemporaryDirectory(prefix="clearshard-benchmark-") as scratch:
        workspace = Folder.at(f"{scratch}/workspace")
        elsewhere(write_listing, workspace, rows)
        process = subprocess.Popen([sys.executable, __file__, "--only", "driver", "--at", str(workspace)],
                                   stdout=subprocess.PIPE, text=True)
        peaks: dict[str, float] = {}
        threading.Thread(target=watch, args=(process.pid, peaks), daemon=True).start()
        lines = [line.rstrip().split("\t") for line in process.stdout if line.count("\t") == 2]
        if process.wait():
            sys.exit("the measured process failed")
    return {name: (float(seconds), float(peak)) for name, seconds, peak in lines}, peaks.get("worker", 0.0)


CHILDREN: dict[str, Callable[[Folder, int], None]] = {
    "driver": lambda workspace, rows: driver(workspace), "write_listing": write_listing,
    "write_scores": lambda workspace, rows: write_scores(workspace),
    "write_tiles": lambda workspace, rows: write_tiles(workspace),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--only", choices=sorted(CHILDREN), help=argparse.SUPPRESS)
    parser.add_argument("--at", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        return CHILDREN[options.only](Folder.at(options.at), options.rows[0])
    first = None
    for rows in options.rows:
        steps, worker = measure(rows)
        print(f"\n{rows} rows; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        print(f"{'':28} {'seconds':>8} {'rows/s':>9} {'driver, MB':>11}")
        for name, (seconds, peak) in steps.items():
            print(f"{name:28} {seconds:8.2f} {rows / max(seconds, 0.01):9.0f} {peak:11.0f}")
        last = max(peak for _, peak in steps.values())
        first = first or last
        print(f"largest worker {worker:.0f} MB; driver {last:.0f} MB, {last / first:.2f} of that at "
              f"{options.rows[0]} rows", flush=True)


if __name__ == "__main__":
    main()
