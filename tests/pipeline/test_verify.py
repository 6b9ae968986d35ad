"""Verify: each kind of damage is named with a command, and the command mends it."""

import io
import json
import os
import shlex
import shutil
import tarfile
from functools import partial

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from clearshard import app
from pipeline import config
from pipeline.storage import Folder
from pipeline.tables import rows_of
from pipeline.verify import VerifyJob, table_problems
from tests.conftest import clearshard, configure, photograph, tars


def invoked(patch, *arguments):
    """Exit status and output of a command in this process, which leaves the tests' Ray running."""
    patch.setattr("pipeline.cluster.Cluster.stop", lambda self: None)
    patch.setattr("pipeline.commands.interruptible", lambda: None)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def finished(tmp_path_factory, ray_here):
    """A finished corpus of three shards, in a folder whose name a shell would take apart."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "pile").mkdir()
    for seed in range(9):
        photograph(seed).save(folder / "pile" / f"{seed}.jpg", quality=92)
    (folder / "pile" / "half.jpg").write_bytes((folder / "pile" / "0.jpg").read_bytes()[:9000])
    workspace = configure(folder / "it's a corpus", folder / "pile")
    with pytest.MonkeyPatch.context() as patch:
        status, output = invoked(patch, "run", workspace)
    assert status == 0, output
    return workspace


@pytest.fixture
def workspace(finished, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(finished, tmp_path / finished.name)


@pytest.fixture
def command(ray_here, monkeypatch):
    """command("verify", …): exit status and what was printed, over the tests' Ray."""
    return partial(invoked, monkeypatch)


@pytest.fixture
def mend(command):
    """mend(workspace): what verify found, after doing what it said and finding all well."""
    def do(line):
        for piece in line.split(" && "):
            words = shlex.split(piece)
            if words[0] == "rm":
                os.unlink(*words[1:])
            else:
                assert words[0] == "clearshard"
                status, output = command(*words[1:])
                assert status == 0, output

    def found_and_mended(workspace):
        status, output = command("verify", workspace)
        assert status == 1
        lines = output.splitlines()
        commands = [line.removeprefix("  mend: ") for line in lines if line.startswith("  mend: ")]
        assert f"{len(commands)} problems" in lines[-1] and commands
        for line in dict.fromkeys(commands):
            do(line)
        status, output = command("verify", workspace)
        assert status == 0 and "all well" in output, output
        return output if not lines else "\n".join(lines)

    return found_and_mended


def shard(workspace, name="hq-000001.tar"):
    return workspace / "shards" / name


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x41
    path.write_bytes(data)


def first_image(path):
    with tarfile.open(path) as tar:
        return next(member for member in tar if not member.name.endswith("json"))


# Well -------------------------------------------------------------------------------------------------------

def test_a_finished_corpus_is_well(finished, command):
    status, output = command("verify", finished)
    assert status == 0 and "verify: 3 shards, 9 samples," in output and "all well" in output
    assert command("verify", finished, "--quick")[0] == 0


def test_verify_writes_nothing(finished, command):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    command("verify", finished)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_corpus_that_is_not_finished_is_well_as_far_as_it_goes(tmp_path, pile, run, command):
    workspace = configure(tmp_path / "w", pile)
    assert command("verify", workspace)[0] == 0
    run(workspace, "ingest", "score", "dedup", "select", "tile")
    assert command("verify", workspace)[0] == 0


def test_rows_that_could_not_be_written_are_no_problem_of_the_shard(tmp_path, pile, run, command):
    workspace = configure(tmp_path / "w", pile)
    run(workspace, "ingest", "score", "dedup", "select", "tile")
    photograph(77).save(pile / "3.jpg", quality=92)
    run(workspace, "shard")
    assert command("verify", workspace)[0] == 0


# Damage -----------------------------------------------------------------------------------------------------

def test_a_flipped_byte_in_a_picture_is_found_where_it_is(workspace, mend):
    before, path = tars(workspace), shard(workspace)
    member = first_image(path)
    flip(path, member.offset_data + member.size // 2)
    found = mend(workspace)
    assert f"hq-000001: {member.name} has changed since it was written" in found
    assert "hq-000001: its bytes differ from those written" in found and "hq-000000" not in found
    assert tars(workspace) == before


@pytest.mark.parametrize("where", ["name", "size", "type", "padding", "end"])
def test_a_flipped_byte_anywhere_else_is_found_too(workspace, mend, where):
    path = shard(workspace)
    member, size = first_image(path), path.stat().st_size
    flip(path, {"name": member.offset, "size": member.offset + 130, "type": member.offset + 156,
                "padding": member.offset_data + member.size, "end": size - 1}[where])
    assert "hq-000001" in mend(workspace)


@pytest.mark.parametrize("where", ["start", "header", "data", "between members", "end"])
def test_a_truncated_tar_is_a_few_lines_and_not_one_for_each_member(workspace, mend, where):
    with tarfile.open(shard(workspace)) as tar:
        second = tar.getmembers()[2]
    os.truncate(shard(workspace), {
        "start": 0, "header": second.offset + 100, "data": second.offset_data + 1000, "between members": second.offset,
        "end": shard(workspace).stat().st_size - 1}[where])
    found = mend(workspace)
    assert "hq-000001: " in found and found.count("\n") <= 4


@pytest.mark.parametrize("name", ["hq-000001.tar", "hq-000001.index.parquet"])
def test_a_missing_tar_or_index(workspace, mend, name):
    shard(workspace, name).unlink()
    assert "hq-000001: its tar or index is missing" in mend(workspace)


@pytest.mark.parametrize("damage", [lambda path: flip(path, 4), lambda path: flip(path, path.stat().st_size - 6),
                                    lambda path: os.truncate(path, 100), lambda path: os.truncate(path, 0)])
def test_a_damaged_index(workspace, mend, damage):
    damage(shard(workspace, "hq-000001.index.parquet"))
    assert "hq-000001: its index is damaged" in mend(workspace)


def test_two_members_that_changed_places(workspace, mend):
    path = shard(workspace)
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    pictures = [i for i, (member, _) in enumerate(members) if not member.name.endswith("json")]
    a, b = pictures[:2]
    members[a], members[b] = (members[a][0], members[b][1]), (members[b][0], members[a][1])
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    found = mend(workspace)
    for i in (a, b):
        assert f"hq-000001: {members[i][0].name} has changed since it was written" in found


def test_a_shard_of_an_older_plan(workspace, mend):
    """As a copy of an old shard leaves it: tar and index fit each other, and not the plan."""
    name = "hq-000001.index.parquet"
    index = pq.read_table(shard(workspace, name))
    about = {k: v if k != b"plan" else b"old" for k, v in index.schema.metadata.items()}
    pq.write_table(index.replace_schema_metadata(about), shard(workspace, name))
    assert "hq-000001: it was written from an older plan" in mend(workspace)


def test_a_sample_that_is_missing_with_its_index_row(workspace, mend):
    name = "hq-000001.index.parquet"
    index = pq.read_table(shard(workspace, name))
    pq.write_table(index.slice(2), shard(workspace, name))
    assert "hq-000001: 1 planned samples are missing" in mend(workspace)


@pytest.mark.parametrize("damage", [
    lambda path: pq.write_table(pq.read_table(path).slice(1), path), lambda path: path.unlink(),
    lambda path: os.truncate(path, 1000), lambda path: os.truncate(path, 0)])
def test_a_manifest_with_fewer_rows_or_none(workspace, mend, damage):
    before = pq.read_table(workspace / "shards" / "manifest.parquet")
    damage(workspace / "shards" / "manifest.parquet")
    assert "manifest.parquet" in mend(workspace)
    assert pq.read_table(workspace / "shards" / "manifest.parquet").equals(before)


@pytest.mark.parametrize("damage", [
    lambda path: path.unlink(), lambda path: path.write_text("{"), lambda path: path.write_text("{}"),
    lambda path: path.write_text(json.dumps({"shards": {}}))])
def test_corpus_json_missing_or_damaged(workspace, mend, damage):
    before = (workspace / "shards" / "corpus.json").read_bytes()
    damage(workspace / "shards" / "corpus.json")
    assert "corpus.json names 0 shards, planned are 3" in mend(workspace)
    assert (workspace / "shards" / "corpus.json").read_bytes() == before


@pytest.mark.parametrize("name", ["hq-000009.tar", "{a} strange $name.tar", "face-000000.index.parquet"])
def test_a_tar_that_nobody_planned(workspace, mend, name):
    shutil.copy(shard(workspace), shard(workspace, name))
    assert f"{name} belongs to no plan" in mend(workspace)
    assert not shard(workspace, name).exists()


def test_scores_that_are_missing(workspace, mend):
    next((workspace / "scores").iterdir()).unlink()
    assert "is not scored" in mend(workspace)


def test_scores_that_cannot_be_read(workspace, mend):
    os.truncate(next((workspace / "scores").iterdir()), 50)
    assert "cannot be read" in mend(workspace)


def test_a_quarantine_that_somebody_emptied(workspace, mend):
    shutil.rmtree(workspace / "quarantine" / "score")
    assert "accounts for 0 of 1 rows" in mend(workspace)
    assert len(list((workspace / "quarantine" / "score").iterdir())) == 1


def test_several_problems_at_once(workspace, mend):
    shard(workspace, "hq-000000.tar").unlink()
    flip(shard(workspace), first_image(shard(workspace)).offset_data + 500)
    (workspace / "shards" / "manifest.parquet").unlink()
    shutil.copy(shard(workspace), shard(workspace, "x-000000.tar"))
    found = mend(workspace)
    for problem in ("hq-000000: its tar", "hq-000001:", "manifest.parquet", "x-000000.tar"):
        assert problem in found


# The parts --------------------------------------------------------------------------------------------------

def test_quick_finds_changed_bytes_without_decoding(workspace, command, monkeypatch):
    folder = Folder.at(str(workspace))
    monkeypatch.setattr("pipeline.verify.decode", lambda *_: pytest.fail("decoded"))
    member = first_image(shard(workspace))
    flip(shard(workspace), member.offset_data + 500)
    job = VerifyJob(folder, config.load(folder), quick=True)
    outcomes = {unit.key: job.run(unit) for unit in job.pending()}
    assert {key for key, outcome in outcomes.items() if outcome.failed} == {"hq-000001"}
    assert outcomes["hq-000000"].bytes == shard(workspace, "hq-000000.tar").stat().st_size


def test_a_picture_that_was_written_broken_is_found_by_decoding(workspace):
    """Tar and index agree, and still there is no picture."""
    from pipeline.shards import index_bytes, read_index
    from pipeline.tar import TarWriter
    folder, path = Folder.at(str(workspace)), shard(workspace)
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    members[0] = (members[0][0], members[0][1][:5000])
    path.unlink()
    with TarWriter(str(path)) as writer:
        writer.add(members)
    about = read_index(folder / "shards", "hq-000001")[1]
    (folder / "shards").write("hq-000001.index.parquet", index_bytes(writer, about["plan"]))
    job = VerifyJob(folder, config.load(folder))
    problems = [problem for unit in job.pending() for problem in job.run(unit).errors]
    assert len(problems) == 1 and f"hq-000001: {members[0][0]} does not decode: truncated" in problems[0]


def test_every_source_row_is_counted_once(finished):
    folder = Folder.at(str(finished))
    assert table_problems(folder, config.load(folder)) == []
    keys = [path.name.split("~")[0] for path in (finished / "sources").iterdir()]
    assert sum(map(rows_of, keys)) == 10


@pytest.mark.slow
def test_the_command_line_says_it_with_its_exit_status(workspace, on_cluster):
    shard(workspace).unlink()
    result = clearshard("verify", workspace, check=False, env=on_cluster)
    assert result.returncode == 1 and "1 problems" in result.stdout
    assert f"mend: clearshard shard {shlex.quote(str(workspace))} --rewrite hq-000001" in result.stderr
    assert "Traceback" not in result.stderr
