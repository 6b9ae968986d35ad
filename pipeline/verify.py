"""Verify: every shard against its index, its plan and the manifest, and the tables against each other."""

from __future__ import annotations

import json
import shlex
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from .config import Corpus
from .decode import ImageRefused, decode
from .ingest import sources
from .jobs import Job, Outcome, Unit
from .manifest import MANIFEST
from .plan import plan
from .score import ScoreJob
from .shards import DamagedIndex, read_index, stated
from .storage import Folder, filesystem
from .tables import QUARANTINE, Part, Table, rows_of


def rerun(workspace: Folder) -> str:
    return f"clearshard run {shlex.quote(str(workspace))}"


def rewrite(workspace: Folder, shard: str) -> str:
    return f"clearshard shard {shlex.quote(str(workspace))} --rewrite {shard}"


def delete(folder: Folder, name: str) -> str:
    program = {"file": "rm", "s3": "aws s3 rm", "gs": "gcloud storage rm"}.get(folder.uri.split(":")[0], "delete")
    return f"{program} {shlex.quote(str(folder / name))}"


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
        samples = stated(self.workspace / "shards")
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
        except DamagedIndex as error:
            problems, about = [f"its index is damaged ({error.__cause__})"], {"bytes": "0"}
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
                    row, file = members.pop(member.name, None), tar.extractfile(member)
                    yield from self._member_problems(member, file.read() if file else b"", row)
            stream.drain()
        if members:
            yield f"{len(members)} members of the index are not in the tar, {min(members)} for one"
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


def table_problems(workspace: Folder, corpus: Corpus) -> list[tuple[str, str]]:
    """(problem, command that mends it) of tables, manifest and `corpus.json`; a row for each source row."""
    return [*_score_problems(workspace, corpus), *manifest_problems(workspace),
            *((f"{name} belongs to no plan", delete(workspace / "shards", name)) for name in _strange(workspace))]


def _score_problems(workspace: Folder, corpus: Corpus) -> Iterator[tuple[str, str]]:
    job = ScoreJob(workspace, corpus.score)
    done, refused = job.output.parts(), job.quarantine.parts()
    pending, fetched = {unit.key for unit in job.pending()}, _fetched_keys(workspace)
    for key in sources(workspace).parts():
        if key not in done:
            yield f"scores: part {key} is not scored", rerun(workspace)
            continue
        rows, again = 0, rerun(workspace)
        if key not in pending:      # it passes for done, so it must go before it is made again
            again = f"{delete(job.output.folder, done[key].file)} && {again}"
        try:
            rows = _count(job.output, done[key]) + (_count(job.quarantine, refused[key]) if key in refused else 0)
        except (pa.ArrowException, OSError) as error:
            yield f"scores: part {key} cannot be read: {error}", again
            continue
        if rows != rows_of(key) and key not in fetched:
            yield f"scores: part {key} accounts for {rows} of {rows_of(key)} rows", again


def _count(table: Table, part: Part) -> int:
    fs, path = filesystem((table.folder / part.file).uri)
    with fs.open_input_file(path) as file:
        return pq.read_metadata(file).num_rows


def _fetched_keys(workspace: Folder) -> set[str]:
    """Parts whose rows were fetched: what did not arrive is in the quarantine of `fetch`."""
    return {name.split("~")[0] for name in (workspace / "links").names()}


def manifest_problems(workspace: Folder) -> Iterator[tuple[str, str]]:
    """Whether manifest and `corpus.json` are there and agree with each other and the plans; one file is opened."""
    folder, said, planned = workspace / "shards", stated(workspace / "shards"), set(plan(workspace).parts())
    if not planned:
        return
    if set(said) != planned:
        yield f"corpus.json names {len(said)} shards, planned are {len(planned)}", rerun(workspace)
    try:
        fs, path = filesystem((folder / MANIFEST).uri)
        with fs.open_input_file(path) as file:
            rows = pq.read_metadata(file).num_rows
    except (pa.ArrowException, OSError) as error:
        yield f"{MANIFEST} cannot be read: {error}", rerun(workspace)
        return
    samples = sum(shard["samples"] for shard in said.values())
    if said and rows != samples:
        yield f"{MANIFEST} has {rows} rows, the shards have {samples} samples", rerun(workspace)


def _strange(workspace: Folder) -> list[str]:
    """Tars and indexes among the shards that no plan asks for."""
    planned = set(plan(workspace).parts())
    return [name for name in (workspace / "shards").names()
            if name.endswith((".tar", ".index.parquet")) and name.split(".")[0] not in planned]
