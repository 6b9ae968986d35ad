"""A program for torchrun: runs each configuration of a JSON file, one after the other, on all ranks."""

import json
import sys
from pathlib import Path

import torch

from degrade.strict import check
from train.config import Training
from train.loop import Trainer
from train.ranks import Ranks

if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks = Ranks.start("cpu")
    for scenario in json.loads(Path(sys.argv[1]).read_text()):
        run = Trainer(check(Training, scenario["config"], "test"), ranks, stop_at=scenario.get("stop_at"))
        finished = run.fit()
        if finished:
            run.export()
    ranks.stop()
