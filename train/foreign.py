"""Tars that others wrote: read once, so that from then on every sample is one jump away.

    clearshard index FOLDER

Beside each `NAME.tar` comes `NAME.index.parquet`, as beside our own, and `corpus.json` says what is there. The tars
stay as they are.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
import typer
import xxhash

from pipeline.shards import CORPUS
from pipeline.storage import Folder, WorkspaceError, filesystem, read_bytes
from pipeline.tables import INDEX
from pipeline.verify import Hashed

from .corpus import SUFFIX, CorpusError, Index, Member, group_of, image_of, listing

NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")     # key and extension, as webdataset splits them
SKIPPED = re.compile(r"__[^/]*__($|/)")             # what webdataset takes for its own notes


def index_foreign(place: str, group: str | None = None) -> dict[str, dict]:
    """Indexes the tars of a folder that have no index yet and writes `corpus.json`; returns its shards.

    Keys are grouped as webdataset does: neighbouring members with the same path up to the first dot of the name.
    Samples without an image are left out of the index. `group`: of all tars; by default by their names
    (`face-0001.tar`: face; without a dash: hq).

    Raises:
        CorpusError: no tars, a damaged one, a corpus that `clearshard run` wrote.
    """
    folder = Folder.at(place)
    listed = listing(folder)
    names = sorted(name.removesuffix(".tar") for name in listed if name.endswith(".tar"))
    if not names:
        raise CorpusError(f"{folder} holds no .tar files; compressed ones must be unpacked (gzip -d) first")
    if CORPUS in listed and b'"foreign"' not in folder.read(CORPUS):
        raise CorpusError(f"{folder} is a corpus that `clearshard run` wrote: it has its indexes. `clearshard verify` "
                          "checks them")

    def one(name: str) -> dict:
        index = _index(folder, name, listed)
        return {"samples": index.samples, "bytes": index.bytes, "xxh3": index.xxh3, "group": group or group_of(name)}

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        shards = dict(zip(names, pool.map(one, names), strict=True))
    folder.write(CORPUS, json.dumps({"format": 1, "foreign": True, "shards": shards}, indent=1).encode())
    return shards


def _index(folder: Folder, name: str, listed: dict[str, int]) -> Index:
    """The index that is there if it fits the size of the tar, or a new one."""
    if f"{name}{SUFFIX}" in listed:
        index = Index.read(folder, name)
        if index.bytes == listed[f"{name}.tar"]:
            return index
    uri = (folder / f"{name}.tar").uri
    fs, path = filesystem(uri)
    try:
        with fs.open_input_stream(path) as file:
            stream = Hashed(file)
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                rows = [row for sample in _samples(tar) for row in sample]
                end = tar.offset
            stream.drain()
        if end < stream.size and read_bytes(uri, end, min(512, stream.size - end)).strip(b"\0"):
            raise tarfile.ReadError(f"no member header at byte {end}")     # tarfile takes garbage for the end
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise CorpusError(f"{folder}/{name}.tar is damaged ({error}). Fetch it again, or move it away and run this "
                          "command again") from error
    about = {"plan": "", "bytes": str(stream.size), "xxh3": stream.hash.hexdigest()}
    table, sink = pa.Table.from_pylist(rows, schema=INDEX), pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(about), sink, compression="zstd")
    folder.write(f"{name}{SUFFIX}", sink.getvalue())
    return Index(table, about)


def _samples(tar: tarfile.TarFile) -> Iterator[list[dict]]:
    """The rows of each sample that has an image."""
    sample: list[dict] = []
    for member in tar:
        tar.members = []                    # tarfile would keep them all
        match = NAME.fullmatch(member.name)
        if not member.isreg() or SKIPPED.match(member.name) or match is None:
            continue
        key, extension = match[1], match[2].lower()
        if sample and sample[0]["key"] != key:
            yield from _with_image(sample)
            sample = []
        if any(row["extension"] == extension for row in sample):
            raise ValueError(f"{member.name} is there twice in one sample")
        data = tar.extractfile(member).read()
        if member.issparse() or len(data) != member.size:
            raise ValueError(f"{member.name} is sparse or ends early, after {len(data)} of {member.size} bytes")
        sample.append({"key": key, "extension": extension, "offset": member.offset_data, "size": member.size,
                       "xxh3": xxhash.xxh3_128_hexdigest(data)})
    yield from _with_image(sample)


def _with_image(sample: list[dict]) -> Iterator[list[dict]]:
    if image_of([Member(row["extension"], row["offset"], row["size"], row["xxh3"]) for row in sample]):
        yield sample


def index(folder: Annotated[str, typer.Argument(help="A folder of WebDataset tars, local or on an object store.")],
          group: Annotated[str | None, typer.Option(help="The group of all of them.")] = None) -> None:
    """Index tars that others wrote, once, so that training can read them in any order."""
    try:
        shards = index_foreign(folder, group)
    except WorkspaceError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{sum(about['samples'] for about in shards.values()):,} samples in {len(shards):,} tars")
