"""Windows, weights, and denoising window by window."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sample import sigmas
from sample.guidance import Churn, Restore
from sample.samplers import dpmpp_2m_sde, edm, start
from sample.tiles import Window, cut, shares, tiled, weights, windows

from .golden import difference

LAYOUTS = st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 20)).flatmap(
    lambda sides: st.tuples(*map(st.just, sides), st.integers(1, sides[2])))


def latent(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def looking_around(x: torch.Tensor, sigma: float, layout=None) -> torch.Tensor:
    """A denoiser whose windows disagree: every pixel knows the mean of what is seen with it."""
    return torch.tanh(x / (1 + sigma)) + 0.3 * x.mean((2, 3), keepdim=True) / (1 + sigma)


@given(LAYOUTS)
def test_windows_cover_everything_in_reading_order_and_have_one_size(layout):
    height, width, tile, stride = layout
    found = windows(height, width, tile, stride)
    covered = torch.zeros(height, width)
    for window in found:
        covered[window.slices] += 1
        assert (window.bottom - window.top, window.right - window.left) == (min(tile, height), min(tile, width))
        assert window.top >= 0 and window.bottom <= height and window.left >= 0 and window.right <= width
    assert covered.min() >= 1
    assert found == sorted(set(found)) and found[-1].bottom == height and found[-1].right == width


@given(LAYOUTS, st.booleans())
def test_shares_sum_to_one_everywhere(layout, released):
    height, width, tile, stride = layout
    found, total = windows(height, width, tile, stride), torch.zeros(height, width)
    for window, share in zip(found, shares(found, height, width, released=released), strict=True):
        total[window.slices] += share
    assert difference(total, torch.ones(height, width)) < 1e-5


@given(st.integers(1, 40), st.integers(1, 40))
def test_weights_are_symmetric_unless_as_released(height, width):
    ours, theirs = weights(height, width), weights(height, width, released=True)
    assert difference(ours, ours.flip(0)) < 1e-12 and difference(ours, ours.flip(1)) < 1e-12
    assert difference(theirs, theirs.flip(1)) < 1e-9
    if height > 1:
        assert theirs[height // 2].max() > theirs[height // 2 - 1].max() * 1.0001


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 8), (3, 2)])
def test_a_latent_of_one_window_is_denoised_as_without_tiles(height, width):
    x = latent(2, 4, height, width)
    assert difference(tiled(looking_around, tile=8, stride=4)(x, 2.0), looking_around(x, 2.0)) < 1e-6


@settings(max_examples=20)
@given(LAYOUTS)
def test_a_denoiser_that_sees_single_pixels_does_not_notice_tiles(layout):
    height, width, tile, stride = layout
    x = latent(1, 2, height, width)
    blended = tiled(lambda x, sigma, _: torch.sin(x) * sigma, tile=tile, stride=stride, batch=4)(x, 2.0)
    assert difference(blended, torch.sin(x) * 2.0) < 1e-5


def test_windows_look_up_their_control_and_may_be_evaluated_together():
    x, control, sizes = latent(2, 4, 21, 30), latent(2, 4, 21, 30, seed=1), []

    def denoise(part, sigma, layout):
        sizes.append(len(part))
        assert all(isinstance(window, Window) for window in layout)
        return looking_around(part, sigma) + cut(control, layout) * part.mean((1, 2, 3), keepdim=True)

    single = tiled(denoise, tile=12, stride=7)(x, 1.5)
    assert set(sizes) == {2} and len(sizes) == 12
    sizes.clear()
    assert difference(tiled(denoise, tile=12, stride=7, batch=5)(x, 1.5), single) < 1e-6
    assert sizes == [10, 10, 4]
    for image in range(2):
        alone = tiled(lambda part, sigma, layout, image=image: looking_around(part, sigma) + cut(
            control[image:image + 1], layout) * part.mean((1, 2, 3), keepdim=True), tile=12, stride=7)
        assert difference(alone(x[image:image + 1], 1.5), single[image:image + 1]) < 1e-6


def edm_step(x, noise, centre, last, levels, step):
    """One step in one window, as printed in the papers: the next x, and what was denoised."""
    sigma, following = levels[step:step + 2].tolist()
    raised = sigma * 1.25
    x = x + noise * math.sqrt(raised ** 2 - sigma ** 2)
    denoised = pull(centre)(looking_around(x, raised), sigma, following)
    return x + (following - raised) * (x - denoised) / raised, denoised


def sde_step(x, noise, centre, last, levels, step):
    sigma, following = levels[step:step + 2].tolist()
    denoised = pull(centre)(looking_around(x, sigma), sigma, following)
    if following == 0:
        return denoised, denoised
    h, mean = math.log(sigma / following), denoised
    if last is not None:
        r = math.log(levels[step - 1].item() / sigma) / h
        mean = (1 + 1 / (2 * r)) * denoised - last / (2 * r)
    x = following / sigma * math.exp(-h) * x + (1 - math.exp(-2 * h)) * mean
    return x + following * math.sqrt(1 - math.exp(-2 * h)) * noise, denoised


def pull(centre):
    return Restore(centre, 3.0)


@pytest.mark.parametrize(("one_step", "spacing", "sampler"), [
    (edm_step, sigmas.released, lambda *a, **more: edm(*a, churn=Churn(amount=2), **more)),
    (sde_step, sigmas.karras, dpmpp_2m_sde)], ids=["edm", "sde"])
def test_blending_what_is_denoised_is_blending_what_every_window_steps_to(one_step, spacing, sampler):
    # The released code runs a sampler's step in every window and blends the results.
    levels, layout, centre = spacing(8), windows(14, 18, 8, 5), latent(1, 4, 14, 18, seed=1)
    noises = [latent(1, 4, 14, 18, seed=2 + step) for step in range(8)]
    x = first = start(latent(1, 4, 14, 18), levels)
    blended = sampler(tiled(looking_around, tile=8, stride=5), x, levels, restore=pull(centre),
                      noise=lambda step, like: noises[step])
    last = None
    for step in range(8):
        parts = [[None if part is None else part[window.slices] for part in (x, noises[step], centre, last)]
                 for window in layout]
        x, last = torch.zeros_like(first), torch.zeros_like(first)
        for window, share, part in zip(layout, shares(layout, 14, 18), parts, strict=True):
            following, denoised = one_step(*part, levels, step)
            x[window.slices] += share * following
            last[window.slices] += share * denoised
    assert difference(blended, x) < 1e-5
    untiled = sampler(looking_around, first, levels, restore=pull(centre), noise=lambda step, like: noises[step])
    assert difference(untiled, x) > 1e-2                # the windows do disagree


def test_a_stride_that_leaves_gaps_is_refused():
    for stride in (0, 9):
        with pytest.raises(ValueError, match="leave gaps"):
            windows(20, 20, 8, stride)
