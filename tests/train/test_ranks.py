"""Two ranks are one: DDP and FSDP2 give the losses and weights of one process on the same global batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from degrade.strict import ConfigError, check
from tests.conftest import REPOSITORY
from tests.train.runs import metrics, trained, trainer
from train.batches import Loader
from train.checkpoint import Checkpoints
from train.config import Training
from train.ranks import Ranks

# Float32 sums in another order, through eight steps. A large eps keeps Adam from blowing up tiny gradients.
LOSS, WEIGHT = 1e-3, 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


def config(folder: Path, name: str, task: str, prior: Path, pictures: Path, **changes: object) -> dict:
    given = {"name": task, "prior": str(prior)}
    if task == "supir.adaptor":
        given |= {"encoder": str(folder / "encoder-one" / "model"), "preview_steps": 2}
    return {"task": given, "out": str(folder / name), "images": 32, "batch": 4, "log_every": 1,
            "data": {"corpus": [str(pictures)], "crop": 64, "workers": 0,
                     "reading": {"weights": {"hq": 3, "negative": 1}}},
            "optimizer": {"rate": 1e-2, "eps": 1e-2}, "ema": {"half_life": 16}, "checkpoints": {"every": 16},
            "validation": {"every": 1000, "images": 3, "previews": int(name == "adaptor-fsdp")}} | changes


@pytest.fixture(scope="module")
def runs(folder, prior, pictures) -> dict[str, dict]:
    """Encoder and adaptor on one rank and on two, by DDP and FSDP2, and runs that change their number of ranks."""
    made = {}

    def one(name: str, task: str, **changes: object) -> dict:
        made[name] = config(folder, name, task, prior, pictures, **changes)
        return made[name]
    for task in ("encoder", "adaptor"):
        run = trained(one(f"{task}-one", f"supir.{task}"))
        run.export()
    trained(one("grows", "supir.adaptor"), stop_at=4)                   # one rank, then two
    two = [{"config": one("encoder-ddp", "supir.encoder", micro_batch=1)},         # each in two micro-batches
           {"config": one("adaptor-ddp", "supir.adaptor")},
           {"config": one("adaptor-fsdp", "supir.adaptor", parallel="fsdp", micro_batch=1)}]
    two.append({"config": made["grows"] | {"parallel": "fsdp"}})
    two.append({"config": one("shrinks", "supir.adaptor", parallel="fsdp"), "stop_at": 4})    # two, then one
    path = folder / "scenarios.json"
    path.write_text(json.dumps(two))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           str(REPOSITORY / "tests" / "train" / "two_ranks.py"), str(path)], cwd=REPOSITORY,
                          capture_output=True, text=True, timeout=280,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    trained(made["shrinks"])
    return made


PAIRS = [("encoder-one", "encoder-ddp"), ("adaptor-one", "adaptor-ddp"), ("adaptor-one", "adaptor-fsdp"),
         ("adaptor-one", "grows"), ("adaptor-one", "shrinks")]


@pytest.mark.parametrize("one, other", PAIRS)
def test_losses_norms_and_validation_are_those_of_one_rank(runs, one, other):
    for name in ("loss", "gradient", "validation/loss"):
        first, second = ([line[name] for line in metrics(runs[run]) if name in line and ("/" not in name or
                          line["step"] == 8)] for run in (one, other))
        assert len(first) == len(second) == (1 if "/" in name else 8)
        assert first == pytest.approx(second, rel=LOSS)


@pytest.mark.parametrize("one, other", PAIRS)
def test_weights_means_and_states_are_those_of_one_rank(runs, one, other):
    stored = []
    for run in (one, other):
        checkpoint, pieces = Checkpoints(Path(runs[run]["out"]) / "checkpoints", Ranks(0, 1, torch.device("cpu"))
                                         ).latest()
        assert checkpoint.step == 8
        stored.append({name: pieces.read(name) for name in pieces.shapes})
    assert stored[0].keys() == stored[1].keys()
    for name, tensor in stored[0].items():
        torch.testing.assert_close(stored[1][name], tensor, rtol=0, atol=WEIGHT, msg=lambda text, name=name:
                                   f"{name}: {text}")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_each_rank_keeps_a_part_of_the_checkpoint(runs, kind):
    folder = max((Path(runs[f"adaptor-{kind}"]["out"]) / "checkpoints").iterdir())
    sizes = [(folder / f"rank-{rank}.safetensors").stat().st_size for rank in (0, 1)]
    assert min(sizes) > 0.8 * max(sizes)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_save_the_model_of_one(runs, kind):
    one, two = (load_file(Path(runs[f"adaptor-{name}"]["out"]) / "model" / "adaptor" /
                          "diffusion_pytorch_model.safetensors") for name in ("one", kind))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=WEIGHT)


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_loaded(folder, prior, pictures):
    values = config(folder, "uneven", "supir.encoder", prior, pictures, batch=6, micro_batch=4)
    values["task"]["prior"] = str(prior)
    with pytest.raises(ConfigError, match="batch = 6 cannot be cut into micro-batches of 4"):
        trainer(values)
    three = check(Training, values | {"batch": 4, "micro_batch": None}, "test")
    with pytest.raises(ConfigError, match="for 3 ranks: it must be a multiple of 3"):
        Loader(three.data, 0, batch=4, micro_batch=three.micro(3), rank=0, ranks=3)
