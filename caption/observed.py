"""What a workspace tells about itself: shares, sizes and rates, from a sample of its parts; nothing is written.

A ratio needs no more than some thousand rows, so that 20 million answer as fast as a hundred: at most PARTS parts of
a table are read, evenly spread, and by queries.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import cv2
import pyarrow.dataset as pads

from degrade.strict import ConfigError, check
from pipeline.config import Corpus
from pipeline.ingest import links, sources
from pipeline.jobs import RowJob, Unit
from pipeline.plan import NEGATIVE, captions, negatives, plan
from pipeline.query import database
from pipeline.score import ScoreJob, scores_table
from pipeline.selection import selection
from pipeline.shards import CORPUS, Encoder
from pipeline.storage import Folder, filesystem
from pipeline.tables import QUARANTINE, Part, Table, rows_of
from pipeline.tile import TileJob, tiles

from .assumptions import MEASURED, Assumption
from .forecast import Observation
from .speeds import Run

RATES = "rates.json"
PARTS = 100             # of a table: up to 100,000 images
ROWS_TO_WEIGH = 100     # in smaller parts Parquet's own overhead would be most of what is weighed
ROWS_TO_TIME = 8
SECONDS_TO_TIME = 3.0   # of one job


def observe(workspace: Folder, corpus: Corpus) -> Observation:
    """Everything that can be measured in a moment; what cannot is simply missing."""
    runs, warnings = read_runs(workspace)
    known, groups = shares(workspace, corpus)
    seconds, samples = timed(workspace, corpus, runs)
    found = (*listed(workspace), *known, *weights(workspace, corpus), *finished(workspace), *samples)
    return Observation({each.name: each for each in found}, groups, runs, seconds, tuple(warnings))


def measured(name: str, value: float, unit: str, source: str) -> Assumption:
    return Assumption(name, value, unit, MEASURED, source)


def read_runs(workspace: Folder) -> tuple[dict[str, Run], list[str]]:
    """The last run of each job from `reports/rates.json`, and what is wrong with that file."""
    where = str(workspace / "reports" / RATES)
    try:
        text = json.loads((workspace / "reports").read(RATES))
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError) as error:
        return {}, [f"{where} cannot be read ({error}); its rates are not used. The next run of a job writes it anew"]
    if not isinstance(text, dict):
        return {}, [f"{where} holds no rates by job; it is not used. The next run of a job writes it anew"]
    runs, warnings = {}, []
    for job, values in text.items():
        try:
            runs[job] = check(Run, values, f"{where}: {job}")
        except ConfigError as error:
            warnings.append(f"{str(error).splitlines()[0]}; this rate is not used")
    return runs, warnings


def listed(workspace: Folder) -> Iterator[Assumption]:
    """How many images are listed, from the names of parts alone, and how many of them have to be fetched."""
    here, behind = sources(workspace).parts(), links(workspace).parts()
    images, fetched = sum(rows_of(key) for key in {*here, *behind}), sum(map(rows_of, behind))
    if images:
        yield measured("images", images, "images", "what the workspace lists")
    if fetched:
        yield measured("fetched share", fetched / images, "of the images", f"{fetched} links")


def spread(parts: Iterable[Part], most: int = PARTS) -> list[Part]:
    """At most so many parts, evenly spread over their keys."""
    ordered = sorted(parts, key=lambda part: part.key)
    return ordered[::-(-len(ordered) // most)] if ordered else []


def dataset(table: Table, parts: list[Part]) -> pads.Dataset:
    """The rows of some parts of a table."""
    if not parts:
        return pads.dataset(table.schema.empty_table())
    fs, path = filesystem(table.folder.uri)
    return pads.dataset([f"{path}/{part.file}" for part in parts], filesystem=fs, format="parquet",
                        schema=table.schema)


def shares(workspace: Folder, corpus: Corpus) -> tuple[list[Assumption], dict[str, float]]:
    """What becomes of images on their way to samples, and how the samples divide into groups."""
    scored = scores_table(workspace)
    sampled = spread(scored.parts().values())
    refused = Table(workspace / "quarantine" / "score", QUARANTINE)
    keys = {part.key for part in sampled}
    failed = [part for key, part in refused.parts().items() if key in keys]
    tables = {"scores": dataset(scored, sampled), "failed": dataset(refused, failed)} | {
        name: dataset(table, spread(table.parts().values())) for name, table in (
            ("selection", selection(workspace)), ("tiles", tiles(workspace)),
            ("captions", captions(workspace, corpus)), ("negatives", negatives(workspace)))}
    with database(**tables) as db:
        def ask(what: str) -> tuple:
            return db.sql(f"select {what}").fetchall()[0]
        good, size = ask("count(*), avg(bytes) from scores")
        (bad,) = ask("count(*) from failed")
        chosen, kept = ask("count(*), count(*) filter (kept) from selection")
        images, cut = ask("count(*), sum(len(tiles)) from tiles")
        said, words, tokens = ask("count(caption), avg(strlen(caption)), avg(generated) from captions")
        made, picture = ask("count(*), avg(length) from negatives")
        by_group = db.sql('select "group", sum(len(tiles)) from tiles group by all').fetchall()
    found = (("decoded share", good + bad, good / max(good + bad, 1), "of the images", f"{good} of {good + bad}"),
             ("original bytes", good, size, "bytes", f"{good} images"),
             ("kept share", chosen, kept / max(chosen, 1), "of the decoded images", f"{kept} of {chosen}"),
             ("tiles per kept image", images, (cut or 0) / max(images, 1), "tiles", f"{cut} tiles of {images} images"),
             ("caption bytes", said, words, "bytes", f"{said} captions"),
             ("caption tokens", said if tokens else 0, tokens, "tokens", f"{said} captions"),
             ("negative bytes", made, picture, "bytes", f"{made} images"))
    return ([measured(name, float(value), unit, source) for name, rows, value, unit, source in found if rows],
            {group: count / cut for group, count in by_group} if cut else {})


def weights(workspace: Folder, corpus: Corpus) -> Iterator[Assumption]:
    """Bytes per row of the tables whose parts are large enough to tell."""
    for name, table in (("sources", sources(workspace)), ("scores", scores_table(workspace)),
                        ("selection", selection(workspace)), ("tiles", tiles(workspace)),
                        ("captions", captions(workspace, corpus)), ("plan", plan(workspace))):
        parts = spread(table.parts().values(), 8)
        rows = dataset(table, parts).count_rows()
        if parts and rows / len(parts) >= ROWS_TO_WEIGH:
            size = sum(table.folder.size(part.file) for part in parts)
            yield measured(f"bytes per row of {name}", size / rows, "bytes", f"{rows} rows")


def finished(workspace: Folder) -> Iterator[Assumption]:
    """Bytes per sample of finished shards, headers and filling included, without the generated ones."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        groups = json.loads((workspace / "shards").read(CORPUS))["groups"]
        own = [counts for group, counts in groups.items() if group != NEGATIVE]
        samples, size = (sum(counts[name] for counts in own) for name in ("samples", "bytes"))
        if samples:
            yield measured("bytes per sample", size / samples, "bytes", f"{samples} samples in finished shards")


def timed(workspace: Folder, corpus: Corpus, runs: dict[str, Run]) -> tuple[dict[str, float], list[Assumption]]:
    """Seconds of one core per row of the jobs without a run, from a few rows; and what those samples weigh."""
    # As `pipeline.jobs.estimate`, but rows that fail do not count: a mount that is away would seem fast.
    cv2.setNumThreads(1)        # as in a worker
    seconds, images, encoder = {}, [], Encoder(corpus)

    def shard(row: dict) -> None:
        images.append(len(encoder.sample(row)[0][1]))
    jobs: dict[str, tuple[Callable[[dict], object], Iterator[dict]]] = {"shard": (shard, planned_rows(workspace))}
    for job in (ScoreJob(workspace, corpus.score), TileJob(workspace, corpus)):
        jobs[job.name] = job.process, pending_rows(job)
    for name, (work, rows) in jobs.items():
        if name not in runs and (each := seconds_per_row(work, rows)):
            seconds[name] = each
    weighed = f"{len(images)} tiles, encoded now"
    return seconds, [measured("image bytes", sum(images) / len(images), "bytes", weighed)] if images else []


def pending_rows(job: RowJob) -> Iterator[dict]:
    """Some input rows of a job, from four of its parts, done already or not."""
    inputs = list(job.inputs())
    for key, parts in inputs[::max(1, len(inputs) // 4)][:4]:
        yield from islice(job.rows(Unit(key, rows_of(key), "", parts)), ROWS_TO_TIME // 4 + 1)


def planned_rows(workspace: Folder) -> Iterator[dict]:
    """Some rows of the plan of the shards, tiles of the same image one after the other."""
    table = plan(workspace)
    own = (part for shard, part in table.parts().items() if not shard.startswith(f"{NEGATIVE}-"))
    for part in spread(own, 1):
        yield from table.read(part).slice(0, ROWS_TO_TIME + 1).to_pylist()


def seconds_per_row(work: Callable[[dict], object], rows: Iterable[dict]) -> float | None:
    """Mean time of the rows that went well, but for the first, which loads libraries; None if there are none."""
    done, spent = -1, 0.0
    for row in rows:
        with contextlib.suppress(Exception):
            started = time.perf_counter()
            work(row)
            done, spent = done + 1, (spent + time.perf_counter() - started) if done >= 0 else 0.0
        if spent > SECONDS_TO_TIME:
            break
    return spent / done if done > 0 else None
