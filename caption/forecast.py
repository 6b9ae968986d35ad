"""What a corpus will take: rows, hours, CPU-hours, GPU-hours, bytes and shards of every job.

Pure functions of numbers: `observed` reads them from a workspace, `arithmetic` derives those of GPU jobs, and every
one that decides something comes out beside the result as an `Assumption`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pipeline.config import Corpus
from pipeline.tar import BLOCK, END

from .assumptions import ASSUMED, Assumption, Ledger, assumed, tile_pixels
from .config import Negatives
from .speeds import (
    CORES,
    GPUS,
    SERIAL,
    Captioning,
    Ideal,
    Machine,
    Run,
    caption_ideal,
    cpu_speed,
    gpu_speed,
    negatives_ideal,
    note_card,
)

REMEDY = "not measured: run it with --limit 200 first"
NO_GPU = "needs a GPU: --gpus N"


@dataclass(frozen=True)
class Observation:
    """What a workspace tells; `known` replaces what `assumed` says."""

    known: Mapping[str, Assumption] = field(default_factory=dict)
    groups: Mapping[str, float] = field(default_factory=dict)       # share of each group among the samples
    runs: Mapping[str, Run] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)      # of one core per row, from a few timed rows
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """What is to be forecast. `captioning` or `negatives` None: that job is left out."""

    corpus: Corpus
    seen: Observation
    machine: Machine
    captioning: Captioning | None = None
    negatives: Negatives | None = None
    given: Mapping[str, Assumption] = field(default_factory=dict)   # replaces what is measured and assumed
    stated: tuple[Assumption, ...] = ()                             # what decided the rest of this, for the record


@dataclass(frozen=True)
class JobPlan:
    """One line of a forecast; None: not known, and `note` says why."""

    name: str
    rows: int
    rate: float | None          # rows a second, of the whole machine
    hours: float | None         # of wall time
    cpu_hours: float | None
    gpu_hours: float | None
    bytes: int                  # written
    shards: int = 0
    note: str = ""


@dataclass(frozen=True)
class Forecast:
    jobs: tuple[JobPlan, ...]
    assumptions: tuple[Assumption, ...]
    warnings: tuple[str, ...]

    @property
    def totals(self) -> JobPlan:
        """Sums, the stages one after the other; jobs of unknown rate are named in the note."""
        def over(name: str) -> float:
            return sum(getattr(job, name) or 0 for job in self.jobs)
        unknown = [job.name for job in self.jobs if job.hours is None]
        return JobPlan("total", self.jobs[0].rows, None, over("hours"), over("cpu_hours"), over("gpu_hours"),
                       int(over("bytes")), int(over("shards")),
                       f"hours are without {', '.join(unknown)}" if unknown else "")


@dataclass(frozen=True)
class Work:
    """What a job has to do, before it is known how fast it does it."""

    name: str
    rows: float
    kind: str
    bytes: float
    shards: int = 0


def forecast(setting: Setting) -> Forecast:
    """The whole corpus from nothing, whatever of it exists already."""
    ledger = Ledger(assumed(setting.corpus), setting.seen.known, setting.given)
    ledger.warnings += setting.seen.warnings
    for each in setting.stated:
        ledger.note(each)
    works = [*_tables(setting, ledger), *_samples(setting, ledger)]
    on_gpus = [work.name for work in works if work.kind == GPUS]
    if on_gpus and setting.machine.gpus:
        note_card(setting.machine.card, ledger)
    elif on_gpus:
        ledger.warnings.append(f"{', '.join(on_gpus)}: needs GPUs, and --gpus is 0; only the other jobs are planned")
    jobs = tuple(_planned(work, setting, ledger) for work in works)
    return Forecast(jobs, tuple(ledger.used.values()), tuple(ledger.warnings))


def _rows(table: str, rows: float, ledger: Ledger) -> float:
    """Bytes of so many rows of a table."""
    return rows * ledger.value(f"bytes per row of {table}")


def _tables(setting: Setting, ledger: Ledger) -> Iterator[Work]:
    """The jobs that see whole images, in their order."""
    listed = ledger.value("images")
    decoded = listed * ledger.value("decoded share")
    kept = decoded * ledger.value("kept share")
    yield Work("ingest", listed, SERIAL, _rows("sources", listed, ledger))
    if "fetched share" in ledger:
        fetched = listed * ledger.value("fetched share")
        yield Work("fetch", fetched, CORES, fetched * ledger.value("original bytes"))
    yield Work("score", listed, CORES, _rows("scores", decoded, ledger))
    for metric in setting.corpus.score.metrics:
        yield Work(f"metric-{metric.name}", decoded, GPUS if metric.device == "cuda" else CORES,
                   _rows("metrics", decoded, ledger))
    yield Work("dedup", decoded, SERIAL, _rows("duplicates", decoded, ledger))
    yield Work("select", decoded, SERIAL, _rows("selection", decoded, ledger))
    yield Work("tile", kept, CORES, _rows("tiles", kept, ledger))


def _samples(setting: Setting, ledger: Ledger) -> Iterator[Work]:
    """The jobs that see tiles, in their order."""
    kept = ledger.value("images") * ledger.value("decoded share") * ledger.value("kept share")
    tiles, made = kept * ledger.value("tiles per kept image"), 0
    per_shard, written, shards = setting.corpus.shard.samples, 0.0, 0
    if setting.captioning:
        yield Work("caption", tiles, GPUS, _rows("captions", tiles, ledger))
    if setting.negatives:
        made, image = setting.negatives.count, negative_bytes(setting, ledger)
        yield Work("negatives", made, GPUS, made * image)
        written += made * tar_bytes(image, 300, ledger.value("provenance bytes"))      # 300: the words
        shards += math.ceil(made / per_shard)
    yield Work("plan", tiles + made, SERIAL, _rows("plan", tiles + made, ledger))
    shards += sum(math.ceil(tiles * share / per_shard) for share in (setting.seen.groups or {"hq": 1.0}).values())
    written += tiles * sample_bytes(setting, ledger) + shards * len(END)
    yield Work("shard", tiles + made, CORES, written + _rows("index and manifest", tiles + made, ledger), shards)


def tar_bytes(*members: float) -> int:
    """Bytes of a sample in a tar: each member has a header and is filled up to whole blocks of 512."""
    return sum(BLOCK + math.ceil(size / BLOCK) * BLOCK for size in members)


def sample_bytes(setting: Setting, ledger: Ledger) -> float:
    """Bytes of a sample in its shard: as finished shards have it, or from those of its members."""
    members = [] if "bytes per sample" in ledger else [ledger.value("image bytes"), ledger.value("provenance bytes")]
    measured = 0.0 if members else ledger.value("bytes per sample")
    captioned_before = "caption bytes" in ledger        # then the finished shards hold captions
    if setting.captioning and (members or not captioned_before):
        members.append(ledger.value("caption bytes") if captioned_before else
                       ledger.value("caption tokens") * ledger.value("bytes per caption token"))
    return measured + tar_bytes(*members)


def negative_bytes(setting: Setting, ledger: Ledger) -> float:
    """Bytes of a generated image: measured, or as many a pixel as a tile has."""
    if "negative bytes" in ledger:
        return ledger.value("negative bytes")
    return ledger.value("image bytes") * setting.negatives.size**2 / tile_pixels(setting.corpus)


def _planned(work: Work, setting: Setting, ledger: Ledger) -> JobPlan:
    """A line of the forecast: the work by the speed of the places where it is done."""
    machine, seen = setting.machine, setting.seen
    if work.kind == GPUS and not machine.gpus:
        return _unknown(work, NO_GPU)
    if work.kind == GPUS:
        ideal, group = _ideal(work.name, setting, ledger)
        speed = gpu_speed(work.name, ideal, seen.runs.get(work.name), machine.card, ledger)
        places, cores, gpus = max(1, machine.gpus // group) * group, ledger.value("cores per GPU"), 1
    else:
        speed = cpu_speed(work.name, work.kind, seen.runs, seen.seconds)
        # A shard is written by one core.
        places, cores, gpus = min(machine.cpus, work.shards or machine.cpus) if work.kind == CORES else 1, 1.0, 0
    if speed is None:
        return _unknown(work, REMEDY)
    rate = float(ledger.note(speed).value) * places
    hours = work.rows / rate / 3600
    note = REMEDY if speed.origin == ASSUMED and work.kind == CORES else ""
    return JobPlan(work.name, round(work.rows), rate, hours, hours * places * cores, hours * places * gpus,
                   round(work.bytes), work.shards, note)


def _unknown(work: Work, note: str) -> JobPlan:
    return JobPlan(work.name, round(work.rows), None, None, None, None, round(work.bytes), work.shards, note)


def _ideal(name: str, setting: Setting, ledger: Ledger) -> tuple[Ideal | None, int]:
    """Ideal rows a second per GPU of a card (None: the arithmetic does not know), and how many GPUs work as one."""
    if name == "caption":
        return caption_ideal(setting.captioning, setting.machine, ledger)
    if name == "negatives":
        return negatives_ideal(setting.negatives, ledger)
    return None, 1
