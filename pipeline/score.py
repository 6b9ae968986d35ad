"""Score: facts about every image, and the optional metrics, each in a table of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from . import scores
from .config import Score
from .decode import ImageRefused, decode
from .ingest import sources
from .jobs import RowJob, Unit
from .metrics import Metric, MetricConfig
from .storage import Folder, read_bytes, size_of
from .tables import QUARANTINE, Part, Table

SCORES = pa.schema([pa.field("ref", pa.string(), nullable=False), *(pa.field(f.name, f.type) for f in scores.FACTS)])
METRIC = pa.schema([pa.field("ref", pa.string(), nullable=False), pa.field("value", pa.float64())])


def scores_table(workspace: Folder) -> Table:
    return Table(workspace / "scores", SCORES)


def metric_table(workspace: Folder, name: str) -> Table:
    return Table(workspace / "metrics" / name, METRIC)


def read_image(row: dict, max_bytes: int) -> bytes:
    """The bytes that a row of `sources` points at.

    Raises:
        OSError, EOFError: as the storage answers.
        ImageRefused: more bytes than the limit; nothing is read then.
    """
    if row["length"] is None:
        size = size_of(row["uri"])
        if size > max_bytes:
            raise ImageRefused("too_many_bytes", f"{size} bytes, the limit is {max_bytes} (max_bytes)")
    elif row["length"] > max_bytes:
        raise ImageRefused("too_many_bytes", f"{row['length']} bytes, the limit is {max_bytes} (max_bytes)")
    return read_bytes(row["uri"], row["offset"], row["length"])


@dataclass
class ScoreJob(RowJob):
    """Every fact of `pipeline.scores` for every source row."""

    workspace: Folder
    config: Score
    retry_errors: bool = False
    name = "score"

    def __post_init__(self) -> None:
        self.input, self.output = sources(self.workspace), scores_table(self.workspace)
        self.quarantine = Table(self.workspace / "quarantine" / self.name, QUARANTINE)
        self.settings = {"facts": scores.SCORES_VERSION, "limits": self.config.limits.model_dump()}
        self.row_timeout_s = self.config.row_timeout_s

    def rows(self, unit: Unit) -> list[dict]:
        return self.input.read(unit.parts["input"], ["ref", "uri", "offset", "length", "name"]).to_pylist()

    def process(self, row: dict) -> dict:
        data = read_image(row, self.config.limits.max_bytes)
        return {"ref": row["ref"]} | scores.score(data, self.config.limits)


@dataclass
class MetricJob(RowJob):
    """One optional metric for every image that could be scored. Its model is loaded once per worker."""

    workspace: Folder
    config: Score
    metric: MetricConfig
    retry_errors: bool = False

    def __post_init__(self) -> None:
        self.name = f"metric-{self.metric.name}"
        self.input, self.output = scores_table(self.workspace), metric_table(self.workspace, self.metric.name)
        self.quarantine = Table(self.workspace / "quarantine" / self.name, QUARANTINE)
        self.settings = {"metric": self.metric.model_dump(exclude={"device"})}
        self.row_timeout_s = self.config.row_timeout_s
        self.num_gpus = 1.0 if self.metric.device == "cuda" else 0.0

    def inputs(self) -> Iterator[tuple[str, dict[str, Part]]]:
        places = sources(self.workspace).parts()
        return ((key, parts | {"places": places[key]}) for key, parts in super().inputs())

    def rows(self, unit: Unit) -> list[dict]:
        places = sources(self.workspace)
        scored = set(self.input.read(unit.parts["input"], ["ref"])["ref"].to_pylist())
        rows = places.read(unit.parts["places"], ["ref", "uri", "offset", "length", "name"]).to_pylist()
        return [row for row in rows if row["ref"] in scored]

    def process(self, row: dict) -> dict:
        image = decode(read_image(row, self.config.limits.max_bytes), self.config.limits)
        return {"ref": row["ref"], "value": loaded(self.metric)(image)}


_loaded: dict[MetricConfig, Metric] = {}


def loaded(config: MetricConfig) -> Metric:
    """The metric, kept for the life of the worker process."""
    if config not in _loaded:
        _loaded[config] = Metric(config)
    return _loaded[config]
