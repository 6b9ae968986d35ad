"""Rates of runs, as `clearshard plan` reads them."""

import json

import pytest

from pipeline.cluster import Totals
from pipeline.config import Score
from pipeline.rates import NAME, note
from pipeline.score import ScoreJob
from pipeline.storage import Folder


@pytest.mark.parametrize(("rows", "seconds", "kept"), [(50, 2.0, False), (50, 20.0, True), (20_000, 2.0, True)])
def test_a_run_that_is_long_enough_leaves_its_rate(tmp_path, ray_here, rows, seconds, kept):
    folder = Folder.at(str(tmp_path))
    (folder / "reports").write(NAME, b"[1]")        # what is no table of rates is written anew
    note(folder, ScoreJob(folder, Score()), Totals(rows=rows, seconds=seconds))
    rates = json.loads((folder / "reports").read(NAME))
    assert rates == ({"score": {"rows": rows, "seconds": seconds, "cpus": 2, "gpus": 0, "card": None}} if kept else [1])
