"""Colours of one image for the details of another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from sample.colour import match

from .golden import difference
from .watched import Largest


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(0.4).clamp(-1, 1)


def low_by_convolutions(image: torch.Tensor) -> torch.Tensor:
    """Five dilated 3 x 3 kernels, as the method is usually written."""
    kernel = torch.tensor([[1., 2, 1], [2, 4, 2], [1, 2, 1]]).expand(3, 1, 3, 3) / 16
    for radius in (1, 2, 4, 8, 16):
        padded = functional.pad(image, (radius,) * 4, mode="replicate")
        image = functional.conv2d(padded, kernel, groups=3, dilation=radius)
    return image


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(1, 50), st.integers(1, 50))
def test_wavelet_is_the_high_band_of_one_and_the_low_band_of_the_other(batch, height, width):
    content, reference = images(batch, 3, height, width), images(batch, 3, height, width, seed=1) + 0.2
    expected = content - low_by_convolutions(content) + low_by_convolutions(reference)
    assert difference(match(content, reference), expected) < 1e-5


def test_adain_gives_mean_and_deviation_of_the_reference_per_image_and_channel():
    content, reference = images(2, 3, 20, 30), images(2, 3, 20, 30, seed=1) * 0.5 + 0.3
    matched = match(content, reference, "adain")
    assert difference(matched.mean((2, 3)), reference.mean((2, 3))) < 1e-5
    assert difference(matched.std((2, 3)), reference.std((2, 3))) < 1e-4
    assert difference(matched[1:], match(content[1:], reference[1:], "adain")) == 0


def test_none_is_the_identity():
    content = images(1, 3, 8, 8)
    assert difference(match(content, content + 1, "none"), content) == 0


@pytest.mark.parametrize("method", ["wavelet", "adain"])
def test_an_image_with_its_own_colours_stays_as_it_is(method):
    content = images(1, 3, 33, 17)
    assert difference(match(content, content, method), content) < 1e-6
    assert difference(match(content, content + 0.25, method), content + 0.25) < 1e-5


@pytest.mark.parametrize("method", ["wavelet", "adain"])
def test_memory_beside_the_result_is_of_single_planes(method):
    content, reference = images(4, 3, 200, 300), images(4, 3, 200, 300, seed=1)
    with Largest() as seen:
        match(content, reference, method)
    assert seen.numbers <= 232 * 300 or seen.numbers <= 200 * 332


def test_two_sizes_and_an_unknown_method_are_refused():
    content = images(1, 3, 8, 8)
    with pytest.raises(ValueError, match="of one size"):
        match(content, images(1, 3, 8, 9))
    with pytest.raises(ValueError, match="wavelet, adain or none, not 'wavelets'"):
        match(content, content, "wavelets")
