"""Runs of the loop inside a test's process."""

import json
from pathlib import Path

import torch

from degrade.strict import check
from train.config import Training
from train.loop import Trainer
from train.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


def trainer(values: dict, said: list[str] | None = None, **options: object) -> Trainer:
    """A trainer of a configuration, on one rank."""
    said = [] if said is None else said
    return Trainer(check(Training, values, "test"), ALONE, said.append, **options)


def trained(values: dict, **options: object) -> Trainer:
    """The same after it has run."""
    run = trainer(values, **options)
    run.fit()
    return run


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    """Copies of what is trained, of its running mean and of the optimizer's states."""
    from train import optimizer
    found = {name: parameter.detach().clone() for name, parameter in run.trained.items()}
    found |= {f"ema/{name}": mean.clone() for name, mean in run.ema.means.items()}
    return found | {f"optimizer/{name}": state.clone()
                    for name, state in optimizer.states(run.optimizer, run.trained).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether all is equal bit by bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def metrics(values: dict) -> list[dict]:
    """The lines of the log."""
    return [json.loads(line) for line in (Path(values["out"]) / "metrics.jsonl").read_text().splitlines()]
