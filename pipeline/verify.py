"""Verify: every shard against its index, its plan and the manifest, and the tables against each other."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow.parquet as pq
import xxhash

from .config import Corpus
from .decode import ImageRefused, decode
from .ingest import sources
from .jobs import Job, Outcome, Unit
from .manifest import MANIFEST
from .plan import plan
from .score import scores_table
from .shards import CORPUS, read_index
from .storage import Folder, filesystem
from .tables import QUARANTINE, Table, rows_of

RERUN = "clearshard run {workspace}"
REWRITE = "clearshard shard {workspace} --rewrite {shard}"


@dataclass
class VerifyJob(Job):
    """Reads every tar once: its hash, its members and, unless `quick`, every image.

    An outcome's `errors` are the problems of a shard, in words.
    """

    workspace: Folder
    corpus: Corpus
    quick: bool = False
    name = "verify"

    def pending(self) -> list[Unit]:
        samples = stated(self.workspace)
        return [Unit(shard, samples.get(shard, {}).get("samples", 1), part.inputs, {"plan": part})
                for shard, part in sorted(plan(self.workspace).parts().items())]

    def tidy(self) -> None:
        """Nothing is written."""

    def rehearse(self, unit: Unit, rows: int) -> int:
        return 0

    def run(self, unit: Unit, isolate: bool = False) -> Outcome:
        folder = self.workspace / "shards"
        try:
            index, about = read_index(folder, unit.key)
            members = {f"{row['key']}.{row['extension']}": row for row in index.to_pylist()}
            problems = [*self._plan_problems(unit, set(index["key"].to_pylist()), about),
                        *self._tar_problems(folder, unit.key, members, about)]
        except FileNotFoundError as error:
            problems, about = [f"its tar or index is missing ({error})"], {"bytes": "0"}
        except (tarfile.TarError, OSError) as error:
            problems, about = [f"its tar cannot be read ({error})"], {"bytes": "0"}
        counted = {f"{unit.key}: {problem}": 1 for problem in problems}
        return Outcome(unit.key, unit.rows, min(unit.rows, len(problems)), 0, int(about["bytes"]), counted)

    def _plan_problems(self, unit: Unit, found: set[str], about: dict[str, str]) -> Iterator[str]:
        if about["plan"] != unit.inputs:
            yield "it was written from an older plan"
        wanted = set(plan(self.workspace).read(unit.parts["plan"], ["key"])["key"].to_pylist())
        if extra := found - wanted:
            yield f"{len(extra)} samples are not in its plan, {min(extra)} for one"
        if not wanted - found:
            return
        failures = Table(self.workspace / "quarantine" / "shard", QUARANTINE)
        part = failures.parts().get(unit.key)
        refused = failures.read(part).num_rows if part else 0
        if len(wanted - found) > refused:
            yield f"{len(wanted - found) - refused} planned samples are missing, {min(wanted - found)} for one"

    def _tar_problems(self, folder: Folder, shard: str, members: dict, about: dict[str, str]) -> Iterator[str]:
        fs, path = filesystem((folder / f"{shard}.tar").uri)
        with fs.open_input_stream(path) as file:
            stream = Hashed(file)
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    row = members.pop(member.name, None)
                    yield from self._member_problems(member, tar.extractfile(member).read(), row)
            stream.drain()
        for name in members:
            yield f"{name} is in the index and not in the tar"
        if (str(stream.size), stream.hash.hexdigest()) != (about["bytes"], about["xxh3"]):
            yield f"its bytes differ from those written ({stream.size} now, {about['bytes']} then)"

    def _member_problems(self, member: tarfile.TarInfo, data: bytes, row: dict | None) -> Iterator[str]:
        if row is None:
            yield f"{member.name} is in the tar and not in the index"
            return
        if (member.offset_data, member.size) != (row["offset"], row["size"]):
            yield f"{member.name} lies elsewhere than the index says"
        if xxhash.xxh3_128_hexdigest(data) != row["xxh3"]:
            yield f"{member.name} has changed since it was written"
        if row["extension"] == "json":
            try:
                json.loads(data)
            except ValueError as error:
                yield f"{member.name} is not JSON: {error}"
        elif row["extension"] != "txt" and not self.quick:
            try:
                decode(data, self.corpus.score.limits)
            except ImageRefused as error:
                yield f"{member.name} does not decode: {error}"


class Hashed:
    """A stream that hashes what is read through it."""

    def __init__(self, file: BinaryIO):
        self.file, self.size, self.hash = file, 0, xxhash.xxh3_128()

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size) if size >= 0 else self.file.read()
        self.size += len(data)
        self.hash.update(data)
        return data

    def drain(self) -> None:
        while self.read(1 << 20):
            pass


def stated(workspace: Folder) -> dict[str, dict]:
    """What `corpus.json` says of each shard; {} before the first corpus is finished."""
    try:
        return json.loads((workspace / "shards").read(CORPUS))["shards"]
    except (FileNotFoundError, ValueError):
        return {}


def table_problems(workspace: Folder) -> list[tuple[str, str]]:
    """(problem, command that mends it) of tables, manifest and `corpus.json`; a row for each source row."""
    found = []
    scored, refused = scores_table(workspace), Table(workspace / "quarantine" / "score", QUARANTINE)
    scored_parts, refused_parts, fetched = scored.parts(), refused.parts(), links_keys(workspace)
    for key in sources(workspace).parts():
        if key not in scored_parts:
            found.append((f"scores: part {key} is not scored", RERUN))
            continue
        rows = count(scored, scored_parts[key]) + (count(refused, refused_parts[key]) if key in refused_parts else 0)
        if rows != rows_of(key) and key not in fetched:
            found.append((f"scores: part {key} accounts for {rows} of {rows_of(key)} rows", RERUN))
    return found + list(_manifest_problems(workspace))


def count(table: Table, part: object) -> int:
    fs, path = filesystem((table.folder / part.file).uri)
    with fs.open_input_file(path) as file:
        return pq.read_metadata(file).num_rows


def links_keys(workspace: Folder) -> set[str]:
    """Parts whose rows were fetched: what did not arrive is in the quarantine of `fetch`."""
    return {name.split("~")[0] for name in (workspace / "links").names()}


def _manifest_problems(workspace: Folder) -> Iterator[tuple[str, str]]:
    folder, said, planned = workspace / "shards", stated(workspace), set(plan(workspace).parts())
    if not planned:
        return
    if set(said) != planned:
        yield f"corpus.json names {len(said)} shards, planned are {len(planned)}", RERUN
    for name in folder.names():
        if name.endswith(".tar") and name.removesuffix(".tar") not in planned:
            yield f"{name} belongs to no plan; delete it or move it elsewhere", RERUN
    try:
        fs, path = filesystem((folder / MANIFEST).uri)
        with fs.open_input_file(path) as file:
            rows = pq.read_metadata(file).num_rows
    except (FileNotFoundError, OSError) as error:
        yield f"{MANIFEST} cannot be read: {error}", RERUN
        return
    samples = sum(shard["samples"] for shard in said.values())
    if rows != samples:
        yield f"{MANIFEST} has {rows} rows, the shards have {samples} samples", RERUN
