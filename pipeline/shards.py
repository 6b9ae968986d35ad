"""Shards: WebDataset tars written from their plan, each by one task, with an index beside it.

The index is the mark of completion: it names the plan that its tar was made from. A tar's bytes depend on
its plan alone.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from PIL import Image

from .config import Corpus
from .crops import Crops
from .decode import read_header
from .jobs import Job, Outcome, Unit, attempt, tally
from .plan import plan
from .storage import Folder, WorkspaceError
from .tables import INDEX, QUARANTINE, Part, Table
from .tar import TarWriter

CORPUS = "corpus.json"


class DamagedIndex(WorkspaceError):
    """An index that is not what was written."""


@dataclass
class ShardJob(Job):
    """Writes every tar that is planned and not written, or planned anew."""

    workspace: Folder
    corpus: Corpus
    rewrite: tuple[str, ...] = ()   # shards to write again whatever their index says
    name = "shard"

    @property
    def folder(self) -> Folder:
        return self.workspace / "shards"

    def pending(self) -> list[Unit]:
        table, known, failed = plan(self.workspace), written(self.folder), self.quarantine.parts()
        units = []
        for shard, part in sorted(table.parts().items()):
            if known.get(shard) != part.inputs or shard in self.rewrite:
                rows = table.read(part, ["key"]).num_rows
                units.append(Unit(shard, rows, part.inputs, {"plan": part}, failed=failed.get(shard)))
        return units

    def tidy(self) -> None:
        self.folder.sweep()
        self.quarantine.tidy()

    @property
    def quarantine(self) -> Table:
        return Table(self.workspace / "quarantine" / self.name, QUARANTINE)

    def rehearse(self, unit: Unit, rows: int) -> int:
        planned = plan(self.workspace).read(unit.parts["plan"]).slice(0, rows).to_pylist()
        encoder = Encoder(self.corpus)
        for row in planned:
            attempt(encoder.sample, row, self.name)
        return len(planned)

    def run(self, unit: Unit, isolate: bool = False) -> Outcome:
        rows = plan(self.workspace).read(unit.parts["plan"]).to_pylist()
        tar, index = f"{unit.key}.tar", f"{unit.key}.index.parquet"
        bad, encoder = [], Encoder(self.corpus)
        self.folder.delete(index)       # from here on the shard is not complete
        if not rows:
            self._remove(unit.key, tar, unit.parts["plan"])
            return Outcome(unit.key, 0)
        with self.folder.staged(tar) as path, TarWriter(path) as writer:
            for row in rows:
                members, failure = attempt(encoder.sample, row | {"name": row["uri"]}, self.name)
                if failure is None:
                    writer.add(members)
                else:
                    bad.append(failure)
        if bad:
            self.quarantine.write(unit.key, unit.inputs, bad, replaces=unit.failed)
        elif unit.failed is not None:
            self.quarantine.folder.delete(unit.failed.file)
        self.folder.write(index, index_bytes(writer, unit.inputs))
        return Outcome(unit.key, len(rows), len(bad), 0, writer.size, tally(bad))

    def _remove(self, shard: str, tar: str, part: Part) -> None:
        """All samples of this shard were dropped."""
        self.folder.delete(tar)
        plan(self.workspace).folder.delete(part.file)


class Encoder:
    """Turns rows of a plan into members of a tar."""

    def __init__(self, corpus: Corpus):
        self.corpus, self.crops = corpus, Crops(corpus.score.limits)

    def sample(self, row: dict) -> list[tuple[str, bytes]]:
        """The members of one sample: image, caption if there is one, provenance; raises as `Crops.file`."""
        extension, image = self.image(row)
        members = [(f"{row['key']}.{extension}", image)]
        if row["caption"] is not None:
            members.append((f"{row['key']}.txt", row["caption"].encode()))
        return [*members, (f"{row['key']}.json", row["provenance"].encode())]

    def image(self, row: dict) -> tuple[str, bytes]:
        """(extension, bytes) of the tile."""
        if is_original(self.crops.file(row), row["tile"], self.corpus):
            return "jpg", self.crops.data
        return encode(self.crops.pixels(row), self.corpus)


def is_original(data: bytes, tile: dict, corpus: Corpus) -> bool:
    """Whether the tile is the whole of an upright sRGB JPEG, whose bytes are then kept as they are."""
    header = read_header(data, corpus.score.limits)
    whole = (tile["width"], tile["height"]) == (tile["out_width"], tile["out_height"]) == (header.width, header.height)
    return (whole and header.format == "jpeg" and header.orientation == 1 and not header.has_icc
            and header.mode in ("RGB", "L"))


def encode(image: np.ndarray, corpus: Corpus) -> tuple[str, bytes]:
    """(extension, bytes) of an (H, W, 3) uint8 image: JPEG 4:4:4, or lossless WebP or PNG."""
    config = corpus.shard
    if config.encoding == "jpeg":
        return "jpg", simplejpeg.encode_jpeg(image, config.quality, "RGB", "444", fastdct=False)
    if config.encoding == "png":
        return "png", cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, "WEBP", lossless=True, method=4, exact=True)
    return "webp", sink.getvalue()


def index_bytes(writer: TarWriter, plan_digest: str) -> pa.Buffer:
    """The index of a tar as Parquet: a row per member, and of the whole its plan, size and hash."""
    rows = [{"key": key, "extension": extension, "offset": m.offset, "size": m.size, "xxh3": m.xxh3}
            for m in writer.members for key, _, extension in [m.name.partition(".")]]
    about = {"plan": plan_digest, "bytes": str(writer.size), "xxh3": writer.xxh3}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=INDEX).replace_schema_metadata(about), sink, compression="zstd")
    return sink.getvalue()


def read_index(folder: Folder, shard: str) -> tuple[pa.Table, dict[str, str]]:
    """The index of a shard and what it says of the whole tar: plan, bytes, xxh3.

    Raises:
        DamagedIndex: it cannot be read.
        FileNotFoundError, OSError: as the storage answers.
    """
    name = f"{shard}.index.parquet"
    data = folder.read(name)
    try:
        table = pq.read_table(pa.BufferReader(data))
        return table, {about: table.schema.metadata[about.encode()].decode() for about in ("plan", "bytes", "xxh3")}
    except (pa.ArrowException, OSError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise DamagedIndex(f"{name} is damaged ({error}); `clearshard verify` says what mends it") from error


def written(folder: Folder) -> dict[str, str]:
    """Which shards are complete, and the digest of the plan that each was made from ("": cannot be read).

    `corpus.json` knows those of the last finished run; only the others' indexes are opened.
    """
    names, known = set(folder.names()), stated(folder)
    complete = [n.removesuffix(".index.parquet") for n in names if n.endswith(".index.parquet")]
    return {shard: known[shard]["plan"] if shard in known else _plan_of(folder, shard)
            for shard in complete if f"{shard}.tar" in names}


def _plan_of(folder: Folder, shard: str) -> str:
    try:
        return read_index(folder, shard)[1]["plan"]
    except DamagedIndex:
        return ""


def stated(folder: Folder) -> dict[str, dict]:
    """What `corpus.json` says of each shard; {} before the first corpus is finished, and if it is damaged."""
    try:
        return json.loads(folder.read(CORPUS))["shards"]
    except (FileNotFoundError, ValueError, KeyError):
        return {}
