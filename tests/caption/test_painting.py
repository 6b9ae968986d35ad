"""The painter of negatives: each image depends on its row alone; and which came out by accident."""

from __future__ import annotations

import io
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from caption.config import NEGATIVE_FLAGS, Negatives, negatives_of
from caption.negatives import flags_of
from caption.painting import Painter, likeness, square
from caption.tokens import LIMIT, Tokens
from pipeline import scores
from pipeline.config import ConfigError, Corpus
from tests.conftest import photograph

ROUNDING = 2        # grey levels by which a pixel may differ between batch sizes
WORDS = "oil painting, cartoon, blurring, dirty, messy, low quality, frames, deformed, lowres, over-smooth"


def apart(first: np.ndarray, second: np.ndarray) -> int:
    """The largest difference of two pictures in grey levels."""
    return int(np.abs(first.astype(int) - second.astype(int)).max())


def settings(model: Path, **changes) -> Negatives:
    return Negatives(**{"model": str(model), "size": 64, "steps": 4, "dtype": "float32", "device": "cpu"} | changes)


def rows_to_paint(count: int = 5) -> tuple[list[dict], list[np.ndarray]]:
    subjects = ["the cat with green eyes", None, "a red cup on wooden table. A white rocket at dusk.", "", "a picture"]
    return ([{"subject": subjects[i % 5], "words": WORDS, "seed": 1000 + i} for i in range(count)],
            [np.asarray(photograph(i, 64, 64)) for i in range(count)])


@pytest.mark.parametrize("mode", ["image_to_image", "text_to_image"])
def test_an_image_is_the_same_alone_in_a_batch_and_in_another_order(sdxl, mode):
    paints = Painter(settings(sdxl, mode=mode))
    rows, tiles = rows_to_paint()
    together = [one.image for one in paints(rows, {"images": tiles})]
    alone = [paints([row], {"images": [tile]})[0].image for row, tile in zip(rows, tiles, strict=True)]
    backwards = [one.image for one in paints(rows[::-1], {"images": tiles[::-1]})][::-1]
    for first, second, third in zip(together, alone, backwards, strict=True):
        assert first.shape == (64, 64, 3) and first.dtype == np.uint8
        assert max(apart(first, second), apart(first, third)) <= ROUNDING
    assert min(apart(first, second) for i, first in enumerate(together) for second in together[:i]) > 10 * ROUNDING


@pytest.mark.parametrize("mode", ["image_to_image", "text_to_image"])
def test_seed_subject_and_guidance_decide_the_pixels_and_chance_does_not(sdxl, mode):
    [row], [tile] = rows_to_paint(1)
    paints = Painter(settings(sdxl, mode=mode))

    def image(paints: Painter = paints, **changes) -> np.ndarray:
        return paints([row | changes], {"images": [tile]})[0].image

    first = image()
    torch.manual_seed(3)
    assert apart(first, image()) == 0
    for other in (image(seed=1), image(subject="an oil painting of a rocket"),
                  image(Painter(settings(sdxl, mode=mode, guidance_scale=1.5))),
                  image(Painter(settings(sdxl, mode=mode, negative_prompt="style, high detail")))):
        assert apart(first, other) > ROUNDING


def test_no_token_is_counted_while_another_thread_paints(sdxl, monkeypatch):
    """A tokenizer pads for all of its users: counting would take the padding from under the pipeline."""
    (rows, tiles), paints, painting, during = rows_to_paint(2), Painter(settings(sdxl)), threading.Event(), []
    alone = [one.image for one in paints(rows, {"images": tiles})]
    pipeline, tokenizer = paints.pipeline, paints.pipeline.tokenizer

    def slow(**inputs):
        painting.set()
        time.sleep(0.2)
        result = pipeline(**inputs)
        painting.clear()
        return result

    def noted(text, **options):
        during.append(painting.is_set())
        return tokenizer(text, **options)

    monkeypatch.setattr(paints, "pipeline", slow)
    monkeypatch.setattr(paints, "tokens", Tokens(noted))
    with ThreadPoolExecutor(2) as threads:
        batches = list(threads.map(lambda _: paints(rows, {"images": tiles}), range(4)))
    assert during and not any(during)
    assert all(apart(one.image, image) == 0 for batch in batches for one, image in zip(batch, alone, strict=True))


def test_strength_decides_the_pixels(sdxl):
    rows, tiles = rows_to_paint(2)
    painters = [Painter(settings(sdxl, steps=8, strength=strength)) for strength in (0.125, 0.5, 1.0)]
    weak, half, full = ([one.image for one in paints(rows, {"images": tiles})] for paints in painters)
    for first, second in ((weak, half), (half, full), (weak, full)):
        assert min(apart(*pair) for pair in zip(first, second, strict=True)) > 10 * ROUNDING


def test_the_subject_is_cut_so_that_the_words_of_poor_quality_are_read(sdxl):
    paints = Painter(settings(sdxl))
    long = "The cat with green eyes sits on a wooden table. " * 20
    prompt = paints.prompt({"subject": long, "words": WORDS})
    assert paints.tokens.count(f"{long} {WORDS}") > LIMIT >= paints.tokens.count(prompt)
    assert prompt.startswith("The cat with green eyes") and prompt.endswith(WORDS)
    assert paints.prompt({"subject": None, "words": WORDS}) == WORDS
    assert paints.prompt({"subject": "the cat", "words": WORDS}) == f"the cat {WORDS}"


def test_words_that_leave_no_room_are_a_clear_error(sdxl):
    words = {"name": "many", "negative": "dirty, messy, " * 30}
    with pytest.raises(ConfigError, match=r"negatives\.words: .*many.* of 77 tokens"):
        Painter(settings(sdxl, words=words))


def test_a_strength_that_leaves_no_step_is_a_clear_error(sdxl):
    with pytest.raises(ValueError, match=r"strength 0\.2.*steps 4"):
        settings(sdxl, strength=0.2)
    settings(sdxl, strength=0.2, mode="text_to_image")         # there it means nothing
    with pytest.raises(ValueError, match="no negative words"):
        settings(sdxl, words="none")


@pytest.mark.parametrize(("lost", "named"), [
    ("model_index.json", r"no model_index\.json"), ("unet", "no unet/config.json"), ("vae", "no vae/config.json"),
    ("tokenizer/tokenizer.json", r"no tokenizer/vocab\.json"), ("tokenizer_2", r"no tokenizer_2/vocab\.json"),
    ("text_encoder_2", "no text_encoder_2/config.json"), ("scheduler", "no scheduler/"),
    ("vae/diffusion_pytorch_model.safetensors", r"cannot be loaded as SDXL.*vae")])
def test_a_model_that_lacks_a_part_says_what_it_should_hold(sdxl, tmp_path, lost, named):
    folder = Path(shutil.copytree(sdxl, tmp_path / "sdxl"))
    shutil.rmtree(folder / lost) if (folder / lost).is_dir() else (folder / lost).unlink()
    with pytest.raises(ConfigError, match=rf"(?s){folder}.*{named}"):
        Painter(settings(folder))


@pytest.mark.parametrize("cut", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
                                 "model_index.json"])
def test_a_model_that_was_copied_by_half_is_a_clear_error(sdxl, tmp_path, cut):
    folder = Path(shutil.copytree(sdxl, tmp_path / "sdxl"))
    path = folder / cut
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ConfigError, match=rf"{folder} cannot be loaded as SDXL"):
        Painter(settings(folder))


def test_a_model_of_another_kind_is_refused(tiny_models):
    with pytest.raises(ConfigError, match=r"llava holds no model_index\.json"):
        Painter(settings(tiny_models / "llava"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(sdxl):
    with pytest.raises(ConfigError, match=r"device 'cuda:1': PyTorch sees no GPU"):
        Painter(settings(sdxl, device="cuda:1"))


def test_a_picture_that_is_no_square_gives_its_middle():
    whole = np.asarray(photograph(3, 200, 128))
    assert np.array_equal(square(whole, 128), whole[:, 36:164])
    assert np.array_equal(square(whole.transpose(1, 0, 2), 128), whole[:, 36:164].transpose(1, 0, 2))
    assert {square(whole, size).shape for size in (64, 256)} == {(64, 64, 3), (256, 256, 3)}


def facts_of(image: np.ndarray, source: np.ndarray | None = None) -> dict:
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, "PNG")
    return scores.score(sink.getvalue()) | {"likeness": likeness(source, image)}


def compressed(image: np.ndarray, quality: int) -> np.ndarray:
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, "JPEG", quality=quality)
    return np.asarray(Image.open(sink))


PHOTOGRAPH = np.asarray(photograph(40, 256, 256))
ACCIDENTS = {
    "a black image": (np.zeros_like(PHOTOGRAPH), ["black", "blank"]),
    "a dark image with a spark": (np.pad(PHOTOGRAPH[:32, :32], ((0, 224), (0, 224), (0, 0))), ["black"]),
    "one grey": (np.full_like(PHOTOGRAPH, 128), ["blank"]),
    "a soft ramp": (np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 256, 1).repeat(3, 2), ["blank"]),
    "noise": (np.random.default_rng(0).integers(0, 256, PHOTOGRAPH.shape, np.uint8), ["broken"]),
    "the source itself": (PHOTOGRAPH, ["good"]),
    "the source in a good JPEG": (compressed(PHOTOGRAPH, 90), ["good"]),
    "the source blurred": (cv2.GaussianBlur(PHOTOGRAPH, (0, 0), 4.0), []),
    "another photograph": (np.asarray(photograph(41, 256, 256)), []),
}


@pytest.mark.parametrize("what", ACCIDENTS)
def test_accidents_are_told_from_negatives(what):
    image, flags = ACCIDENTS[what]
    assert flags_of(facts_of(image, PHOTOGRAPH), NEGATIVE_FLAGS) == flags


def test_likeness_needs_a_source_and_is_that_of_the_fine_detail():
    assert likeness(None, PHOTOGRAPH) is None and flags_of(facts_of(PHOTOGRAPH), NEGATIVE_FLAGS) == []
    noisy = (PHOTOGRAPH + np.random.default_rng(1).normal(0, 20, PHOTOGRAPH.shape)).clip(0, 255).astype(np.uint8)
    values = [likeness(PHOTOGRAPH, image) for image in (
        PHOTOGRAPH, compressed(PHOTOGRAPH, 90), noisy, compressed(PHOTOGRAPH, 3), PHOTOGRAPH[::-1])]
    assert values == sorted(values, reverse=True)
    assert values[0] == pytest.approx(1, abs=1e-4) and values[-1] == pytest.approx(0, abs=0.1)
    brighter = (PHOTOGRAPH * 0.5 + 60).astype(np.uint8)
    assert likeness(PHOTOGRAPH, brighter) > 0.95 and likeness(PHOTOGRAPH, np.zeros_like(PHOTOGRAPH)) == 0


def test_a_flag_needs_all_its_ranges_and_no_unknown_fact():
    ranges = negatives_of(Corpus(negatives={"model": "m", "flags": {
        "both": {"noise": {"min": 3}, "entropy": {"max": 5}}, "far": {"likeness": {"max": 0.2}}}})).flags
    assert flags_of({"noise": 3.0, "entropy": 5.0, "likeness": None}, ranges) == ["both"]
    assert flags_of({"noise": 2.9, "entropy": 5.0, "likeness": 0.1}, ranges) == ["far"]
    assert flags_of({"noise": 3.0, "entropy": 5.1}, ranges) == []
