"""JPEG in torch is libjpeg-turbo's, to the byte nearly everywhere."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from degrade.canvas import Canvas
from degrade.jpeg import Jpeg
from degrade.libjpeg import tables

from ..conftest import photograph

LAYOUTS = ["4:4:4", "4:4:0", "4:2:2", "4:2:0"]


def through_torch(images, steps):
    """Images (H, W, C) uint8 of any sizes in one batch."""
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    pixels = torch.full((len(images), images[0].shape[2], height, width), float("nan"))
    for place, image in zip(pixels, images, strict=True):
        place[:, :image.shape[0], :image.shape[1]] = torch.from_numpy(image).permute(2, 0, 1)
    out = Jpeg.batch(Canvas(pixels, *zip(*(image.shape[:2] for image in images), strict=True)), steps).pixels
    return [one[:, :image.shape[0], :image.shape[1]].permute(1, 2, 0).numpy()
            for one, image in zip(out, images, strict=True)]


def through_libjpeg(image, step):
    return np.atleast_3d(Jpeg.cpu(np.ascontiguousarray(image.squeeze(2) if image.shape[2] == 1 else image), step))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), channels=st.sampled_from([1, 3]), count=st.integers(1, 4))
def test_a_batch_of_any_sizes_qualities_and_layouts_equals_libjpeg(seed, channels, count):
    random = np.random.default_rng(seed)
    images = [random.integers(0, 256, (*random.integers(1, 50, 2), channels), np.uint8) for _ in range(count)]
    steps = [{"quality": int(random.integers(1, 101)), "subsampling": LAYOUTS[random.integers(4)]} for _ in images]
    for image, step, got in zip(images, steps, through_torch(images, steps), strict=True):
        wrong = np.abs(got - through_libjpeg(image, step))
        assert wrong.max() <= 2 or wrong.mean() < 0.05      # a coefficient at a tie of float32 moves its block
        assert np.array_equal(got, got.round())


@pytest.mark.parametrize("quality", [1, 10, 30, 49, 50, 75, 95, 100])
def test_the_tables_are_those_that_libjpeg_writes(quality):
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG", quality=quality)
    written = Image.open(file).quantization
    assert [written[0], written[1]] == [table.ravel().tolist() for table in tables(quality)]


def test_layouts_differ_and_the_coarser_the_chroma_the_further_from_the_original():
    image = np.array(photograph(0, 96, 96))
    error = {layout: np.abs(through_libjpeg(image, {"quality": 95, "subsampling": layout}).astype(float) - image).mean()
             for layout in LAYOUTS}
    assert error["4:4:4"] < error["4:2:2"] < error["4:2:0"]
