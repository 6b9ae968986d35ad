"""Negatives: images of poor quality, planned row by row and then painted by SDXL.

SUPIR makes them from its own training images, at strength 0.5, with words of poor quality as the prompt.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import ceil

import duckdb
import numpy as np
import pyarrow as pa

from degrade.strict import ConfigError
from pipeline import scores
from pipeline.ahead import ahead
from pipeline.config import Corpus, Range
from pipeline.decode import Limits
from pipeline.ingest import sources
from pipeline.jobs import Attempt, Job, Outcome, Replicas, RowJob, Unit, failure
from pipeline.plan import NEGATIVE, captions, negatives
from pipeline.query import database
from pipeline.shards import encode
from pipeline.storage import Folder
from pipeline.tables import QUARANTINE, TILE, Part, Table, digest, rows_of
from pipeline.tar import TarWriter
from pipeline.tile import KEY, tiles

from .config import Negatives, negatives_of
from .painting import Painted, Sources, likeness, painter

PART = 64           # rows of one unit: half a minute of a GPU, which is what a kill can cost
STATE = "state.json"

PLAN = pa.schema([
    pa.field("key", pa.string(), nullable=False),
    pa.field("source", pa.string()),                   # key of the tile that is painted over or described; null: none
    pa.field("round", pa.int32(), nullable=False),     # how often that tile came before
    *(pa.field(name, pa.string()) for name in ("ref", "uid", "uri")),
    pa.field("offset", pa.int64()),
    pa.field("length", pa.int64()),
    *(pa.field(name, pa.string()) for name in ("name", "licence", "author")),
    pa.field("tile", TILE),
    pa.field("subject", pa.string()),                  # caption of the tile; null: none, or not wanted
    pa.field("words", pa.string(), nullable=False),    # of poor quality, behind the subject
    pa.field("seed", pa.int64(), nullable=False),
])


def planned(workspace: Folder) -> Table:
    return Table(workspace / "negatives" / "plan", PLAN)


@dataclass
class PlanNegativesJob(Job):
    """Which tile is painted over, with which words and which seed: a query, and rows that stay once they are planned.

    More rows go on where the plan ended; other words, another seed or another mode plan everything anew.
    """

    workspace: Folder
    corpus: Corpus
    name = "plan-negatives"

    def __post_init__(self) -> None:
        self.config: Negatives = negatives_of(self.corpus)
        self.table = planned(self.workspace)
        self.settings = digest(1, self.config.model_dump(include={"mode", "words", "with_caption", "seed"}))

    def pending(self) -> list[Unit]:
        have = self._have()
        return [Unit("all", self.config.count - have, self.settings)] if have < self.config.count else []

    def _have(self) -> int:
        """Rows that are planned and still hold."""
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            if json.loads(self.table.folder.read(STATE))["settings"] == self.settings:
                return sum(rows_of(key) for key in self.table.parts())
        return 0

    def tidy(self) -> None:
        self.table.tidy()

    def rehearse(self, unit: Unit, rows: int) -> int:
        return 0

    def run(self, unit: Unit, isolate: bool = False) -> Outcome:
        have, parts = self._have(), self.table.parts()
        if not have:
            self.table.folder.delete(STATE, *(part.file for part in parts.values()))
            parts = {}
        tables = {"tiles": tiles(self.workspace), "sources": sources(self.workspace),
                  "captions": captions(self.workspace, self.corpus), "planned": self.table}
        number, written = len(parts), 0
        with database(**{name: table.dataset() for name, table in tables.items()}) as db:
            # Copied, because the query that gives new rows runs while they are added to the table.
            db.execute("create table before as select source, round from planned")
            rows = self._rows(db, self.config.count - have)
            while some := list(islice(rows, PART)):
                self.table.write(f"{number:06d}-{len(some)}", self.settings, some)
                number, written = number + 1, written + len(some)
        self.table.folder.write(STATE, json.dumps({"settings": self.settings}).encode())
        self._drop_images()
        return Outcome(unit.key, written)

    def _rows(self, db: duckdb.DuckDBPyConnection, wanted: int) -> Iterator[dict]:
        """The next rows: every tile once, in an order of its own, then every tile again."""
        known, before = (db.sql(f"select count(*) from {table}").fetchall()[0][0]
                         for table in ("(select unnest(tiles) from tiles)", "before"))
        if not known:
            if self.config.mode == "image_to_image":
                raise ConfigError("negatives: there are no tiles to paint over. Run `clearshard tile` first, or set "
                                  "negatives.mode to text_to_image")
            yield from (self._row({"source": None, "round": before + i}) for i in range(wanted))
            return
        stream = db.sql(f"""
            with flat as (select ref, uid, unnest(tiles) as tile from tiles),
            named as (
                select {KEY}
                as source, * from flat),
            one as (select source, arg_min(named, ref) as sample from named group by source),
            rounds as (select unnest(range({ceil((before + wanted) / known) + 1}))::int as round),
            chosen as (
                select *, md5(source || round || '{self.config.seed}') as place
                from (select * from one, rounds) as every anti join before using (source, round)
                order by round, place limit {wanted}),
            said as (select key, min(coalesce(short, caption)) as subject from captions
                     where len(coalesce(flags, [])) = 0 group by key)
            select source, round, sample.ref, sample.uid, sample.tile, sources.uri, sources."offset", sources.length,
                sources.name, sources.licence, sources.author, said.subject
            from chosen join sources on sources.ref = sample.ref left join said on said.key = source
            order by round, place""").to_arrow_reader(1000)
        for batch in stream:
            yield from map(self._row, batch.to_pylist())

    def _row(self, row: dict) -> dict:
        name = (row["source"], row["round"])
        subject = row.get("subject") if self.config.with_caption else None
        return row | {"key": "neg-" + digest(*name, length=20), "subject": subject, "words": self.config.words.negative,
                      "seed": int(digest(self.config.seed, *name, length=15), 16)}

    def _drop_images(self) -> None:
        """Images of an earlier plan that has other parts leave the table, and its refused rows the quarantine."""
        keys = self.table.parts()
        for table in (negatives(self.workspace), Table(self.workspace / "quarantine" / NegativesJob.name, QUARANTINE)):
            table.folder.delete(*(part.file for key, part in table.parts().items() if key not in keys))


@dataclass
class NegativesJob(RowJob):
    """Paints the rows of the plan. `model` is the fingerprint of the model's folder."""

    workspace: Folder
    corpus: Corpus
    model: str
    retry_errors: bool = False
    name = "negatives"
    identity = "key"

    def __post_init__(self) -> None:
        self.config: Negatives = negatives_of(self.corpus)
        self.input, self.output = planned(self.workspace), negatives(self.workspace)
        self.quarantine = Table(self.workspace / "quarantine" / self.name, QUARANTINE)
        decides = {"mode", "steps", "guidance_scale", "size", "negative_prompt", "dtype"} | (
            {"strength"} if self.config.mode == "image_to_image" else set())
        self.painting = {"version": 1, "model": self.model, **self.config.model_dump(include=decides),
                         "encoding": self.corpus.shard.encoding, "quality": self.corpus.shard.quality}
        self.settings = {"painting": self.painting,
                         "flags": {name: {fact: limits.model_dump() for fact, limits in ranges.items()}
                                   for name, ranges in self.config.flags.items()}}
        self.pool = Replicas(self.config.replicas, self.config.gpus)

    @property
    def tars(self) -> Folder:
        return self.workspace / "negatives" / "tars"

    def inputs(self) -> Iterator[tuple[str, dict]]:
        """The parts of the plan, as far as `count` reaches."""
        left = self.config.count
        for key, parts in super().inputs():
            if left > 0:
                yield key, parts
            left -= rows_of(key)

    def tidy(self) -> None:
        """Also removes tars that no row names: of killed units, and of images that were painted anew."""
        super().tidy()
        self.tars.sweep()
        table = self.output.dataset().to_table(columns=["uri"])
        named = {uri.rpartition("/")[2] for uri in table["uri"].unique().to_pylist()}
        self.tars.delete(*(name for name in self.tars.names() if name not in named))

    def rows(self, unit: Unit) -> list[dict]:
        return [{**row, "image_ref": row["ref"], "ref": row["key"]} for row in
                self.input.read(unit.parts["input"]).to_pylist()]

    def process(self, row: dict) -> dict:
        raise NotImplementedError("rows are painted in batches, in attempts()")

    def rehearse(self, unit: Unit, rows: int) -> int:
        return 0                    # a dry run loads no model; `clearshard plan` says how long it would take

    def attempts(self, rows: list[dict], isolate: bool) -> Iterator[tuple[str, Attempt]]:
        prepare = Sources(self.corpus.score.limits, self.config, self.corpus.score.row_timeout_s)
        size = 1 if isolate else self.config.batch_size
        for batch in ahead(prepare, (rows[i:i + size] for i in range(0, len(rows), size))):
            yield from ((row["ref"], (None, wrong)) for row, wrong in batch.failures(self.name))
            if batch.rows:
                for row, source, painted in zip(batch.rows, batch.inputs["images"],
                                                painter(self.config)(batch.rows, batch.inputs), strict=True):
                    yield row["ref"], self._judged(row, source, painted)

    def _judged(self, row: dict, source: np.ndarray | None, painted: Painted | Exception) -> Attempt:
        if isinstance(painted, Exception):
            return None, failure(row, self.name, painted)
        extension, data = encode(painted.image, self.corpus)
        facts = scores.score(data, Limits()) | {"likeness": likeness(source, painted.image)}
        side, uid = self.config.size, facts["uid"]
        whole = {"x": 0, "y": 0, "width": side, "height": side, "out_width": side, "out_height": side, "texture": None}
        return {"key": row["ref"], "uid": uid, "tile": whole, "caption": row["words"], "facts": json.dumps(facts),
                "flags": flags_of(facts, self.config.flags), "made": self._made(row),
                "provenance": json.dumps(self._provenance(row, uid, painted, facts), sort_keys=True),
                "image": data, "extension": extension}, None

    def _provenance(self, row: dict, uid: str, painted: Painted, facts: dict) -> dict:
        source = {name: row[name] for name in ("uid", "uri", "name", "licence", "author", "tile")}
        if (row["uri"] or "").startswith(f"{(self.workspace / 'originals').uri}/"):
            source["uri"] = row["name"]     # it was fetched: where from, as in the shards' own provenance
        return {"key": row["ref"], "uid": uid, "group": NEGATIVE, "generated": True, "prompt": painted.prompt,
                "seed": row["seed"], "source": source | {"key": row["source"]} if row["uri"] else None,
                "scores": facts, **self.painting}

    def _made(self, row: dict) -> str:
        return digest(self.painting, row["source"], row["subject"], row["words"], row["seed"])

    def _earlier_rows(self, part: Part | None) -> list[dict]:
        return self._read(self.output, part)        # each row says by itself how it was made

    def renewed(self, row: dict, earlier: dict | None) -> dict | None:
        """An image that would be painted the same stays; its flags follow the configuration."""
        if earlier is None or earlier["made"] != self._made(row):
            return None
        return earlier | {"flags": flags_of(json.loads(earlier["facts"]), self.config.flags)}

    def _write(self, unit: Unit, good: list[dict], bad: list[dict]) -> None:
        """The images go into a tar of their own, and then the rows that name them into the table."""
        fresh = [row for row in good if "image" in row]
        if fresh:
            name = f"{unit.key}-{digest([row['uid'] for row in fresh])}.tar"
            with self.tars.staged(name) as path, TarWriter(path) as writer:
                for row in fresh:
                    writer.add([(f"{row['key']}.{row.pop('extension')}", row.pop("image"))])
                    place = writer.members[-1]
                    row |= {"uri": (self.tars / name).uri, "offset": place.offset, "length": place.size}
        super()._write(unit, good, bad)


def flags_of(facts: dict, flags: dict[str, dict[str, Range]]) -> list[str]:
    """The flags all of whose ranges hold; a fact that is not known holds none."""
    def within(value: float | None, limits: Range) -> bool:
        return value is not None and not (limits.min is not None and value < limits.min) \
            and not (limits.max is not None and value > limits.max)
    return [name for name, ranges in flags.items()
            if all(within(facts.get(fact), limits) for fact, limits in ranges.items())]
