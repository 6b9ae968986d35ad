"""Stopping and going on: the same weights, whatever happened in between."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from degrade.strict import ConfigError
from tests.conftest import REPOSITORY
from tests.train.runs import metrics, same, trained, trainer, weights


@pytest.fixture
def elsewhere(configured, tmp_path):
    """elsewhere(name): the same run in another folder."""
    return lambda name, **changes: configured(**changes) | {"out": str(tmp_path / name)}


EIGHT_BITS = {"rate": 1e-3, "kind": "adamw8bit"}


@pytest.mark.parametrize("changes", [{}, {"optimizer": EIGHT_BITS}, {"precision": "bf16", "checkpointing": True}])
def test_a_run_that_was_stopped_ends_with_the_same_bits(elsewhere, changes):
    if changes.get("optimizer") == EIGHT_BITS:
        pytest.importorskip("bitsandbytes", reason="8-bit states are bitsandbytes'")
    straight = trained(elsewhere("straight", **changes))
    stopped = trained(elsewhere("stopped", **changes), stop_at=5)
    assert stopped.step == 5
    assert not same(weights(stopped), weights(straight))
    resumed = trained(elsewhere("stopped", **changes))
    assert resumed.step == straight.step == 8
    assert same(weights(resumed), weights(straight))


def test_the_log_of_a_resumed_run_has_every_step_once(elsewhere):
    values = elsewhere("run")
    trained(values, stop_at=3)
    path = Path(values["out"]) / "metrics.jsonl"
    with path.open("a") as file:        # a kill: steps that no checkpoint has, and half a line
        file.write(json.dumps({"step": 4, "images": 16, "loss": 99.0}) + '\n{"step": 5, "im')
    trained(values)
    steps = [line["step"] for line in metrics(values) if "loss" in line]
    assert steps == list(range(1, 9))
    assert all(line["loss"] < 99 for line in metrics(values) if "loss" in line)


def test_another_number_of_micro_batches_sees_the_same_samples_and_nearly_the_same_losses(elsewhere):
    whole, cut = elsewhere("whole"), elsewhere("cut", micro_batch=1)
    trained(whole)
    trained(cut)
    losses = [[line["loss"] for line in metrics(values) if "loss" in line] for values in (whole, cut)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_maps_that_are_computed_again_change_nothing(elsewhere):
    kept, again = trained(elsewhere("kept")), trained(elsewhere("again", checkpointing=True))
    assert same(weights(kept), weights(again))


def test_another_batch_of_gradients_would_have_been_noticed(elsewhere):
    one, other = elsewhere("one"), elsewhere("other", seed=1)
    trained(one)
    trained(other)
    losses = [[line["loss"] for line in metrics(values) if "loss" in line] for values in (one, other)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-2)


def test_a_checkpoint_of_another_configuration_is_refused_and_the_difference_named(elsewhere):
    values = elsewhere("run")
    trained(values, stop_at=2)
    with pytest.raises(ConfigError, match=r"optimizer.rate was 0.001 and is 0.002.*--accept-changes"):
        trainer(values | {"optimizer": {"rate": 2e-3}})
    said = []
    assert trainer(values | {"optimizer": {"rate": 2e-3}}, said, accept=True).step == 2
    assert any("optimizer.rate was 0.001 and is 0.002" in line for line in said)


def test_what_changes_no_sample_and_no_weight_may_change(elsewhere):
    values = elsewhere("run")
    trained(values, stop_at=2)
    other = values | {"images": 64, "log_every": 3, "micro_batch": 2, "checkpoints": {"every": 16, "keep": 1}}
    assert trainer(other).step == 2


def test_a_longer_run_with_a_falling_rate_is_another_run(elsewhere):
    values = elsewhere("run", optimizer={"rate": 1e-3, "schedule": "cosine"})
    trained(values, stop_at=2)
    with pytest.raises(ConfigError, match="images was 32 and is 64"):
        trainer(values | {"images": 64})


def test_a_checkpoint_of_another_corpus_is_refused(elsewhere, pictures, tmp_path):
    from tests.train.conftest import picture, write_corpus
    values = elsewhere("run")
    trained(values, stop_at=2)
    other = write_corpus(tmp_path / "other", {"hq": [6, 7, 6], "negative": [4]}, picture)
    values["data"]["corpus"] = [str(other)]
    with pytest.raises(ConfigError, match="group 'hq' had 18 samples in 3 shards and has 19 in 3"):
        trainer(values)


def test_a_checkpoint_of_another_prior_is_refused(elsewhere, prior, tmp_path):
    import shutil
    values = elsewhere("run")
    trained(values, stop_at=2)
    shutil.copytree(prior, tmp_path / "prior")
    values["task"]["prior"] = str(tmp_path / "prior")
    assert trainer(values).step == 2            # it may move
    config = tmp_path / "prior" / "vae" / "config.json"
    config.write_text(config.read_text().replace("0.13025", "0.5"))
    with pytest.raises(ConfigError, match="the prior is another model than before"):
        trainer(values)


def test_old_checkpoints_are_thinned_and_milestones_stay(elsewhere):
    values = elsewhere("run", checkpoints={"every": 4, "keep": 2, "milestone": 12})
    trained(values)
    kept = sorted(path.name for path in (Path(values["out"]) / "checkpoints").iterdir())
    assert kept == [f"step-{step:09d}" for step in (3, 6, 7, 8)]


def test_a_checkpoint_holds_no_pickle(elsewhere):
    values = elsewhere("run")
    trained(values, stop_at=2)
    files = {path.suffix for path in (Path(values["out"]) / "checkpoints").rglob("*") if path.is_file()}
    assert files == {".safetensors", ".json"}


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(elsewhere):
    values = elsewhere("run")
    trained(values, stop_at=4)
    trained(values, stop_at=6)
    last = Path(values["out"]) / "checkpoints" / "step-000000006" / "rank-0.safetensors"
    last.write_bytes(last.read_bytes()[:-100])
    run = trainer(values)
    assert run.step == 4
    straight = trained(elsewhere("straight"))
    run.fit()
    assert same(weights(run), weights(straight))


def program(values: dict, folder: Path) -> list[str]:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return [sys.executable, "-m", "train", str(path), "--device", "cpu"]


def started(values: dict, folder: Path) -> subprocess.Popen:
    return subprocess.Popen(program(values, folder), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def until(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def test_sigterm_ends_with_a_checkpoint(elsewhere):
    from train.commands import stopped_by
    straight = trained(elsewhere("straight"))
    values = elsewhere("stopped")
    run = trainer(values)
    previous, update = stopped_by(run.stop), run.optimizer.step

    def step():
        update()
        if run.step == 2:               # in the third, when the ranks have agreed on going on: the fourth is the last
            signal.raise_signal(signal.SIGTERM)
    run.optimizer.step = step
    try:
        assert not run.fit()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    assert run.step == 4 and run.stopping
    assert same(weights(trained(values)), weights(straight))


@pytest.mark.slow
def test_kill_9_and_sigterm_lose_nothing_but_what_no_checkpoint_had(elsewhere, tmp_path):
    values = elsewhere("killed", images=400, checkpoints={"every": 40, "keep": 2}, data={"workers": 1})
    straight = trained(values | {"out": str(tmp_path / "straight")})
    folder = Path(values["out"]) / "checkpoints"
    process = started(values, tmp_path)
    until(lambda: any(folder.glob("step-*[0-9]")), process)
    process.kill()
    process.wait()
    first = max(int(path.name[5:]) for path in folder.glob("step-*[0-9]"))
    process = started(values, tmp_path)
    until(lambda: any(line["step"] > first for line in metrics(values)), process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "the same command goes on" in said
    stopped = max(int(path.name[5:]) for path in folder.glob("step-*[0-9]"))
    assert first < stopped < 100
    resumed = trained(values)
    assert same(weights(resumed), weights(straight))


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(elsewhere, tmp_path):
    values = elsewhere("torn", checkpoints={"every": 4, "keep": 2})
    straight = trained(elsewhere("straight"))
    # Dies after the weights of the second checkpoint are on the disk, before it is committed.
    program = """
import os, sys
from train import checkpoint
from train.__main__ import *
commit = checkpoint.Checkpoints._commit
def die(self, partial, state):
    if state["step"] == 2:
        os.kill(os.getpid(), 9)
    commit(self, partial, state)
checkpoint.Checkpoints._commit = die
sys.argv = ["train", sys.argv[1], "--device", "cpu"]
typer.run(train)
"""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    done = subprocess.run([sys.executable, "-c", program, str(path)], cwd=REPOSITORY, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = Path(values["out"]) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000001", "step-000000002.partial"]
    run = trainer(values)
    assert run.step == 1 and not (folder / "step-000000002.partial").exists()
    run.fit()
    assert same(weights(run), weights(straight))
