"""What stops a run, and what it leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import REPOSITORY
from tests.train.runs import same, trainer, weights
from train import TooManyCorrupt
from train.failures import NotFinite, OutOfMemory


def victim(run, position: int):
    """The low-quality crop of a position, and its key."""
    batch = run.loader.at([position])
    return batch.lq[0], batch.keys[0]


def poison(run, crop: torch.Tensor, where: str) -> None:
    """From now on the network answers the sample of this crop with NaN, in its loss or only in its gradient."""
    from train.objective import signed
    bad = signed(crop)

    def spoilt(module, inputs, losses):
        hit = torch.tensor([torch.equal(one, bad) for one in inputs[0]["lq"]])
        spoil = torch.where(hit, float("nan"), 1.0)
        if where == "gradient":
            values = losses["loss"].clone()
            values.register_hook(lambda gradient: gradient * spoil)
            return losses | {"loss": values}
        return losses | {"loss": losses["loss"] * spoil}
    run.objective.register_forward_hook(spoilt)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("micro_batch", [4, 2])
def test_a_number_that_is_none_stops_before_the_update_and_names_its_sample(configured, where, micro_batch):
    run = trainer(configured(micro_batch=micro_batch))
    crop, key = victim(run, 10)         # of the third step
    poison(run, crop, where)
    seen = []
    update = run.optimizer.step
    run.optimizer.step = lambda: (update(), seen.append(weights(run)))
    with pytest.raises(NotFinite, match=rf"step 3: .*{key}.*lower optimizer.rate"):
        run.fit()
    assert run.step == 2 and same({name: tensor for name, tensor in weights(run).items() if "/" not in name},
                                  {name: tensor for name, tensor in seen[-1].items() if "/" not in name})
    said = json.loads((Path(run.config.out) / "not-finite-step-000000003.json").read_text())
    assert [(sample["key"], sample["position"]) for sample in said["samples"]] == [(key, 10)]
    assert len(said["batch"]) == 4 and key in said["batch"]
    wrong = said["samples"][0]
    assert wrong["loss_alone"] == "nan" if where == "loss" else wrong["gradients"]


def test_weights_that_are_none_are_no_samples_fault(configured):
    run = trainer(configured())
    with torch.no_grad():
        next(iter(run.trained.values())).fill_(float("nan"))
    with pytest.raises(NotFinite, match="step 1"):
        run.fit()


@pytest.mark.slow
def test_what_does_not_fit_into_memory_names_the_batch_and_the_remedy(configured, tmp_path):
    # From the second step on the process may not grow: as a card that is too small.
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(configured(batch=32, images=128)))
    program = """
import resource, sys
import torch
from train import config, loop
from train.failures import OutOfMemory
from train.ranks import Ranks
torch.set_num_threads(1)
run = loop.Trainer(config.load(sys.argv[1]), Ranks(0, 1, torch.device("cpu")))
def narrow(*_):
    if run.step == 1:
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20),) * 2)
run.objective.register_forward_pre_hook(narrow)
try:
    run.fit()
except OutOfMemory as error:
    print(error)
    sys.exit(7)
"""
    # Large pieces of memory are mapped one by one, so that what a step has freed is gone.
    done = subprocess.run([sys.executable, "-c", program, str(path)], cwd=REPOSITORY, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"})
    assert done.returncode == 7, done.stdout + done.stderr
    assert "micro-batches of 32 crops of 64 pixels" in done.stdout and "micro_batch: 16" in done.stdout
    assert "checkpointing: true" in done.stdout


def test_an_error_of_another_kind_stays_what_it_is(configured):
    from train.failures import memory_named
    with pytest.raises(RuntimeError, match="shapes"), memory_named(trainer(configured()).config, 4):
        raise RuntimeError("shapes do not match")
    with pytest.raises(OutOfMemory, match=r"data\.crop below 64"), memory_named(trainer(configured()).config, 1):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_too_many_damaged_samples_stop_the_run(configured, tmp_path):
    from tests.train.conftest import picture, write_corpus
    damaged = write_corpus(tmp_path / "damaged", {"hq": [6]},
                           lambda key: b"<html>" if key.endswith(("1", "2")) else picture(key))
    values = configured(data={"corpus": [str(damaged)], "reading": {"max_corrupt": 0.001}})
    with pytest.raises(TooManyCorrupt, match=r"hq-000000-[12]"):
        trainer(values).fit()
