"""The command line: what it says, what it writes, and what it answers to a mistake."""

import dataclasses
import re
import subprocess
import sys

import pytest
import typer
import yaml
from typer.testing import CliRunner

from caption.config import captions_of, negatives_of
from clearshard import app
from pipeline import commands, config, doctor
from pipeline.config import ConfigError, Corpus
from pipeline.lock import Lock
from pipeline.storage import Folder
from tests.conftest import REPOSITORY, clearshard, configure, photograph

COMMANDS = typer.main.get_command(app).commands


@pytest.fixture
def command(monkeypatch):
    """command("run", …): exit status and output of a command; unless `ray`, it may not start Ray."""
    def forbidden(self):
        pytest.fail("Ray was started")

    def invoke(*arguments, ray=False):
        with monkeypatch.context() as patch:
            if not ray:
                patch.setattr("pipeline.cluster.Cluster.start", forbidden)
            patch.setattr("pipeline.cluster.Cluster.stop", lambda self: None)
            patch.setattr("pipeline.commands.interruptible", lambda: None)
            result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        return result.exit_code, result.output

    return invoke


# Help -------------------------------------------------------------------------------------------------------

def test_help_names_every_command_in_the_order_of_work(command):
    status, output = command("--help")
    assert status == 0
    places = [output.index(f"\n  {name} ") for name in
              ("doctor", "init", "ingest", "score", "dedup", "select", "tile", "shard", "verify", "report", "run")]
    assert places == sorted(places)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_help_of_each_command_explains_it_and_each_of_its_options(command, name):
    status, output = command(name, "--help")
    assert status == 0 and len(COMMANDS[name].help.split()) >= 5
    assert COMMANDS[name].help.split()[0] in output
    for parameter in COMMANDS[name].params:
        assert parameter.name in ("help",) or len((parameter.help or "").split()) >= 3, parameter.name


def test_the_program_itself_answers_without_loading_torch_or_ray():
    program = ("import sys, clearshard; sys.argv = ['clearshard', '--help']\n"
               "try: clearshard.main()\nexcept SystemExit as end: assert not end.code\n"
               "print(sorted({'torch', 'ray', 'transformers', 'pyiqa'} & set(sys.modules)))")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert result.returncode == 0 and "Commands:" in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"


# init -------------------------------------------------------------------------------------------------------

def commented_defaults(text):
    """The commented-out settings of a corpus.yaml as values; the prose of comments is left out."""
    lines = [line[2:] for line in text.splitlines() if re.match(r"# +[a-z_]+:( |$)", line)]
    return yaml.safe_load("\n".join(lines))


def test_init_writes_a_configuration_that_is_valid_as_it_stands(tmp_path, command):
    (tmp_path / "photos").mkdir()
    status, output = command("init", tmp_path / "w", "--source", tmp_path / "photos", "--source", "face=s3://b/x/*.jpg")
    assert status == 0 and f"next: clearshard run {tmp_path / 'w'}" in output
    corpus = config.load(Folder.at(str(tmp_path / "w")))
    assert [(s.uri, s.group) for s in corpus.sources] == [(str(tmp_path / "photos"), "hq"), ("s3://b/x/*.jpg", "face")]
    assert corpus == Corpus(sources=corpus.sources)


def test_every_value_in_its_comments_is_the_default(tmp_path):
    values = commented_defaults(config.template([("/photos", "hq")]))
    examples = Corpus(caption=values.pop("caption"), negatives=values.pop("negatives"))     # without a default
    assert captions_of(examples).prompt.name == "supir" and negatives_of(examples).count == 100_000
    assert set(values) == {"score", "dedup", "select", "tile", "shard", "fetch", "max_error_rate"}
    assert Corpus.model_validate(values) == Corpus()
    for section in ("dedup", "select", "tile"):     # and none of these is missing
        assert set(values[section]) == set(Corpus.model_fields[section].annotation.model_fields)


@pytest.mark.parametrize("name", ["it's", 'say "x"', "a # b", "{{ 7 }} {% x %}", "tab\tnew\nline", "日本 ü", "a: b",
                                  "very " * 40 + "long"])
def test_init_quotes_any_name_of_a_source(tmp_path, command, name):
    assert command("init", tmp_path / "w", "--source", f"/photos/{name}")[0] == 0
    assert config.load(Folder.at(str(tmp_path / "w"))).sources[0].uri == f"/photos/{name}"


def test_init_makes_a_relative_source_absolute(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command("init", "w", "--source", "photos", "--source", "hq=deep/x.tar")
    uris = [source.uri for source in config.load(Folder.at(str(tmp_path / "w"))).sources]
    assert uris == [str(tmp_path / "photos"), str(tmp_path / "deep" / "x.tar")]


def test_init_never_writes_over_a_configuration(tmp_path, command):
    workspace = configure(tmp_path / "w", tmp_path)
    before = (workspace / "corpus.yaml").read_bytes()
    status, output = command("init", workspace, "--source", tmp_path)
    assert status == 2 and "has a corpus.yaml already" in output
    assert (workspace / "corpus.yaml").read_bytes() == before


def test_init_refuses_a_group_that_cannot_name_a_shard(tmp_path, command):
    status, output = command("init", tmp_path / "w", "--source", "HQ=/photos")
    assert status == 2 and "sources.0.group" in output and "'HQ'" in output
    assert not (tmp_path / "w").exists()


# Mistakes in corpus.yaml ------------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "said"), [
    ("tiles: {size: 512}", "unknown key 'tiles'; did you mean 'tile'?"),
    ("select: {min_sid: 3}", "unknown key 'select.min_sid'; did you mean 'min_side'?"),
    ("select: {keep_gray: false}", "unknown key 'select.keep_gray'; did you mean 'keep_grey'?"),
    ("select: {facts: {noise: {maks: 3}}}", "unknown key 'select.facts.noise.maks'; did you mean 'max'?"),
    ("select: {metrics: {musiq: {minimum: 3}}}", "unknown key 'select.metrics.musiq.minimum'; did you mean 'min'?"),
    ("sources: [{uri: a}, {uri: b, licence_: c}]", "unknown key 'sources.1.licence_'; did you mean 'licence'?"),
    ("sources: [{uri: a, columns: {url: b}}]", "unknown key 'sources.0.columns.url'; did you mean 'uri'?"),
    ("score: {limits: {max_pixel: 3}}", "unknown key 'score.limits.max_pixel'; did you mean 'max_pixels'?"),
    ("score: {metrics: [{name: a, kind: pyiqa, modell: b}]}",
     "unknown key 'score.metrics.0.modell'; did you mean 'model'?"),
    ("shard: {sample: 3}", "unknown key 'shard.sample'; did you mean 'samples'?"),
    ("fetch: {zzz: 3}", "unknown key 'fetch.zzz'; known keys: allow_private, backoff_s"),
    ("dedup: {mirored: true}", "did you mean 'mirrored'?"),
])
def test_an_unknown_key_answers_with_the_nearest_name(text, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        config.parse(text)


@pytest.mark.parametrize(("text", "key", "value"), [
    ("tile: {size: 12}", "tile.size", "12"), ("tile: {mode: bset}", "tile.mode", "'bset'"),
    ("select: {min_side: wide}", "select.min_side", "'wide'"),
    ("select: {facts: {noise: 3}}", "select.facts.noise", "3"),
    ("select: {facts: {noise: {min: 3, max: 2}}}", "select.facts.noise", "min 3.0 is above max 2.0"),
    ("select: {facts: {noise: {max: .inf}}}", "select.facts.noise.max", "inf"),
    ("sources: {uri: a}", "sources", "{'uri': 'a'}"), ("sources: [{group: hq}]", "sources.0.uri", "Field required"),
    ("sources: [{uri: a, group: no}]", "sources.0.group", "False"),
    ("sources: [{uri: a, group: a/b}]", "sources.0.group", "'a/b'"), ("tile:", "tile", "None"),
    ("score: {metrics: [{name: a, kind: pyiqa}]}", "score.metrics.0.model", "Field required"),
    ("max_error_rate: 50", "max_error_rate", "50"),
])
def test_a_wrong_value_is_named_with_its_key(text, key, value):
    with pytest.raises(ConfigError) as caught:
        config.parse(text, "corpus.yaml")
    assert str(caught.value).startswith(f"corpus.yaml: {key}: ") and value in str(caught.value)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        config.parse("tile: {size: 12}\nshards: {}\nselect: {min_sid: 3}")
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(("data", "said"), [
    (b"sources: [\nselect: {min_side: 3}\n", "corpus.yaml is not valid YAML"), (b"- a\n- b\n", "must be a mapping"),
    (b"tile: {size: 512}\n\xff\xfe\n", "corpus.yaml is not UTF-8"), (b"a: b\n\tc: d\n", "line 2"),
    (b"tile: {size: 512}\ntile: {mode: grid}\n", "'tile' .*twice.*line 2"),
    (b"select:\n  facts:\n    noise: {max: 3}\n    noise: {max: 4}\n", "'noise' .*twice.*line 4"),
    (b"sources: [{uri: /nowhere/at/all}]", "'/nowhere/at/all' holds no files"),
    (b"select: {where: {wide: widht > 3}}", "rule 'wide' .*widht"),
    (b"select: {facts: {sharp: {min: 3}}}", "did you mean 'sharpness'"),
])
def test_a_mistake_ends_with_one_message_and_status_two(tmp_path, command, data, said):
    (tmp_path / "corpus.yaml").write_bytes(data)
    status, output = command("run", tmp_path)
    assert status == 2 and re.search(said, output, re.S) and output.startswith("error: ")
    assert {path.name for path in tmp_path.iterdir()} <= {"corpus.yaml", ".tmp-guard"}


@pytest.mark.parametrize("name", ["run", "score", "verify", "report"])
def test_a_folder_that_is_no_workspace_says_how_to_make_one(tmp_path, command, name):
    status, output = command(name, tmp_path / "nowhere")
    assert status == 2 and f"clearshard init {tmp_path / 'nowhere'} --source" in output
    assert not (tmp_path / "nowhere").exists()


def test_a_mistake_shows_no_traceback(tmp_path):
    (tmp_path / "corpus.yaml").write_text("tiles: {}")
    result = clearshard("run", tmp_path, check=False)
    assert result.returncode == 2 and "did you mean 'tile'?" in result.stderr
    assert "Traceback" not in result.stderr + result.stdout and result.stdout == ""


@pytest.mark.parametrize("arguments", [["run"], ["run", "w", "--limit", "0"], ["run", "w", "--max-error-rate", "2"],
                                       ["run", "w", "--workers", "none"], ["rum", "w"], ["init", "w"]])
def test_a_wrong_argument_is_refused_before_anything_happens(tmp_path, command, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    status, output = command(*arguments)
    assert status == 2 and ("Usage" in output or "Error" in output) and list(tmp_path.iterdir()) == []


def test_a_busy_workspace_names_its_holder(tmp_path, command, pile):
    workspace = configure(tmp_path / "w", pile)
    with Lock(Folder.at(str(workspace)), "clearshard run elsewhere"):
        status, output = command("score", workspace)
    assert status == 3 and "in use by `clearshard run elsewhere`" in output


# Runs -------------------------------------------------------------------------------------------------------

def test_a_dry_run_of_a_fresh_workspace_counts_and_writes_nothing(tmp_path, pile, command):
    workspace = configure(tmp_path / "w", pile)
    status, output = command("run", workspace, "--dry-run")
    assert status == 0 and "ingest: 11 listed, 11 new" in output
    assert [path.name for path in workspace.iterdir()] == ["corpus.yaml"]


def test_a_dry_run_says_what_a_limit_would_leave(tmp_path, pile, run, command):
    workspace = configure(tmp_path / "w", pile)
    run(workspace, "ingest")
    status, output = command("score", workspace, "--dry-run", "--limit", 3)
    assert status == 0 and "score: 3 rows pending in 3 units; " in output
    assert not (workspace / "scores").exists()


def test_a_finished_corpus_starts_no_ray_and_writes_nothing(tmp_path, pile, run, command):
    workspace = configure(tmp_path / "w", pile)
    run(workspace)
    assert command("report", workspace)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in workspace.rglob("*") if path.is_file()}
    for arguments in (["run", workspace, "--dry-run"], ["run", workspace]):
        status, output = command(*arguments)
        assert status == 0
        jobs = [line for line in output.splitlines() if not line.startswith(("ingest", "report"))]
        assert len(jobs) == 7 and all(line.endswith(": nothing to do") for line in jobs)
    after = {path: path.stat().st_mtime_ns for path in workspace.rglob("*") if path.is_file()}
    assert {path: when for path, when in after.items() if path.name != ".tmp-guard"} == {
        path: when for path, when in before.items() if path.name != ".tmp-guard"}


def test_the_whole_way_from_init_to_verified_shards(tmp_path, command, ray_here):
    (tmp_path / "pile").mkdir()
    for seed in range(3):
        photograph(seed).save(tmp_path / "pile" / f"{seed}.jpg", quality=92)
    command("init", tmp_path / "w", "--source", tmp_path / "pile")
    text = (tmp_path / "w" / "corpus.yaml").read_text()
    assert "# tile:" in text
    (tmp_path / "w" / "corpus.yaml").write_text(text + "select: {min_side: 256, facts: {upscale: {}, noise: {}}}\n"
                                                       "tile: {size: 256, min_texture: 0}\n")
    status, output = command("run", tmp_path / "w", ray=True)
    assert status == 0 and "corpus: hq: 3 samples in 1 shards" in output
    assert f"report: {tmp_path}/w/reports/corpus.html" in output
    assert "all well" in command("verify", tmp_path / "w", ray=True)[1]


def test_a_shard_that_does_not_exist_cannot_be_rewritten(tmp_path, pile, run, command):
    workspace = configure(tmp_path / "w", pile)
    run(workspace)
    before = (workspace / "shards" / "corpus.json").stat().st_mtime_ns
    status, output = command("shard", workspace, "--rewrite", "hq-00001")
    assert status == 2 and "no shard is named 'hq-00001'" in output and "hq-000001" in output
    assert (workspace / "shards" / "corpus.json").stat().st_mtime_ns == before


def test_a_rewritten_shard_is_published_again(tmp_path, pile, run):
    workspace = configure(tmp_path / "w", pile)
    run(workspace)
    before = (workspace / "shards" / "corpus.json").read_bytes()
    lines = run(workspace, "shard", rewrite=("hq-000001",))
    assert any(line.startswith("shard: 4 rows") for line in lines)
    assert (workspace / "shards" / "corpus.json").read_bytes() == before


def test_without_a_terminal_progress_is_lines_with_rate_and_time_left(tmp_path, pile, run, monkeypatch, capsys):
    from pipeline.cluster import Cluster
    from pipeline.stages import Session, run_score
    monkeypatch.setattr(commands, "LOG_EVERY_S", -1.0)
    workspace = configure(tmp_path / "w", pile)
    run(workspace, "ingest")
    folder = Folder.at(str(workspace))
    run_score(Session(folder, config.load(folder), Cluster(), commands.Terminal()))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    for line in lines[:-1]:
        assert re.fullmatch(r"score: \d+ of 11, [\d.]+/s(, \d errors)?, about [\d.]+ s left", line), line
    done = [int(line.split()[1]) for line in lines[:-1]]
    assert done == sorted(done) and done[-1] == 11 and lines[-2].endswith("about 0.0 s left")
    assert "errors" in lines[-2] and lines[-1].startswith("score: 11 rows in ")


# doctor -----------------------------------------------------------------------------------------------------

def test_doctor_is_content_here_and_names_what_it_looked_at(command, monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", (doctor.python, doctor.packages, doctor.torch_pair, doctor.machine))
    status, output = command("doctor")
    assert status == 0 and output.splitlines()[-1] == "ready"
    assert re.search(r"ok torch [\d.+\w]+ and torchvision [\d.+\w]+ match", output) and "ok pyarrow" in output


def test_doctor_says_what_mends_a_torch_and_torchvision_that_do_not_match(command, monkeypatch):
    versions = {"torch": "2.15.0", "torchvision": "0.21.0"}
    failed = subprocess.CompletedProcess([], 1, "", "RuntimeError: operator torchvision::nms does not exist\n")
    monkeypatch.setattr(doctor.importlib.metadata, "version", versions.__getitem__)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: failed)
    monkeypatch.setattr(doctor, "CHECKS", (doctor.torch_pair,))
    status, output = command("doctor")
    assert status == 1 and "bad torch 2.15.0 and torchvision 0.21.0 do not work together: RuntimeError" in output
    assert "make install (torch 2.15.0 goes with torchvision 0.30)" in output
    assert output.splitlines()[-1] == "something above must be mended first"


def test_a_note_of_the_doctor_is_no_failure(command, monkeypatch):
    note = doctor.Finding("note", "no GPU [here]", "get one")
    monkeypatch.setattr(doctor, "CHECKS", (lambda: note, lambda: [dataclasses.replace(note, state="ok")]))
    status, output = command("doctor")
    assert status == 0 and "note no GPU [here]" in output and "       get one" in output


@pytest.mark.slow
def test_the_whole_doctor_finds_this_environment_ready():
    output = clearshard("doctor").stdout
    assert "Ray" in output and "torchvision" in output and output.splitlines()[-1] == "ready"
