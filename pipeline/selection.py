"""Select: one query over the tables decides what is kept; no image is touched and no row is thrown away."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import duckdb
import pyarrow as pa
import pyarrow.types as types

from . import scores
from .config import ConfigError, Corpus, Range
from .dedup import duplicates
from .ingest import sources
from .jobs import Job, Outcome, Unit
from .query import cut, database
from .score import METRIC, SCORES, metric_table, scores_table
from .storage import Folder
from .tables import DUPLICATES, SELECTION, SOURCES, Part, Table, contents, digest, rows_of

# Ranges of facts that hold unless `select.facts` says otherwise; docs/scores.md shows on what they were judged.
DEFAULTS: dict[str, Range] = {
    "jpeg_quality": Range(min=75),
    "upscale": Range(max=1.75),
    "blockiness": Range(max=2.0),
    "noise": Range(max=4.0),
    "sharpness": Range(min=2.0),
    "flat_share": Range(max=0.98),
    "entropy": Range(min=4.8),
    "clipped_dark": Range(max=0.5),
    "clipped_bright": Range(max=0.4),
    "border": Range(max=0.3),
}
REPLACED, DUPLICATE = "replaced", "duplicate"       # reasons that are no rules


def selection(workspace: Folder) -> Table:
    return Table(workspace / "selection", SELECTION)


def rules(corpus: Corpus) -> dict[str, str]:
    """Name of each rule and the SQL condition of being kept, in the order in which they are asked.

    Raises:
        ConfigError: a range for a fact or metric that does not exist; a rule of one's own with a taken name.
    """
    config = corpus.select
    found = {"too_small": f"least(width, height) >= {config.min_side}",
             "aspect": f"greatest(width, height) <= {config.max_aspect} * least(width, height)"}
    if not config.keep_grey:
        found["grey"] = "not grey"
    for name, limits in ranges(corpus).items():
        column = f'metric_{name}."value"' if name in config.metrics else f'"{name}"'
        found |= _range(name, column, limits)
    for name in config.where:
        if name in {*found, REPLACED, DUPLICATE}:
            raise ConfigError(f"select.where: {name!r} is the name of a built-in reason; choose another")
    return found | config.where


def check_rules(corpus: Corpus) -> None:
    """Asks every rule of empty tables, so that a typing error is found before hours of scoring.

    Raises:
        ConfigError: as `rules`, or a condition that is no SQL, names a column that is not there, or is not
            true or false.
    """
    rules(corpus)
    empty = {"scores": SCORES, "sources": SOURCES, "duplicates": DUPLICATES} | {
        f"metric_{m.name}": METRIC for m in corpus.score.metrics}
    if corpus.select.where:
        with database(**{name: schema.empty_table() for name, schema in empty.items()}) as db:
            _ask_each(db, corpus)


def _ask_each(db: duckdb.DuckDBPyConnection, corpus: Corpus) -> None:
    """Runs each own rule alone, so that the one that does not work can be named."""
    for name, sql in corpus.select.where.items():
        where = f"select.where: rule {name!r} ({sql}):"
        try:
            answer = db.sql(f"select ({sql}\n) as answer from {_joined(corpus)}")
            if str(answer.types[0]) not in ("BOOLEAN", "NULL"):
                raise ConfigError(f"{where} a condition is true or false, and this is of type {answer.types[0]}")
            answer.aggregate("count(answer)").fetchall()
        except duckdb.Error as error:
            raise ConfigError(f"{where} {str(error).partition(chr(10) * 2)[0]}") from None


def ranges(corpus: Corpus) -> dict[str, Range]:
    """The range of each fact and metric that has one: the defaults, and over them what is configured.

    Raises:
        ConfigError: a name that no fact or metric has.
    """
    config = corpus.select
    for name in config.facts:
        _must_exist(name, [fact.name for fact in scores.FACTS if is_number(fact)], "select.facts")
    for name in config.metrics:
        _must_exist(name, [metric.name for metric in corpus.score.metrics], "select.metrics")
    return DEFAULTS | config.facts | config.metrics


def is_number(fact: scores.Fact) -> bool:
    """Whether a fact is a measured number: of those there are ranges and histograms."""
    return (types.is_floating(fact.type) or types.is_integer(fact.type)) and not fact.name.startswith("phash")


def _must_exist(name: str, known: list[str], where: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known) or 'none'}"
        raise ConfigError(f"{where}: {name!r} is no number that is computed; {hint}")


def _range(name: str, column: str, limits: Range) -> dict[str, str]:
    low = {f"{name}_low": f"{column} >= {limits.min}"} if limits.min is not None else {}
    high = {f"{name}_high": f"{column} <= {limits.max}"} if limits.max is not None else {}
    return low | high


def query(corpus: Corpus) -> str:
    """The selection as SQL over scores, sources, duplicates and the metrics: one row per scored image.

    The first rule that fails gives the reason. Of a cluster of duplicates the best image that passes all
    rules is kept, so that a rejected image never takes its good copy along. Copies with equal bytes always
    go, near ones unless `keep_near_duplicates`.
    """
    cases = "\n".join(f"when not coalesce(({sql}\n), true) then {quoted(name)}" for name, sql in rules(corpus).items())
    alike = "uid" if corpus.select.keep_near_duplicates else "cluster"
    return f"""
        with newest as (
            select uri, "offset", arg_max(ref, modified) as ref from sources where modified is not null
            group by all having count(*) > 1),
        outdated as (
            select sources.ref from sources join newest on sources.uri = newest.uri
            and sources."offset" is not distinct from newest."offset" and sources.ref != newest.ref),
        judged as (
            select scores.ref, scores.uid, part, "group", cluster, duplicates.rank,
            case when scores.ref in (select ref from outdated) then '{REPLACED}' {cases} end as reason
            from {_joined(corpus)}),
        best as (
            select {alike}, min(rank) as rank from judged where reason is null and cluster is not null
            group by {alike})
        select ref, uid, part, "group", final is null as kept, final as reason from (
            select judged.*, coalesce(reason, case when judged.rank > best.rank then '{DUPLICATE}' end) as final
            from judged left join best on best.{alike} = judged.{alike})"""


def _joined(corpus: Corpus) -> str:
    """The tables whose columns a rule can name, as SQL: one row per scored image."""
    metrics = "".join(f" left join metric_{m.name} on metric_{m.name}.ref = scores.ref" for m in corpus.score.metrics)
    return ("scores join sources on sources.ref = scores.ref left join duplicates on duplicates.ref = scores.ref"
            + metrics)


def quoted(text: str) -> str:
    """A text as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"


@dataclass
class SelectJob(Job):
    """One query for the whole corpus; its result is cut along the parts of the scores."""

    workspace: Folder
    corpus: Corpus
    name = "select"

    def tables(self) -> dict[str, Table]:
        metrics = {f"metric_{m.name}": metric_table(self.workspace, m.name) for m in self.corpus.score.metrics}
        return {"scores": scores_table(self.workspace), "sources": sources(self.workspace),
                "duplicates": duplicates(self.workspace)} | metrics

    def pending(self) -> list[Unit]:
        held = contents(self.tables())
        if not held["scores"]:
            return []
        expected, done = digest(query(self.corpus), held), selection(self.workspace).parts()
        missing = [key for key, _ in held["scores"] if key not in done or done[key].inputs != expected]
        return [Unit("all", sum(map(rows_of, missing)), expected)] if missing else []

    def tidy(self) -> None:
        selection(self.workspace).tidy()

    def rehearse(self, unit: Unit, rows: int) -> int:
        return 0

    def run(self, unit: Unit, isolate: bool = False) -> Outcome:
        table, keys = selection(self.workspace), set(scores_table(self.workspace).parts())
        done, written = table.parts(), 0
        with database(**{name: t.dataset() for name, t in self.tables().items()}) as db:
            for key, rows in cut(self._judged(db), "part"):
                written += len(rows)
                _write(table, key, unit.inputs, rows, done.get(key))
                keys.discard(key)
        for key in keys:        # parts of which every row is in the quarantine
            _write(table, key, unit.inputs, SELECTION.empty_table(), done.get(key))
        return Outcome(unit.key, written)

    def _judged(self, db: duckdb.DuckDBPyConnection) -> pa.RecordBatchReader:
        try:
            return db.sql(f"select * from ({query(self.corpus)}) order by part, ref").to_arrow_reader(10_000)
        except (duckdb.DataError, duckdb.ProgrammingError):
            _ask_each(db, self.corpus)      # a value of this corpus that a rule cannot take: says which rule
            raise


def _write(table: Table, key: str, inputs: str, rows: pa.Table, earlier: Part | None) -> None:
    if earlier is not None and earlier.inputs == inputs:
        return
    kept = [ref for ref, keep in zip(rows["ref"].to_pylist(), rows["kept"].to_pylist(), strict=True) if keep]
    # Later jobs depend on what is kept and not on the reasons of the rest.
    table.write(key, inputs, rows.select(SELECTION.names), content=digest(sorted(kept)), replaces=earlier)
