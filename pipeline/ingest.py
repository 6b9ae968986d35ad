"""Ingest: what is new in the sources becomes parts of `sources/` (or `links/`, if it must be fetched).

The listing is staged in a local file, compared with what is known by a query that spills to disk, and only
new references are cut into parts. Nothing holds all rows.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

from .config import Corpus
from .jobs import error_class
from .query import database
from .sources import LINKS, list_source
from .storage import Folder
from .tables import QUARANTINE, SOURCES, Table, digest

PARTS_WANTED = 64       # a small corpus is cut this finely, so that every core has work and a kill costs little
LARGEST_PART = 1000


@dataclass(frozen=True)
class Ingested:
    """What an ingest found."""

    listed: int
    new: int
    to_fetch: int
    problems: int = 0               # folders, tars and tables that could not be listed


@dataclass
class Problems:
    """Places that could not be listed; they replace those of the last ingest in the quarantine."""

    rows: list[dict] = field(default_factory=list)

    def add(self, uri: str, error: Exception) -> None:
        self.rows.append({"ref": digest(uri, length=24), "name": uri, "stage": "ingest",
                          "error": error_class(error), "message": str(error)[:500]})

    def write(self, workspace: Folder) -> None:
        table = Table(workspace / "quarantine" / "ingest", QUARANTINE)
        earlier = table.parts().get("000000-0-listing")
        if self.rows or earlier:
            table.write("000000-0-listing", "listing", self.rows, replaces=earlier)


def sources(workspace: Folder) -> Table:
    return Table(workspace / "sources", SOURCES)


def links(workspace: Folder) -> Table:
    return Table(workspace / "links", LINKS)


def ingest(workspace: Folder, corpus: Corpus, limit: int | None = None, write: bool = True) -> Ingested:
    """Lists all sources and adds what is new; with `write=False` only counts."""
    known, waiting = sources(workspace), links(workspace)
    if write:
        known.tidy()
        waiting.tidy()
    with tempfile.TemporaryDirectory(prefix="clearshard-ingest-") as scratch:
        staged = os.path.join(scratch, "listing.parquet")
        problems = Problems()
        rows = (row for source in corpus.sources for row in list_source(source, problems.add))
        listed = _stage(rows, staged)
        if write:
            problems.write(workspace)
        with database(known=known.dataset(), waiting=waiting.dataset()) as db:
            db.execute(f"""
                create table fresh as select min(position) as position from '{staged}'
                where ref not in (select ref from known union all select ref from waiting)
                group by ref""")
            if limit is not None:
                db.execute(f"delete from fresh where position not in "
                           f"(select position from fresh order by position limit {int(limit)})")
            counts = [0, 0]
            for index, (table, fetched) in enumerate(((known, "false"), (waiting, "true"))):
                query = f"""from '{staged}' semi join fresh using (position)
                            where (cell is not null or uri similar to 'https?://.*') = {fetched}"""
                counts[index] = db.sql(f"select count(*) {query}").fetchall()[0][0]
                if write and counts[index]:
                    reader = db.sql(f"select * exclude (position) {query} order by position")
                    _cut(table, reader.to_arrow_reader(LARGEST_PART), counts[index],
                         _next_number(known, waiting))
    return Ingested(listed, sum(counts), counts[1], len(problems.rows))


def _stage(rows: Iterable[dict], path: str) -> int:
    """Writes the listing to a local file in batches; returns its length."""
    schema = LINKS.append(pa.field("position", pa.int64()))
    position = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        rows = iter(rows)
        while batch := list(islice(rows, 10_000)):
            for row in batch:
                row["position"] = position
                position += 1
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
    return position


def _next_number(*tables: Table) -> int:
    keys = [key for table in tables for key in table.parts()]
    return 1 + max((int(key.split("-")[0]) for key in keys), default=-1)


def _cut(table: Table, batches: Iterable[pa.RecordBatch], total: int, number: int) -> None:
    """Cuts a stream of rows into parts; their size depends on how many there are."""
    size = max(1, min(LARGEST_PART, -(-total // PARTS_WANTED)))
    for rows in _rechunked(batches, size):
        key = f"{number:06d}-{len(rows)}-{digest(rows['ref'].to_pylist(), length=8)}"
        place = rows.schema.get_field_index("part")
        rows = rows.set_column(place, "part", pa.array([key] * len(rows))).select(table.schema.names)
        table.write(key, "listing", rows, content=digest(key))
        number += 1


def _rechunked(batches: Iterable[pa.RecordBatch], size: int) -> Iterator[pa.Table]:
    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        while sum(len(b) for b in held) >= size:
            table = pa.Table.from_batches(held)
            yield table.slice(0, size)
            held = table.slice(size).to_batches()
    if held:
        yield pa.Table.from_batches(held)
