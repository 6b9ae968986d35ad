"""The small SUPIR that comes along: whole, honest about itself, and a restorer."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from clearshard import app
from sample.evaluate import ALONE, PLAIN, RESTORED, ROBUST, UNPULLED
from sample.model import EMBEDDED, recommended
from tests.conftest import REPOSITORY

RECIPE = REPOSITORY / "configs" / "mini" / "degradation.yaml"
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")     # none of them is in its corpus


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """At half their size."""
    package = find_spec("skimage")
    if package is None:
        pytest.skip("needs scikit-image's photographs")
    folder = tmp_path_factory.mktemp("photographs")
    for name in PHOTOGRAPHS:
        with Image.open(Path(package.origin).parent / "data" / name) as image:
            image.convert("RGB").reduce(2).save(folder / f"{Path(name).stem}.png")
    return sorted(folder.iterdir())


def clearshard(*arguments):
    torch.set_num_threads(1)
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def evaluated(out, images, *arguments):
    """Means and differences of PSNR."""
    clearshard("evaluate", EMBEDDED, *images, "--out", out, "--recipe", RECIPE, "--device", "cpu", "--shown", 0,
               *arguments)
    said = json.loads((out / "evaluation.json").read_text())
    differences = {(one["of"], one["against"]): one for one in said["differences"] if one["measure"] == "psnr"}
    return {name: row["psnr"] for name, row in said["means"].items()}, differences


def test_it_is_small_and_its_card_and_index_say_what_it_is():
    files = [path for path in EMBEDDED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    assert all(path.suffix in (".safetensors", ".json", ".txt", ".md") for path in files)
    about = recommended(EMBEDDED).about
    assert about and about in (EMBEDDED / "MODEL_CARD.md").read_text()


def test_a_picture_is_restored_without_naming_a_model(photographs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.open(photographs[1]).resize((112, 75)).save("old.jpg", quality=40)
    said = clearshard("restore", "old.jpg", "--steps", 3)
    assert "for a first look" in said and recommended(EMBEDDED).about in " ".join(said.split())
    result = np.asarray(Image.open("restored/old.jpg.png"))
    assert result.shape == (150, 224, 3) and result.std() > 25


def test_every_part_brings_photographs_nearer_to_the_truth(photographs, tmp_path):
    _, differences = evaluated(tmp_path / "out", photographs, "--steps", 3)
    assert differences[ROBUST, PLAIN]["mean"] > 0.5
    assert differences[RESTORED, ALONE]["low"] > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_on_the_test_pictures_of_bsds_it_does_what_its_card_says(shared, tmp_path):
    means, differences = evaluated(tmp_path / "all", [shared / "bsds" / "test"], "--steps", 1, "--batch", 4)
    assert differences[ROBUST, PLAIN]["mean"] >= 1 and differences[ROBUST, PLAIN]["low"] > 0.75
    means, differences = evaluated(tmp_path / "some", [shared / "bsds" / "test"], "--limit", 16, "--steps", 8,
                                   *(word for tau in (1, 2, 4, 8) for word in ("--tau", tau)))
    assert differences[RESTORED, ALONE]["low"] > 0
    pulled = [means[f"tau {tau}"] for tau in (1, 2, 4, 8)]
    assert pulled == sorted(pulled, reverse=True) and pulled[0] > means[UNPULLED]
