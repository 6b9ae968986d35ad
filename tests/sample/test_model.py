"""Which model restores, and what it may recommend about its use."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from clearshard import app
from degrade.strict import ConfigError
from models.supir_index import INDEX
from sample import model
from sample.presets import choose
from tests.conftest import photograph


@pytest.fixture
def advised(tiny_models, tmp_path):
    """advised(**keys): a copy of the tiny SUPIR whose index says that, too."""
    def copied(**keys) -> Path:
        for part in ("sdxl", "supir"):
            shutil.copytree(tiny_models / part, tmp_path / "models" / part, dirs_exist_ok=True)
        path = tmp_path / "models" / "supir" / INDEX
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
        return path.parent
    return copied


@pytest.fixture
def picture(tmp_path):
    photograph(0, 60, 48).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def restore(*arguments, check=True):
    torch.set_num_threads(1)
    result = CliRunner().invoke(app, ["restore", *map(str, arguments)])
    assert not check or result.exit_code == 0, result.output
    return result


def asked(out, name="a.png"):
    return json.loads((out / f"{name}.json").read_text())["asked"]


def test_without_a_model_the_embedded_one_restores_as_it_recommends_into_restored(advised, picture, monkeypatch):
    own = advised(about="a SUPIR of random numbers", short=64, scale=1.5, preset={"name": "fidelity", "steps": 2})
    monkeypatch.setattr(model, "EMBEDDED", own)
    monkeypatch.chdir(picture.parent)
    said = restore(picture).stdout
    assert "no --model: a SUPIR of random numbers, for a first look" in said and "docs/supir_weights.md" in said
    settings = asked(picture.parent / "restored")
    assert (settings["scale"], settings["short"]) == (1.5, 64)
    assert settings["preset"]["name"] == "fidelity" and settings["preset"]["steps"] == 2
    assert INDEX in settings["preset"]["source"]["steps"]


def test_what_the_user_says_comes_before_what_the_model_recommends(advised, picture, tmp_path):
    own = advised(short=1024, scale=4, preset={"name": "fidelity", "steps": 90})
    restore(picture, "--model", own, "--out", tmp_path / "out", "--scale", 1, "--short", 64, "--steps", 2)
    settings = asked(tmp_path / "out")
    assert (settings["scale"], settings["short"], settings["preset"]["steps"]) == (1.0, 64, 2)
    assert settings["preset"]["guidance"] == choose("fidelity").guidance.model_dump()
    restore(picture, "--model", own, "--out", tmp_path / "other", "--scale", 1, "--short", 64, "--steps", 2,
            "--preset", "lightning")
    assert asked(tmp_path / "other")["preset"]["name"] == "lightning"


def test_a_model_that_recommends_nothing_gets_the_defaults(tiny_models):
    assert model.recommended(tiny_models / "supir") == model.Recommended()
    assert model.preset_of(tiny_models / "supir") == choose("quality")


def test_an_installation_without_a_model_says_where_one_comes_from(picture, monkeypatch, tmp_path):
    monkeypatch.setattr(model, "EMBEDDED", tmp_path / "nothing")
    result = restore(picture, check=False)
    assert result.exit_code == 2 and "import-supir" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(("keys", "words"), [
    ({"short": 3}, "short"), ({"scale": "large"}, "scale"), ({"preset": "qualty"}, "did you mean 'quality'"),
    ({"preset": {"steps": 3}}, "preset has no name"), ({"preset": {"name": "quality", "step": 3}}, "step")])
def test_a_recommendation_that_cannot_be_names_file_and_key(advised, keys, words):
    with pytest.raises(ConfigError, match=rf"(?s)supir\.json.*{words}"):
        model.preset_of(advised(**keys))
