"""`clearshard demo`: the whole path, with a kill in the middle of it."""

import json
import re

import pytest

from tests.conftest import clearshard
from train import demo


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_goes_the_whole_path_although_its_training_is_killed(tmp_path):
    pytest.importorskip("skimage", reason="needs scikit-image's photographs")
    root = tmp_path / "demo"
    said = clearshard("demo", root).stdout
    assert re.search(r"killed with SIGKILL.*going on from step [1-9]", said, re.S)
    assert "from photographs to restored pictures:" in said and "all well" in clearshard("verify", root).stdout
    for name in ("encoder", "adaptor"):
        lines = [json.loads(line) for line in (root / "training" / name / "metrics.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines if "loss" in line]
        assert steps == list(range(5, steps[-1] + 1, 5))        # each once, although some were taken twice
        assert lines[-1]["step"] == steps[-1] and "validation/loss" in lines[-1]
    page = (root / "reports" / "demo.html").read_text()
    assert page.count('src="data:image/') == demo_samples(page) + 2 + 3 * len(demo.RESTORED)
    assert "A red cup of coffee on wood." in page and "killed with SIGKILL" in page


def demo_samples(page: str) -> int:
    """How many samples a page shows; at least one of each group."""
    groups = re.findall(r"<figcaption>(hq|negative): ", page)
    assert set(groups) == {"hq", "negative"}
    return len(groups)


def test_the_demo_begins_with_the_networks_of_the_program_where_it_has_some(tmp_path, monkeypatch):
    monkeypatch.setattr("sample.model.EMBEDDED", tmp_path / "embedded")
    assert demo.start(tmp_path / "models").prior == tmp_path / "models" / "sdxl"
    (tmp_path / "embedded").mkdir()
    (tmp_path / "embedded" / "supir.json").write_text(json.dumps({"format": 1, "prior": "prior", "short": 256}))
    begun = demo.start(tmp_path / "models")
    assert begun.trained and begun.prior == tmp_path / "embedded" / "prior"
    assert begun.task == {"start": str(tmp_path / "embedded")} and begun.adaptor["described"]["short"] == 256
