"""The plan of the shards: which sample goes into which tar, and in which order, before any byte moves.

A plan part per shard lies in `shards/plan/`. A sample stays in its shard for ever; what is new goes into
new shards, and a shard is planned anew only where a sample of it was dropped or changed (a caption).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import duckdb
import pyarrow as pa

from .config import Corpus
from .ingest import sources
from .jobs import Job, Outcome, Unit
from .query import cut, database
from .score import SCORES, scores_table
from .selection import quoted
from .storage import Folder
from .tables import CAPTIONS, NEGATIVES, PLAN, Part, Table, contents, digest, digest_columns, rows_of
from .tile import KEY, tiles

STATE = "state.json"
NEGATIVE = "negative"       # group of the generated images
BYTES = ["key", "uid", "tile", "caption", "provenance"]     # what decides the bytes of a tar
FACTS = [name for name in SCORES.names if name not in ("ref", "uid")]


def plan(workspace: Folder) -> Table:
    return Table(workspace / "shards" / "plan", PLAN)


def captions(workspace: Folder, corpus: Corpus) -> Table:
    """The captions that the corpus uses: several sets can lie side by side, each under its name."""
    return Table(workspace / "captions" / (corpus.caption or {}).get("name", "main"), CAPTIONS)


def negatives(workspace: Folder) -> Table:
    """Generated images of poor quality, which become a group of shards."""
    return Table(workspace / "negatives" / "images", NEGATIVES)


@dataclass
class PlanJob(Job):
    """One query over tiles, sources, scores and captions, cut into shards."""

    workspace: Folder
    corpus: Corpus
    name = "plan"

    def tables(self) -> dict[str, Table]:
        return {"tiles": tiles(self.workspace), "sources": sources(self.workspace),
                "scores": scores_table(self.workspace), "captions": captions(self.workspace, self.corpus),
                "negatives": negatives(self.workspace)}

    def pending(self) -> list[Unit]:
        held = contents(self.tables())
        expected = digest(self.name, 2, held, self.corpus.shard.model_dump(), self.corpus.select.caption_flags)
        with contextlib.suppress(FileNotFoundError, ValueError):
            if json.loads(plan(self.workspace).folder.read(STATE))["inputs"] == expected:
                return []
        rows = sum(rows_of(key) for name in ("tiles", "negatives") for key, _ in held[name])
        return [Unit("all", rows, expected)] if rows or plan(self.workspace).parts() else []

    def tidy(self) -> None:
        plan(self.workspace).tidy()

    def rehearse(self, unit: Unit, rows: int) -> int:
        return 0

    def run(self, unit: Unit, isolate: bool = False) -> Outcome:
        table, written = plan(self.workspace), 0
        earlier = table.parts()
        with database(parts=table.dataset(), **{n: t.dataset() for n, t in self.tables().items()}) as db:
            # Copied, because the parts that are read here are replaced below.
            db.execute("create table planned as select shard, key from parts")
            db.execute(f"create table current as {samples(self.workspace, self.corpus)}")
            for shard, rows in self._kept(db, earlier):
                written += self._write(table, shard, rows, earlier.get(shard))
            for shard, rows in self._added(db, earlier):
                written += self._write(table, shard, rows, None)
        table.folder.write(STATE, json.dumps({"inputs": unit.inputs}).encode())
        return Outcome(unit.key, written)

    def _kept(self, db: duckdb.DuckDBPyConnection, earlier: dict[str, Part]) -> Iterator[tuple[str, pa.Table]]:
        """Shards that exist, with those of their samples that are still wanted, as they are now."""
        stream = db.sql("""select planned.shard, current.* from current join planned using (key)
                               order by planned.shard, place""").to_arrow_reader(10_000)
        gone = set(earlier)
        for shard, rows in cut(stream, "shard"):
            gone.discard(shard)
            yield shard, rows
        for shard in sorted(gone):
            yield shard, PLAN.empty_table()

    def _added(self, db: duckdb.DuckDBPyConnection, earlier: dict[str, Part]) -> Iterator[tuple[str, pa.Table]]:
        """New samples, in an order that depends on nothing but their keys and the seed, in new shards."""
        numbers = {}
        for shard in earlier:
            group, _, number = shard.rpartition("-")
            numbers[group] = max(numbers.get(group, 0), int(number) + 1)
        first = " ".join(f"when '{group}' then {number}" for group, number in numbers.items())
        stream = db.sql(f"""
            select "group" || '-' || lpad(((row_number() over (partition by "group" order by place) - 1)
                // {self.corpus.shard.samples} + case "group" {first or "when '' then 0"} else 0 end)::varchar, 6, '0')
                as shard, * from current anti join planned using (key) order by shard, place
            """).to_arrow_reader(10_000)
        yield from cut(stream, "shard")

    def _write(self, table: Table, shard: str, rows: pa.Table, earlier: Part | None) -> int:
        rows = rows.select(PLAN.names).cast(PLAN)
        columns = digest_columns(rows)
        inputs, content = digest([columns[name] for name in BYTES], encoding(self.corpus)), digest(columns)
        if earlier is not None and (earlier.inputs, earlier.content) == (inputs, content):
            return 0
        table.write(shard, inputs, rows, content=content, replaces=earlier)
        return len(rows)


def encoding(corpus: Corpus) -> dict:
    """The settings that decide how a tile is stored."""
    config = corpus.shard
    return {"version": 1, "encoding": config.encoding} | (
        {"quality": config.quality} if config.encoding == "jpeg" else {})


def samples(workspace: Folder, corpus: Corpus) -> str:
    """SQL: every sample that should be in a shard now, one row per key, with its `place` in the order.

    The tiles of an image follow one another, so that it is decoded once; the images are shuffled. A tile whose caption
    is flagged as `select.caption_flags` says has no place, nor has a negative with any flag.
    """
    facts = ", ".join(f'"{name}" := scores."{name}"' for name in FACTS)
    originals, seed = (workspace / "originals").uri, corpus.shard.seed
    unwanted = ", ".join(map(quoted, corpus.select.caption_flags))
    return f"""
        with flat as (select ref, uid, "group", unnest(tiles) as tile from tiles),
        named as (
            select *, {KEY} as key
            from flat),
        one as (select key, arg_min(named, ref) as sample from named group by key),
        said as (
            select key, unnest(min(struct_pack(caption, model, short, flags, prompt))) from captions group by key)
        select one.key, sample.ref, sample.uid, sample."group", sample.tile,
            sources.uri, sources."offset", sources.length, said.caption,
            to_json(struct_pack(
                key := one.key, uid := sample.uid, "group" := sample."group", tile := sample.tile, name := sources.name,
                uri := case when starts_with(sources.uri, '{originals}/') then sources.name else sources.uri end,
                licence := sources.licence, author := sources.author, text := sources.text, extra := sources.extra,
                caption_model := said.model, caption_prompt := said.prompt, caption_short := said.short,
                caption_flags := said.flags, scores := struct_pack({facts}))) as provenance,
            row(md5(sample.uid || '{seed}'), sample.uid, sample.tile.y, sample.tile.x) as place
        from one join sources on sources.ref = sample.ref join scores on scores.ref = sample.ref
        left join said on said.key = one.key
        where not coalesce(list_has_any(said.flags, [{unwanted}]::varchar[]), false)
        union all by name
        select key, key as ref, uid, '{NEGATIVE}' as "group", tile, uri, "offset", length, caption, provenance,
            row(md5(uid || '{seed}'), uid, tile.y, tile.x) as place
        from negatives where len(flags) = 0"""
