"""Measures against known values, and `clearshard evaluate` with a tiny SUPIR."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from clearshard import app
from degrade import SecondOrderDegrader
from degrade.strict import ConfigError
from models.supir_index import INDEX
from pipeline.decode import Limits
from pipeline.metrics import MetricUnavailable, full_reference
from sample.evaluate import Batches, Lines, Maker, Picture, TooSmall, alike, middle, variants
from sample.evaluation import pairs
from sample.measures import interval, luma, psnr, psnr_y, ssim
from sample.presets import choose
from sample.restore import Input, inputs
from sample.supir import SupirPipeline
from tests.conftest import photograph

QUICK = ("--steps", 2, "--batch", 2)


def picture(seed=0, width=96, height=80):
    return np.array(photograph(seed, width, height))


def noisy(image, sigma):
    noise = np.random.default_rng(0).normal(0, sigma, image.shape)
    return (image + noise).round().clip(0, 255).astype(np.uint8)


# Measures ---------------------------------------------------------------------------------------------------

def test_psnr_is_its_formula_and_100_for_equal_pictures():
    image = np.full((16, 16, 3), 100, np.uint8)
    assert psnr(image, image + 5) == pytest.approx(20 * math.log10(255 / 5))
    assert psnr(image, image) == psnr_y(image, image) == 100
    one = image.copy()
    one[0, 0, 0] += 16
    assert psnr(image, one) == pytest.approx(10 * math.log10(255 ** 2 / (256 / (16 * 16 * 3))))


def test_luma_goes_from_16_to_235_with_the_weights_of_bt_601():
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    assert luma(colours)[0] == pytest.approx([16, 235, 81.481, 144.553, 40.966])
    grey = np.full((16, 16, 3), 100, np.uint8)
    assert psnr_y(grey, grey + 5) == pytest.approx(20 * math.log10(255 / (5 * 219 / 255)))


def test_ssim_is_that_of_scikit_image_and_1_for_equal_pictures():
    metrics = pytest.importorskip("skimage.metrics")
    truth = picture()
    assert ssim(truth, truth) == pytest.approx(1)
    for sigma in (5, 25, 80):
        image = noisy(truth, sigma)
        reference = metrics.structural_similarity(luma(truth), luma(image), data_range=255, gaussian_weights=True,
                                                  sigma=1.5, use_sample_covariance=False)
        assert ssim(image, truth) == pytest.approx(reference, abs=1e-9)
        assert psnr(image, truth) == pytest.approx(metrics.peak_signal_noise_ratio(truth, image))


def test_ssim_of_two_flat_pictures_is_that_of_their_luminance_alone():
    one, other = np.full((16, 16, 3), 255, np.uint8), np.zeros((16, 16, 3), np.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim(one, other) == pytest.approx((2 * 235 * 16 + c1) / (235 ** 2 + 16 ** 2 + c1))


def test_pictures_of_other_sizes_or_too_small_are_refused():
    with pytest.raises(ValueError, match="one size"):
        psnr(picture(), picture()[1:])
    with pytest.raises(ValueError, match="sides of 11"):
        ssim(picture()[:10], picture()[:10])


def test_a_metric_of_pyiqa_compares_the_picture_with_the_true_one():
    pytest.importorskip("pyiqa")
    truth = picture()
    image = noisy(truth, 10)
    assert full_reference("psnr")(image, truth) == pytest.approx(psnr(image, truth), abs=1e-3)
    with pytest.raises(MetricUnavailable, match="full-reference metric 'musiq'"):
        full_reference("musiq")


def test_an_interval_repeats_covers_and_shrinks_with_the_number_of_images():
    values = np.random.default_rng(1).normal(0.5, 1.0, 400)
    few, many = interval(values[:25], 0, "a"), interval(values, 0, "a")
    assert many == interval(values, 0, "a") != interval(values, 1, "a")
    assert many.low < 0.5 < many.high and many.mean == pytest.approx(values.mean())
    # Of a normal sample the interval is about 1.96 standard errors to both sides.
    assert many.high - many.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)
    assert few.high - few.low > 2.5 * (many.high - many.low)
    assert interval([0.25], 0, "a") == (0.25, None, None)
    with pytest.raises(ValueError, match="at least one"):
        interval([], 0, "a")


# Variants ---------------------------------------------------------------------------------------------------

def test_each_tau_is_compared_with_none_and_no_preset_is_sampled_twice():
    found = variants(choose("quality"), [4, 1])
    assert list(found)[4:] == ["restored", "without control", "without pull", "tau 4", "tau 1"]
    assert pairs(found) == [("robust encoder", "plain encoder"), ("restored", "without control"),
                            ("tau 4", "without pull"), ("tau 1", "without pull")]
    assert found["without control"].control.at(3.0) == 0 and found["tau 4"].tau == 4
    assert [names for _, names in alike(found)] == [["restored", "without pull"], ["without control"], ["tau 4"],
                                                    ["tau 1"]]
    assert list(variants(choose("quality")))[4:] == ["restored", "without control"]


def test_pictures_are_cut_in_their_middle_and_too_small_ones_refused():
    image = picture(0, 200, 70)
    assert np.array_equal(middle(image), image[3:67, 4:196])
    assert np.array_equal(middle(image[:64, :64]), image[:64, :64])
    with pytest.raises(TooSmall, match="50 x 70"):
        middle(image[:, :50])


def test_batches_are_of_one_size_and_lack_the_same(tmp_path):
    for number, size in enumerate([(80, 64), (64, 64), (90, 70), (64, 130), (70, 70)]):
        photograph(number, *size).save(tmp_path / f"{number}.png")
    sources, lines = list(inputs([tmp_path], tmp_path / "out")), Lines(tmp_path / "measures.jsonl")
    batches = Batches(sources, lines, ["x", "y"], 2, Limits())
    assert batches.pending() == 10
    found = list(batches)
    assert [[one.name for one in batch] for batch, _ in found] == [["0.png", "1.png"], ["2.png", "4.png"], ["3.png"]]
    lines.add(found[0][0][1], "x", {"psnr": 1.0})
    again = Batches(sources, Lines(lines.path), ["x", "y"], 2, Limits())
    assert again.pending() == 9
    assert [([one.name for one in batch], missing) for batch, missing in again if missing == ("y",)] == [
        (["1.png"], ("y",))]


def test_a_half_written_line_is_replaced_and_a_damaged_one_named(tmp_path):
    path, one = tmp_path / "measures.jsonl", middle(picture(0, 64, 64))
    sources = [Input(tmp_path / "a.png", "a.png")]
    Image.fromarray(one).save(sources[0].path)
    (batch, _), = Batches(sources, Lines(path), ["x"], 1)
    lines = Lines(path)
    lines.add(batch[0], "x", {"psnr": 1.0})
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:30])
    again = Lines(path)
    assert len(again.found) == 1 and path.read_bytes() == whole + whole[:30]
    again.add(batch[0], "y", {"psnr": 2.0})
    assert path.read_bytes().startswith(whole) and len(Lines(path).found) == 2
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(ConfigError, match="line 1 is damaged"):
        Lines(path)


def test_a_batch_gives_each_picture_what_it_gets_alone(tiny_models):
    torch.set_num_threads(1)
    make = Maker(SupirPipeline.from_pretrained(tiny_models / "supir", device="cpu"), SecondOrderDegrader("supir", 3))
    wanted = variants(choose("fidelity", {"steps": 2}), [2])
    pictures = [Picture(name, "", middle(picture(seed, 128, 64))) for seed, name in enumerate(("a", "b"))]
    together = dict(make(pictures, wanted))
    assert set(together) == set(wanted)
    for place, one in enumerate(pictures):
        for variant, (alone,) in make([one], wanted):
            assert np.abs(alone.astype(int) - together[variant][place]).max() <= 1, variant
    truth = pictures[0].hq
    assert psnr(together["without control"][0], truth) != psnr(together["restored"][0], truth)


def test_a_recipe_whose_results_are_smaller_is_refused(tiny_models):
    pipeline = SupirPipeline.from_pretrained(tiny_models / "supir", device="cpu")
    with pytest.raises(ConfigError, match="such as supir"):
        Maker(pipeline, SecondOrderDegrader("realesrgan_x4"))


# The command ------------------------------------------------------------------------------------------------

def evaluate(*arguments, check=True):
    torch.set_num_threads(1)
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    assert not check or result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "inner").mkdir()
    photograph(0, 150, 70).save(folder / "b.png")
    photograph(1, 64, 64).save(folder / "a.jpg")
    photograph(2, 70, 70).convert("L").save(folder / "inner" / "grey.png")
    photograph(3, 40, 90).save(folder / "narrow.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_models, pictures):
    out = tmp_path_factory.mktemp("evaluation")
    return out, evaluate(tiny_models / "supir", pictures, "--out", out, "--tau", 2, "--shown", 2, *QUICK, check=False)


def test_good_pictures_are_measured_and_the_others_named(done):
    out, result = done
    assert result.exit_code == 1 and "narrow.png: too_small" in result.stderr and "broken.jpg" in result.stderr
    said = json.loads((out / "evaluation.json").read_text())
    assert said["images"] == 3 and {one["image"] for one in said["refused"]} == {"narrow.png", "broken.jpg"}
    assert list(said["means"]) == ["input", "autoencoder", "plain encoder", "robust encoder", "restored",
                                   "without control", "without pull", "tau 2"]
    rows = [json.loads(line) for line in (out / "measures.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 8
    of = {(row["image"], row["variant"]): row["measured"]["psnr"] for row in rows}
    pulled = [of[name, "tau 2"] - of[name, "without pull"] for name in ("a.jpg", "b.png", "inner/grey.png")]
    told = next(one for one in said["differences"] if (one["of"], one["measure"]) == ("tau 2", "psnr"))
    assert told["mean"] == pytest.approx(np.mean(pulled)) and told["low"] <= told["mean"] <= told["high"]
    assert said["means"]["input"]["psnr"] == pytest.approx(np.mean([of[n, "input"] for n, v in of if v == "input"]))
    text = (out / "evaluation.md").read_text()
    assert "| tau 2 − without pull | ssim |" in text and "- narrow.png: too_small:" in text
    with Image.open(out / "evaluation.png") as sheet:
        assert sheet.size == (9 * 196, 20 + 2 * 216)


def test_a_second_run_measures_nothing_and_another_tau_only_itself(done, tiny_models, pictures, tmp_path):
    out = shutil.copytree(done[0], tmp_path / "again")
    before = (out / "measures.jsonl").read_bytes()
    arguments = (tiny_models / "supir", pictures / "a.jpg", pictures / "b.png", "--out", out, *QUICK)
    assert "0 of 16 to make" in evaluate(*arguments, "--tau", 2, "--shown", 0).stdout
    assert (out / "measures.jsonl").read_bytes() == before
    assert "2 of 18 to make" in evaluate(*arguments, "--tau", 2, "--tau", 1, "--dry-run").stdout
    assert (out / "measures.jsonl").read_bytes() == before


def test_other_settings_are_refused_until_what_is_there_may_go(tiny_models, pictures, tmp_path):
    arguments = (tiny_models / "supir", pictures / "a.jpg", "--out", tmp_path, *QUICK)
    evaluate(*arguments)
    (tmp_path / "notes.txt").write_text("mine")
    refused = evaluate(*arguments, "--seed", 1, check=False)
    assert refused.exit_code == 2 and "another seed" in refused.stderr
    assert "6 of 6 to make" in evaluate(*arguments, "--seed", 1, "--overwrite").stdout
    assert json.loads((tmp_path / "evaluation.json").read_text())["settings"]["seed"] == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_what_a_kill_leaves_is_finished_with_the_numbers_of_a_run_that_was_not_killed(
        done, tiny_models, pictures, tmp_path, share):
    # A kill leaves a beginning of the lines, the last one perhaps cut.
    whole, _ = done
    out = tmp_path / "killed"
    out.mkdir()
    shutil.copy(whole / "settings.json", out)
    lines = (whole / "measures.jsonl").read_bytes()
    (out / "measures.jsonl").write_bytes(lines[:int(share * len(lines))])
    kept = lines[:lines.rfind(b"\n", 0, int(share * len(lines))) + 1]
    evaluate(tiny_models / "supir", pictures, "--out", out, "--tau", 2, "--shown", 2, *QUICK, check=False)
    assert (out / "measures.jsonl").read_bytes().startswith(kept)
    assert len((out / "measures.jsonl").read_bytes().splitlines()) == 3 * 8
    found, wanted = (json.loads((folder / "evaluation.json").read_text()) for folder in (out, whole))
    for variant, means in wanted["means"].items():      # other batches may round a pixel the other way
        assert found["means"][variant] == pytest.approx(means, abs=1e-3)
    assert [one["of"] for one in found["differences"]] == [one["of"] for one in wanted["differences"]]


@pytest.mark.parametrize(("arguments", "words"), [
    (("--recipe", "realesrgan_x4"), "such as supir"), (("--metric", "lpipz"), "no full-reference metric"),
    (("--colours", "sepia"), "wavelet"), (("--quality-words", "suppir"), "suppir"),
    (("--preset", "qualty"), "did you mean 'quality'")])
def test_a_mistake_is_one_clear_error(tiny_models, pictures, tmp_path, arguments, words):
    if "--metric" in arguments:
        pytest.importorskip("pyiqa")
    result = evaluate(tiny_models / "supir", pictures / "a.jpg", "--out", tmp_path, *QUICK, *arguments, check=False)
    assert result.exit_code == 2 and words in result.stderr and "Traceback" not in result.stderr


def test_what_is_no_supir_or_no_picture_is_refused(tiny_models, tmp_path):
    (tmp_path / "empty").mkdir()
    assert INDEX in evaluate(tmp_path, tmp_path, "--out", tmp_path / "out", check=False).stderr
    assert "no images" in evaluate(tiny_models / "supir", tmp_path / "empty", "--out", tmp_path / "out",
                                   check=False).stderr
