"""Tables of immutable Parquet parts, and how a part's name tells what it was made from.

A workspace is built like a program by `make`: the targets are parts. `ingest` cuts the sources into parts
with keys like `000012-64-9f3a1b2c` (running number, rows, digest of the rows). Every later table has a
part for each of these keys, in a file

    KEY~INPUTS~CONTENT.parquet

where INPUTS is the digest of what the rows were computed from (the input part's CONTENT and the settings
of the job) and CONTENT the digest of what came out. So a listing of two folders tells what is pending:
no row is read, and nothing is remembered anywhere else. Two processes that do the same work write the
same bytes under the same name, so doing it twice does no harm.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from .storage import Folder, filesystem

SOURCES = pa.schema([
    pa.field("ref", pa.string(), nullable=False),      # digest of where the bytes are and which version
    pa.field("uri", pa.string(), nullable=False),
    pa.field("offset", pa.int64()),                    # of a tar member; null: the whole file
    pa.field("length", pa.int64()),
    pa.field("name", pa.string()),                     # for people: file name, member name or URL
    pa.field("group", pa.string(), nullable=False),
    pa.field("licence", pa.string()),
    pa.field("author", pa.string()),
    pa.field("text", pa.string()),                     # alt text or caption that came with it
    pa.field("extra", pa.string()),                    # further columns, as JSON
    pa.field("modified", pa.float64()),                # seconds since 1970
    pa.field("part", pa.string()),                     # key of the part that holds the row
])

QUARANTINE = pa.schema([
    pa.field("ref", pa.string(), nullable=False),
    pa.field("name", pa.string()),
    pa.field("stage", pa.string(), nullable=False),
    pa.field("error", pa.string(), nullable=False),    # short class: truncated, too_many_pixels, not_found …
    pa.field("message", pa.string()),
])

DUPLICATES = pa.schema([
    pa.field("ref", pa.string(), nullable=False),
    pa.field("uid", pa.string(), nullable=False),
    pa.field("cluster", pa.int64(), nullable=False),
    pa.field("rank", pa.int64(), nullable=False),      # 0 is the best of its cluster
    pa.field("kind", pa.string(), nullable=False),     # exact, near or mirrored; of the best one: keeper
    pa.field("distance", pa.int32()),                  # Hamming bits from the best one
])

SELECTION = pa.schema([
    pa.field("ref", pa.string(), nullable=False),
    pa.field("uid", pa.string(), nullable=False),
    pa.field("part", pa.string(), nullable=False),
    pa.field("group", pa.string(), nullable=False),
    pa.field("kept", pa.bool_(), nullable=False),
    pa.field("reason", pa.string()),                   # the first rule that it failed; null if kept
])

TILE = pa.struct([
    ("x", pa.int32()), ("y", pa.int32()), ("width", pa.int32()), ("height", pa.int32()),
    ("out_width", pa.int32()), ("out_height", pa.int32()), ("texture", pa.float32()),
])

TILES = pa.schema([
    pa.field("ref", pa.string(), nullable=False),
    pa.field("uid", pa.string(), nullable=False),
    pa.field("group", pa.string(), nullable=False),
    pa.field("tiles", pa.list_(TILE), nullable=False),  # none: no place had enough texture
])

PLAN = pa.schema([
    pa.field("shard", pa.string(), nullable=False),
    pa.field("key", pa.string(), nullable=False),
    pa.field("ref", pa.string(), nullable=False),
    pa.field("uid", pa.string(), nullable=False),
    pa.field("tile", TILE, nullable=False),
    pa.field("uri", pa.string(), nullable=False),
    pa.field("offset", pa.int64()),
    pa.field("length", pa.int64()),
    pa.field("caption", pa.string()),
    pa.field("provenance", pa.string(), nullable=False),  # KEY.json, ready to write
])

CAPTIONS = pa.schema([                                  # null: not known, as of captions from elsewhere
    pa.field("key", pa.string(), nullable=False),
    pa.field("caption", pa.string()),                  # cleaned; null: the answer held no word
    pa.field("model", pa.string()),
    pa.field("short", pa.string()),                    # the version that fits CLIP's 77 tokens
    pa.field("tokens", pa.int32()),                    # of `caption`, in CLIP's count
    pa.field("flags", pa.list_(pa.string())),          # what is wrong with it; empty: nothing
    pa.field("prompt", pa.string()),                   # name of the prompt
    pa.field("question", pa.string()),                 # what was asked
    pa.field("raw", pa.string()),                      # what was answered
    pa.field("finish_reason", pa.string()),            # stop or length
    pa.field("generated", pa.int32()),                 # tokens of the answer, in the model's count
    pa.field("attempts", pa.int8()),                   # 2: asked again with sampling
    pa.field("made", pa.string()),                     # digest of all that decided `raw`, and of what was made of it
])

NEGATIVES = pa.schema([
    pa.field("key", pa.string(), nullable=False),
    pa.field("uid", pa.string(), nullable=False),      # of the generated file
    pa.field("uri", pa.string(), nullable=False),      # the tar that holds it
    pa.field("offset", pa.int64(), nullable=False),
    pa.field("length", pa.int64(), nullable=False),
    pa.field("tile", TILE, nullable=False),            # the whole of it
    pa.field("caption", pa.string(), nullable=False),  # the negative words
    pa.field("provenance", pa.string(), nullable=False),
    pa.field("facts", pa.string(), nullable=False),    # its scores, as JSON
    pa.field("flags", pa.list_(pa.string()), nullable=False),   # black, broken, good by accident …
    pa.field("made", pa.string(), nullable=False),     # digest of the settings that decided its pixels
])

INDEX = pa.schema([
    pa.field("key", pa.string(), nullable=False),
    pa.field("extension", pa.string(), nullable=False),
    pa.field("offset", pa.int64(), nullable=False),    # of the member's data in the tar
    pa.field("size", pa.int64(), nullable=False),
    pa.field("xxh3", pa.string(), nullable=False),     # XXH3-128 of the member's data
])


def digest(*values: object, length: int = 12) -> str:
    """A short hexadecimal digest of plain values; the same on every machine and in every run."""
    text = json.dumps(values, sort_keys=True, default=str, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()[:length]


def digest_columns(table: pa.Table) -> dict[str, str]:
    """A digest of each column's values, independent of how they are chunked."""
    return {name: digest(table[name].to_pylist()) for name in table.column_names}


def digest_table(table: pa.Table) -> str:
    """A digest of a table's rows."""
    return digest(digest_columns(table))


@dataclass(frozen=True)
class Part:
    """The name of one immutable file of a table."""

    key: str
    inputs: str
    content: str

    @classmethod
    def parse(cls, name: str) -> Part | None:
        pieces = name.removesuffix(".parquet").split("~")
        return cls(*pieces) if len(pieces) == 3 and name.endswith(".parquet") else None

    @property
    def file(self) -> str:
        return f"{self.key}~{self.inputs}~{self.content}.parquet"


def rows_of(key: str) -> int:
    """How many source rows a part key stands for (`000012-64-9f3a1b2c`: 64)."""
    return int(key.split("-")[1])


def contents(tables: dict[str, Table]) -> dict[str, list[tuple[str, str]]]:
    """What tables hold now, by the names of their parts: equal contents, equal rows."""
    return {name: sorted((key, part.content) for key, part in table.parts().items()) for name, table in tables.items()}


@dataclass(frozen=True)
class Table:
    """A folder of parts with one schema."""

    folder: Folder
    schema: pa.Schema

    def parts(self) -> dict[str, Part]:
        """The current part of every key. Where a killed run left an older one beside it, the newest counts."""
        found: dict[str, Part] = {}
        for name in self.folder.names():
            part = Part.parse(name)
            if part is None:
                continue
            other = found.get(part.key)
            if other is None or self.folder.modified(part.file) >= self.folder.modified(other.file):
                found[part.key] = part
        return found

    def tidy(self) -> None:
        """Deletes temporary files and outdated parts. Only the holder of the workspace may call it."""
        self.folder.sweep()
        current = {part.file for part in self.parts().values()}
        self.folder.delete(*(name for name in self.folder.names()
                             if Part.parse(name) is not None and name not in current))

    def read(self, part: Part, columns: list[str] | None = None) -> pa.Table:
        return pq.read_table(pa.BufferReader(self.folder.read(part.file)), columns=columns)

    def metadata(self, part: Part) -> dict[str, str]:
        """What the writer noted in the file (its settings, for one)."""
        schema = pq.read_schema(pa.BufferReader(self.folder.read(part.file)))
        return {k.decode(): v.decode() for k, v in (schema.metadata or {}).items()}

    def write(self, key: str, inputs: str, rows: pa.Table | Iterable[dict], *, content: str | None = None,
              replaces: Part | None = None, **metadata: str) -> Part:
        """Writes a part and then deletes the one that it replaces.

        Raises:
            WorkspaceError: the storage refused it.
        """
        table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(list(rows), schema=self.schema)
        table = table.cast(self.schema)
        part = Part(key, inputs, content or digest_table(table))
        sink = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
        self.folder.write(part.file, sink.getvalue())
        if replaces is not None and replaces.file != part.file:
            self.folder.delete(replaces.file)
        return part

    def dataset(self) -> pads.Dataset:
        """All rows of all current parts, to be scanned or queried; nothing is read yet."""
        parts = sorted(self.parts().values(), key=lambda part: part.key)
        if not parts:
            return pads.dataset(pa.Table.from_pylist([], schema=self.schema))
        fs, path = filesystem(self.folder.uri)
        return pads.dataset([f"{path}/{part.file}" for part in parts], filesystem=fs, format="parquet",
                            schema=self.schema)
