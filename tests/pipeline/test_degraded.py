"""The folder job of the degrader: what it writes, what it refuses, and that it can be killed at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from clearshard import app
from degrade import SecondOrderDegrader, load_recipe, presets
from degrade.words import words
from pipeline import degraded_workers
from pipeline.config import ConfigError
from pipeline.decode import decode
from pipeline.degraded import FolderJob
from pipeline.degraded_image import Found, Maker, Outcome, Settings
from pipeline.degraded_sheet import Chosen, centres
from tests.conftest import REPOSITORY, photograph

RECIPE = load_recipe("realesrgan_x4").to_yaml()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Photographs of odd kinds: two of one stem, a subfolder, grey, RGBA, 16 bits, a size that 4 does not divide."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    picture = photograph(0, 96, 80)
    picture.save(folder / "a.jpg", quality=92)
    picture.save(folder / "a.png")
    picture.convert("L").save(folder / "grey.png")
    picture.convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(folder / "deep.png")
    photograph(1, 99, 82).save(folder / "sub" / "odd.webp", lossless=True)
    (folder / "a.txt").write_text("a caption")
    return folder


def one_process(maker: Maker, images: Iterator[Found], workers: int) -> Iterator[Outcome]:
    return (maker(found) for found in images)


@pytest.fixture
def in_process(monkeypatch):
    """Without worker processes, whose start takes seconds."""
    monkeypatch.setattr("pipeline.degraded.outcomes", one_process)
    monkeypatch.setattr("pipeline.degraded_commands.prepared", lambda: None)


def job(images: Path, output: Path, **settings) -> FolderJob:
    return FolderJob(Maker(str(images), str(output), Settings(**{"recipe": RECIPE} | settings)))


def files(folder: Path) -> dict[str, bytes]:
    """Every file that is not hidden, by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)}


def command(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.output


# What is written --------------------------------------------------------------------------------------------

@pytest.mark.usefixtures("in_process")
def test_results_are_what_the_degrader_gives_for_the_relative_path_as_key(images, tmp_path):
    result = job(images, tmp_path / "lq", seed=3, epoch=2).run()
    assert (result.totals.rows, result.totals.failed) == (6, 0)
    degrader = SecondOrderDegrader("realesrgan_x4", seed=3)
    for path in images.rglob("*.*g"):
        key = path.relative_to(images).as_posix()
        want, parameters = degrader.image(decode(path.read_bytes()), key, epoch=2)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "lq" / f"{key}.png")), want)
        assert json.loads((tmp_path / "lq" / f"{key}.json").read_text()) == parameters


@pytest.mark.usefixtures("in_process")
def test_names_keep_their_extension_so_that_none_collide_and_text_is_left_out(images, tmp_path):
    job(images, tmp_path / "lq").run()
    pictures = {"a.jpg", "a.png", "grey.png", "alpha.png", "deep.png", "sub/odd.webp"}
    assert set(files(tmp_path / "lq")) == {"recipe.yaml", "degraded.yaml"} | {
        name + ending for name in pictures for ending in (".png", ".json")}
    assert load_recipe(tmp_path / "lq" / "recipe.yaml") == load_recipe("realesrgan_x4")


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("crop", "size"), [(True, (80, 96)), (False, (82, 99))])
def test_sides_are_cut_to_multiples_of_the_scale_unless_told_otherwise(images, tmp_path, crop, size):
    job(images, tmp_path / "lq", crop=crop).run()
    parameters = json.loads((tmp_path / "lq" / "sub" / "odd.webp.json").read_text())
    assert (parameters["height"], parameters["width"]) == size
    assert Image.open(tmp_path / "lq" / "sub" / "odd.webp.png").size == (24, 20)


@pytest.mark.usefixtures("in_process")
def test_recipes_that_give_the_input_size_cut_nothing(images, tmp_path):
    job(images, tmp_path / "lq", recipe=load_recipe("diffbir_face").to_yaml()).run()
    assert Image.open(tmp_path / "lq" / "sub" / "odd.webp.png").size == (99, 82)


@pytest.mark.usefixtures("in_process")
def test_one_image_gets_what_it_gets_in_its_folder(images, tmp_path):
    job(images, tmp_path / "all").run()
    status, _ = command("degrade", images / "grey.png", tmp_path / "one", "--recipe", "realesrgan_x4")
    one, everything = files(tmp_path / "one"), files(tmp_path / "all")
    assert status == 0 and set(one) == {"grey.png.png", "grey.png.json", "recipe.yaml", "degraded.yaml"}
    assert one["grey.png.png"] == everything["grey.png.png"]


@pytest.mark.usefixtures("in_process")
def test_results_inside_the_folder_of_images_are_not_taken_for_images(images):
    job(images, images / "lq").run()
    assert job(images, images / "lq").run().totals.rows == 0
    assert job(images, images / "other", seed=1).run().totals.rows == 6


@pytest.mark.usefixtures("in_process")
def test_names_that_are_no_utf8_work(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    photograph(0, 64, 64).save(folder / "a.png")
    os.rename(folder / "a.png", os.fsencode(folder) + b"/\xff.png")
    arguments = ("--recipe", "realesrgan_x4", "--contact-sheet")
    assert command("degrade", folder, tmp_path / "\udcfe", *arguments)[0] == 2
    output = tmp_path / "lq"
    status, _ = command("degrade", folder, output, *arguments)
    assert status == 0 and json.loads((output / "\udcff.png.json").read_text())["key"] == "\\xff.png"
    assert (output / "contact-sheet.html").read_text().count("data:image/jpeg") == 2


# Bad images -------------------------------------------------------------------------------------------------

@pytest.mark.usefixtures("in_process")
def test_bad_images_are_named_with_the_reason_and_tried_again(pile, tmp_path):
    photograph(0, 64, 12).save(pile / "thin.png")
    photograph(0, 700, 700).save(pile / "absurd.png")
    (pile / "nowhere.jpg").symlink_to("absent.jpg")
    arguments = ("degrade", pile, tmp_path / "lq", "--recipe", "realesrgan_x4", "--max-pixels", 450_000)
    status, output = command(*arguments)
    assert status == 0 and "6 refused" in output and "half.jpg: truncated: JPEG: Premature end" in output
    rows = [json.loads(line) for line in (tmp_path / "lq" / "refused.jsonl").read_text().splitlines()]
    assert {row["key"]: row["reason"] for row in rows} == {
        "page.jpg": "not_an_image", "empty.png": "empty", "half.jpg": "truncated", "thin.png": "too_small",
        "absurd.png": "too_many_pixels", "nowhere.jpg": "not_found"}
    assert all(row["message"] for row in rows)

    for name in ("page.jpg", "empty.png", "thin.png", "absurd.png", "nowhere.jpg"):
        (pile / name).unlink()
    photograph(1).save(pile / "half.jpg", quality=92)
    status, output = command(*arguments)
    assert status == 0 and "1 images" in output and "refused" not in output
    assert "half.jpg.png" in files(tmp_path / "lq") and "refused.jsonl" not in files(tmp_path / "lq")


@pytest.mark.usefixtures("in_process")
def test_the_exit_status_is_1_if_no_image_succeeds(tmp_path):
    (tmp_path / "images").mkdir()
    arguments = ("degrade", tmp_path / "images", tmp_path / "lq", "--recipe", "realesrgan_x4")
    assert command(*arguments) == (1, f"degrade: no files in {tmp_path / 'images'}\n")
    (tmp_path / "images" / "page.jpg").write_bytes(b"<html>")
    assert command(*arguments)[0] == 1


class Deadly(Maker):
    """Some images take their process down with them."""

    def __call__(self, found: Found) -> Outcome:
        if found.path.startswith("deadly"):
            os.kill(os.getpid(), signal.SIGKILL)
        return Outcome(found)


@pytest.mark.slow
def test_a_process_that_dies_costs_the_image_that_killed_it_and_no_other(tmp_path):
    maker = Deadly(str(tmp_path), str(tmp_path), Settings(RECIPE))
    names = ["0", "deadly-1", "2", "deadly-3", "4", "5", "6", "7"]
    found = list(degraded_workers.outcomes(maker, iter([Found(name, 0.0) for name in names]), workers=2))
    assert [outcome.found.path for outcome in found] == names
    assert [outcome.found.path for outcome in found if outcome.reason == "worker_died"] == ["deadly-1", "deadly-3"]


@pytest.mark.usefixtures("in_process")
def test_a_full_disk_stops_the_job_and_says_what_to_do(images, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("pipeline.degraded_image.commit", full)
    status, output = command("degrade", images, tmp_path / "lq", "--recipe", "realesrgan_x4")
    assert status == 1 and "No space left on device" in output and "run the same command again" in output
    assert not list((tmp_path / "lq" / ".degraded" / "unfinished").glob(".tmp*"))


@pytest.mark.usefixtures("in_process")
def test_a_recipe_that_the_reference_does_not_have_is_refused_at_once_in_compat(images, tmp_path):
    status, output = command("degrade", images, tmp_path / "lq", "--recipe", "supir_table1_sr4", "--compat")
    assert status == 2 and "bicubic_antialias" in output


# Resuming ---------------------------------------------------------------------------------------------------

@pytest.mark.usefixtures("in_process")
def test_what_a_kill_left_is_mended_and_the_rest_is_not_done_twice(images, tmp_path):
    output = tmp_path / "lq"
    job(images, output).run()
    want = files(output)
    (output / "a.jpg.png").unlink()                                      # killed between parameters and image
    (output / "grey.png.png").unlink()
    (output / "grey.png.json").unlink()                                  # never begun
    (output / ".degraded" / "unfinished" / ".tmp-0123").write_bytes(b"half")
    kept = (output / "a.png.png").stat().st_mtime_ns
    result = job(images, output).run()
    assert (result.done_before, result.totals.rows) == (4, 2)
    assert files(output) == want and (output / "a.png.png").stat().st_mtime_ns == kept
    assert not os.listdir(output / ".degraded" / "unfinished")


@pytest.mark.usefixtures("in_process")
def test_an_image_is_there_only_when_its_parameters_are(images, tmp_path, monkeypatch):
    committed = []

    def stopped(path, target):
        if committed:
            raise KeyboardInterrupt
        committed.append(target)
        os.replace(path, target)
    monkeypatch.setattr("pipeline.degraded_image.commit", stopped)
    with pytest.raises(KeyboardInterrupt):
        job(images, tmp_path / "lq").run()
    assert len(list((tmp_path / "lq").rglob("*.json"))) == 1 and not list((tmp_path / "lq").rglob("[!.]*.png"))


@pytest.mark.usefixtures("in_process")
def test_a_changed_image_is_degraded_again(images, tmp_path):
    job(images, tmp_path / "lq").run()
    before = files(tmp_path / "lq")
    photograph(9, 96, 80).save(images / "a.png")
    os.utime(tmp_path / "lq" / "a.png.png", (0, 0))
    assert job(images, tmp_path / "lq").run().totals.rows == 1
    assert files(tmp_path / "lq")["a.png.png"] != before["a.png.png"]


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_and_ends_as_one_that_was_not(tmp_path, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(40):
        photograph(seed % 4, 256, 256).save(folder / f"{seed}.png")
    (folder / "page.jpg").write_bytes(b"<html>")
    program = [sys.executable, str(REPOSITORY / "clearshard.py"), "degrade", str(folder)]
    killed = subprocess.Popen([*program, str(tmp_path / "killed"), "--recipe", "realesrgan_x4", "--workers", "1"],
                              env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stderr=subprocess.DEVNULL)
    while len(list((tmp_path / "killed").glob("*.png"))) < 5:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = len(list((tmp_path / "killed").glob("*.png")))
    assert 5 <= done < 40
    result = job(folder, tmp_path / "killed").run()
    assert result.done_before + result.totals.rows == 41 and result.done_before >= done
    monkeypatch.setattr("pipeline.degraded.outcomes", one_process)
    job(folder, tmp_path / "whole").run()
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


# Settings ---------------------------------------------------------------------------------------------------

@pytest.mark.usefixtures("in_process")
def test_other_settings_are_refused_in_the_same_folder_until_overwrite(images, tmp_path):
    arguments = ("degrade", images, tmp_path / "lq", "--recipe")
    assert command(*arguments, "realesrgan_x4")[0] == 0
    before = files(tmp_path / "lq")
    for other, name in ((("supir",), "recipe: realesrgan_x4 there, supir now"),
                        (("realesrgan_x4", "--seed", 1), "seed: 0 there, 1 now"),
                        (("realesrgan_x4", "--compat"), "compat: None there, basicsr now")):
        status, output = command(*arguments, *other)
        assert status == 2 and name in output and "--overwrite" in output
        status, output = command(*arguments, *other, "--dry-run")
        assert status == 2
    assert files(tmp_path / "lq") == before
    status, output = command(*arguments, "realesrgan_x4", "--seed", 1, "--overwrite")
    assert status == 0 and "6 images" in output
    job(images, tmp_path / "new", seed=1).run()
    assert files(tmp_path / "lq") == files(tmp_path / "new")


@pytest.mark.usefixtures("in_process")
def test_an_overwrite_that_was_killed_goes_on_without_doing_anything_twice(images, tmp_path, monkeypatch):
    job(images, tmp_path / "lq").run()
    again = job(images, tmp_path / "lq", seed=1)
    again.overwrite = True
    maker_call = Maker.__call__
    calls = []

    def interrupted(maker, found):
        calls.append(found)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return maker_call(maker, found)
    monkeypatch.setattr(Maker, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        again.run()
    result = again.run()
    assert (result.done_before, result.totals.rows) == (3, 3)


@pytest.mark.usefixtures("in_process")
def test_a_folder_of_other_things_is_not_written_into(images, tmp_path):
    with pytest.raises(ConfigError, match="not empty and was not made by this command"):
        job(images, images).run()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        job(images, tmp_path / "file").run()
    (tmp_path / "lq").mkdir()
    job(images, tmp_path / "lq").run()
    with pytest.raises(ConfigError, match="does not exist"):
        job(tmp_path / "absent", tmp_path / "lq").run()


@pytest.mark.usefixtures("in_process")
def test_a_dry_run_says_what_is_pending_and_writes_nothing(images, tmp_path):
    status, output = command("degrade", images, tmp_path / "lq", "--recipe", "realesrgan_x4", "--dry-run")
    assert status == 0 and "6 images pending, 0 done" in output and "ms each" in output
    assert not (tmp_path / "lq").exists()


# The sheet, the words, the recipes --------------------------------------------------------------------------

@pytest.mark.usefixtures("in_process")
def test_the_contact_sheet_shows_every_image_with_what_was_done_to_it(images, tmp_path):
    arguments = ("degrade", images, tmp_path / "lq", "--recipe", "clearshard_x4", "--contact-sheet")
    status, output = command(*arguments)
    page = (tmp_path / "lq" / "contact-sheet.html").read_text()
    assert status == 0 and "contact-sheet.html" in output
    assert page.count("<figure>") == 6 and page.count("data:image/jpeg") == 12 and "http" not in page
    for path in (tmp_path / "lq").rglob("*.json"):
        assert all(f"<li>{phrase}</li>" in page for phrase in words(json.loads(path.read_text())))
    command(*arguments)
    assert (tmp_path / "lq" / "contact-sheet.html").read_text() == page


def test_the_sample_of_the_sheet_does_not_depend_on_the_order():
    found = [Found(str(number), 0.0) for number in range(200)]
    forward, backward = Chosen(), Chosen()
    for one, other in zip(found, reversed(found), strict=True):
        forward.offer(one)
        backward.offer(other)
    assert forward.sorted() == backward.sorted() and len(forward.sorted()) == 48


@pytest.mark.parametrize(("ratio", "size"), [(4, (300, 500)), (4, (64, 900)), (1, (300, 500))])
def test_both_halves_of_a_pair_show_the_same_place(ratio, size):
    rows, columns = np.indices(size)
    hq = np.stack([rows // ratio % 256, columns // ratio % 256, rows * 0], axis=2).astype(np.uint8)
    part, lq_part = centres(hq, np.ascontiguousarray(hq[::ratio, ::ratio]))
    assert np.array_equal(part[::ratio, ::ratio], lq_part) and part.shape[0] == part.shape[1] <= 256


@pytest.mark.parametrize("name", presets())
def test_every_drawn_step_has_words(name):
    degrader = SecondOrderDegrader(name)
    for key in range(60):
        drawn = degrader.draw(str(key), (128, 160))
        assert all(phrase and phrase[-1] not in " ," for phrase in words(drawn))


def test_words_say_kind_strength_and_ratio():
    kernel = {"kind": "aniso", "size": 13, "sigma_x": 2.1, "sigma_y": 0.4, "theta": -0.5}
    steps = [{"op": "blur", "kernel": kernel}, None,
             {"op": "resize", "height": 43, "width": 86, "mode": "bicubic_antialias"},
             {"op": "resize", "height": 43, "width": 86, "mode": "area"}, {"op": "round"},
             {"op": "noise", "family": "gaussian", "sigma": 12.2, "grey": True, "field": [0, 0]},
             {"op": "jpeg", "quality": 62, "subsampling": "4:2:0"}]
    assert words({"height": 100, "width": 200, "steps": steps}) == [
        "blur aniso 13 px sigma 2.1/0.4 at 151°", "×0.43 bicubic antialias", "gaussian 12 grey", "JPEG 62"]


def test_recipes_are_listed_and_shown():
    status, output = command("recipe", "list")
    assert status == 0 and [line.split()[0] for line in output.splitlines()] == presets()
    status, output = command("recipe", "show", "supir")
    assert status == 0 and output.startswith("# The paper names") and "name: supir\n" in output
    status, output = command("recipe", "show", "supir", "--full")
    assert status == 0 and output == load_recipe("supir").to_yaml()


@pytest.mark.usefixtures("in_process")
def test_a_mistaken_recipe_is_answered_with_the_nearest_name(tmp_path, images):
    for arguments in (("recipe", "show"), ("degrade", images, tmp_path / "lq", "--recipe")):
        status, output = command(*arguments, "realesrgan4x")
        assert status == 2 and "did you mean 'realesrgan_x4'?" in output and "Traceback" not in output
    assert not (tmp_path / "lq").exists()
