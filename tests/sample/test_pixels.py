"""Sizes in, sizes out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sample.pixels import MOST, Plan, finish, plan, plan_page, plan_released, prepare, resized

UPSCALES = st.sampled_from([0.3, 1.0, 1.5, 2.0, 3.7])


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth enough to survive resampling."""
    coarse = np.random.default_rng(seed).integers(0, 256, (max(height // 8, 1), max(width // 8, 1), 3), dtype=np.uint8)
    return resized(coarse, (height, width), "bicubic").copy()


def comes_back(sizes: Plan) -> None:
    """A picture goes in and out, within the promises."""
    pixels = prepare(picture(*sizes.source), sizes)
    assert pixels.shape == (1, 3, *sizes.working) and pixels.dtype == torch.float32
    assert pixels.min() >= -1 and pixels.max() <= 1
    result = finish(pixels, sizes)
    assert result.shape == (*sizes.promised, 3) and result.dtype == np.uint8


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), UPSCALES)
def test_the_result_has_exactly_the_promised_size(height, width, upscale):
    sizes = plan((height, width), upscale, short=128, most=2 ** 17)
    assert sizes.promised == (max(round(height * upscale), 1), max(round(width * upscale), 1))
    assert all(side % 64 == 0 for side in sizes.working)
    comes_back(sizes)


@settings(deadline=None)
@given(st.integers(30, 300), st.integers(30, 300), UPSCALES)
def test_released_ways_keep_their_promises(height, width, upscale):
    script, page = (rule((height, width), upscale, short=128) for rule in (plan_released, plan_page))
    assert script.promised == (round(height * upscale), round(width * upscale))
    assert page.promised == page.working
    assert all(side % 64 == 0 for side in script.working) and all(side % 32 == 0 for side in page.working)
    comes_back(script)
    comes_back(page)


@pytest.mark.parametrize(("height", "width"), [(3, 5000), (5000, 3), (1, 1), (7, 700)])
def test_long_strips_keep_their_size_and_a_bounded_memory(height, width):
    sizes = plan((height, width), 1.0, most=2 ** 18)
    assert sizes.content[0] * sizes.content[1] <= 2 ** 18 * 1.1
    assert finish(prepare(picture(height, width), sizes), sizes).shape == (height, width, 3)
    at_full = plan((height, width))
    assert at_full.content[0] * at_full.content[1] <= MOST * 1.1 and at_full.promised == (height, width)


@given(st.integers(1024, 5000), st.integers(1024, 5000))
def test_a_picture_that_is_large_enough_is_not_resampled(height, width):
    sizes = plan((height, width))
    assert sizes.source == sizes.content == sizes.promised
    assert all(0 <= full - side < 64 for full, side in zip(sizes.working, sizes.content, strict=True))


@given(st.integers(100, 900), st.integers(100, 900), st.sampled_from([1.0, 2.0]))
def test_a_smaller_one_is_enlarged_to_the_short_side_with_its_aspect_ratio(height, width, upscale):
    sizes = plan((height, width), upscale)
    assert min(sizes.content) == max(1024, round(min(height, width) * upscale))
    assert abs(sizes.content[0] * width - sizes.content[1] * height) <= max(height, width)      # within rounding


def test_pixels_that_are_not_resampled_come_back_exactly_and_the_rest_is_their_reflection():
    image = np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8)
    sizes = plan((70, 100), short=64)
    pixels = prepare(image, sizes)
    assert pixels.shape == (1, 3, 128, 128)
    assert torch.equal(pixels[:, :, 70:], pixels[:, :, :70].flip(2)[:, :, :58])
    assert torch.equal(pixels[..., 100:], pixels[..., :100].flip(3)[..., :28])
    assert np.array_equal(finish(pixels, sizes), image)


def test_ours_loses_less_than_stretching():
    # What only the ways in and out do to a photograph of a usual shape, in grey levels.
    image = picture(131, 197)
    lost = {}
    for name, rule in {"ours": plan, "script": plan_released}.items():
        sizes = rule((131, 197), short=128)
        lost[name] = np.abs(finish(prepare(image, sizes), sizes).astype(int) - image).mean()
    assert lost["ours"] == 0 and lost["script"] > 0.4


def test_results_are_rounded_and_as_released_cut():
    sizes, released = plan((64, 64), short=64), plan_released((64, 64), short=64)
    pixels = torch.full((1, 3, 64, 64), 100.7 / 127.5 - 1)
    assert (finish(pixels, sizes) == 101).all() and (finish(pixels, released) == 100).all()
    assert (finish(pixels * 0 + 1.3, sizes) == 255).all() and (finish(pixels * 0 - 1.3, released) == 0).all()


def test_other_pictures_than_planned_are_refused():
    sizes = plan((20, 30))
    with pytest.raises(ValueError, match=r"must be uint8 \(20, 30, 3\), not uint8 \(30, 20, 3\)"):
        prepare(np.zeros((30, 20, 3), np.uint8), sizes)
    with pytest.raises(ValueError, match="must be uint8"):
        prepare(np.zeros((20, 30, 3), np.float32), sizes)
    with pytest.raises(ValueError, match="expected pixels of shape"):
        finish(torch.zeros(1, 3, 64, 64), sizes)
    for rule in (plan, plan_released, plan_page):
        with pytest.raises(ValueError, match="5 x 0 pixels"):
            rule((0, 5))
