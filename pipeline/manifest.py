"""The manifest and `corpus.json`: what a finished corpus holds, from the plans and indexes of its shards."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from .config import Corpus
from .plan import plan
from .shards import CORPUS, read_index
from .storage import Folder
from .tables import PLAN, Part, Table

MANIFEST = "manifest.parquet"
SCHEMA = pa.schema([
    pa.field("shard", pa.string(), nullable=False),
    pa.field("position", pa.int32(), nullable=False),   # among the samples of its shard
    pa.field("group", pa.string(), nullable=False),
    pa.field("extension", pa.string(), nullable=False),
    pa.field("bytes", pa.int64(), nullable=False),      # of the image
    *(PLAN.field(name) for name in ("key", "uid", "uri", "tile", "caption", "provenance")),
])
PACKAGES = ("clearshard", "pillow", "simplejpeg", "opencv-python", "numpy", "pyarrow", "duckdb", "ray", "webdataset")


def publish(workspace: Folder, corpus: Corpus) -> dict:
    """Writes `manifest.parquet` and `corpus.json`, shard by shard; returns the content of the latter."""
    folder, table = workspace / "shards", plan(workspace)
    shards, groups = {}, {}
    with folder.staged(MANIFEST) as path, pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for shard, part in sorted(table.parts().items()):
            rows, about = shard_rows(folder, table, shard, part)
            if rows.num_rows:
                writer.write_table(rows)
            shards[shard] = {"samples": rows.num_rows, "bytes": int(about["bytes"]), "xxh3": about["xxh3"],
                             "plan": about["plan"]}
            group = groups.setdefault(shard.rpartition("-")[0], {"shards": 0, "samples": 0, "bytes": 0})
            for name, value in (("shards", 1), ("samples", rows.num_rows), ("bytes", int(about["bytes"]))):
                group[name] += value
    summary = {"format": 1, "groups": groups, "config": corpus.model_dump(mode="json"), "versions": versions(),
               "shards": shards}
    folder.write(CORPUS, json.dumps(summary, indent=1, sort_keys=True).encode())
    return summary


def shard_rows(folder: Folder, table: Table, shard: str, part: Part) -> tuple[pa.Table, dict[str, str]]:
    """The manifest's rows of one shard (samples that could not be written are missing), and its index's note."""
    index, about = read_index(folder, shard)
    images = {row["key"]: row for row in index.to_pylist() if row["extension"] not in ("txt", "json")}
    planned = {row["key"]: row for row in table.read(part).to_pylist()}
    rows = list(_rows(shard, images, planned))
    return pa.Table.from_pylist(rows, schema=SCHEMA), about


def _rows(shard: str, images: dict[str, dict], planned: dict[str, dict]) -> Iterator[dict]:
    for position, (key, member) in enumerate(images.items()):
        yield planned[key] | {"shard": shard, "position": position, "group": shard.rpartition("-")[0],
                              "extension": member["extension"], "bytes": member["size"]}


def versions() -> dict[str, str]:
    """Versions of what decides bytes, so that a difference between two machines can be explained."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
