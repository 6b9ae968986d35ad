"""Ray Train gives what one process gives, goes on when a rank dies, saves when stopped, and says what is wrong."""

import copy
import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from degrade.strict import ConfigError, check
from pipeline.cluster import Cluster
from tests.train.runs import ALONE, metrics, trained
from train import on_ray
from train.checkpoint import Checkpoints
from train.config import Training
from train.failures import NotFinite

TOLERANCE = 1e-4        # float32 sums in another order


@pytest.fixture
def launch(ray_here, monkeypatch):
    """launch(values, workers, …): a run on the tests' own Ray; returns what was said. `heard` sees each line as it
    comes."""
    monkeypatch.setattr(Cluster, "stop", lambda self: None)         # other tests go on with that Ray

    def start(values: dict, workers: int, heard: Callable[[str], None] = lambda line: None, **options) -> list[str]:
        said: list[str] = []

        def say(line: str) -> None:
            said.append(line)
            heard(line)
        monkeypatch.setattr(on_ray, "say", say)
        on_ray.launch(check(Training, values, "test"), workers, **{"device": "cpu"} | options)
        return said

    return start


def losses(values: dict) -> list[float]:
    return [line["loss"] for line in metrics(values) if "loss" in line]


def ranks_here() -> list[psutil.Process]:
    """The processes of this test's Ray in which ranks run."""
    return [process for process in psutil.Process().children(recursive=True)
            if process.status() != psutil.STATUS_ZOMBIE and "RayTrainWorker" in " ".join(process.cmdline())]


@pytest.mark.slow
def test_a_rank_on_ray_has_the_losses_of_one_process_whatever_folder_it_runs_in(configured, launch, tmp_path,
                                                                                monkeypatch):
    values = configured(images=16)
    alone = copy.deepcopy(values) | {"out": str(tmp_path / "alone")}
    trained(alone)
    monkeypatch.chdir(tmp_path)
    values |= {"out": "run", "data": values["data"] | {"corpus": [os.path.relpath(values["data"]["corpus"][0])]}}
    said = launch(values, 1)
    assert said[0] == "ranks by Ray: 1, with 1 CPU each" and said[-1] == f"done: {tmp_path / 'run' / 'model'}"
    assert (tmp_path / "run" / "model" / "robust_encoder" / "config.json").is_file()
    assert len(losses(values)) == 4 and losses(values) == pytest.approx(losses(alone), rel=TOLERANCE)


@pytest.mark.slow
def test_two_ranks_on_ray_have_the_losses_of_one_process(configured, launch, tmp_path):
    values = configured(images=16)
    alone = copy.deepcopy(values) | {"out": str(tmp_path / "alone")}
    trained(alone)
    assert "on 2 x cpu, batch 4 = 2 x 2 x 1" in "\n".join(launch(values, 2))
    assert len(losses(values)) == 4 and losses(values) == pytest.approx(losses(alone), rel=TOLERANCE)


@pytest.mark.slow
def test_a_rank_that_dies_is_started_again_and_a_stop_saves(configured, launch, tmp_path):
    values = configured(images=1200, checkpoints={"every": 20}, data={"workers": 1})
    alone = copy.deepcopy(values) | {"out": str(tmp_path / "alone")}
    trained(alone)
    done: list[str] = []

    def heard(line: str) -> None:
        if "step 10 of" in line and "killed" not in done:
            for process in ranks_here():
                process.kill()
                done.append("killed")
        elif "going on from step" in line and done[-1] == "killed":
            os.kill(os.getpid(), signal.SIGTERM)
            done.append(line)
    with pytest.raises(KeyboardInterrupt):
        launch(values, 1, heard)
    assert done[0] == "killed" and len(done) == 2
    last = Checkpoints(Path(values["out"]) / "checkpoints", ALONE).all()[-1].step
    assert int(done[1].rpartition("step ")[2]) < last < 300
    trained(values)
    assert losses(values) == pytest.approx(losses(alone), rel=TOLERANCE)


@pytest.mark.slow
def test_what_a_user_can_mend_is_told_as_it_is_and_not_repeated(configured, launch):
    with pytest.raises(NotFinite, match=r"step 2: a loss or gradient is not finite, from .*; .* lists them"):
        launch(configured(optimizer={"rate": 1e30}), 1)


def test_what_this_machine_has_not_is_refused(configured, launch):
    with pytest.raises(ConfigError, match=r"--ray 2: 2 ranks ask for 8 CPU and this machine has 2; take fewer"):
        launch(configured(data={"workers": 3}), 2)
    with pytest.raises(ConfigError, match=r"ask for 1 GPU and this machine has 0; take fewer, or --device cpu"):
        launch(configured(), 1, device="cuda")
    with pytest.raises(ConfigError, match=r"--device cuda:1: .*Ray chooses the card"):
        launch(configured(), 1, device="cuda:1")
