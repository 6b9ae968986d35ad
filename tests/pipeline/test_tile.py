"""Tile: where the samples of an image lie."""

from itertools import combinations, pairwise

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import Tile
from pipeline.tile import TEXTURE_BLOCK, place_tiles, texture

SIZES = st.integers(1, 420)


def textured(height, width, seed=0):
    """(H, W) uint8 noise, coarse enough to count as texture."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1), np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR)


def patchy(height, width, seed):
    """Texture in some 64-pixel blocks, nothing in the others."""
    luma, there = textured(height, width, seed), np.random.default_rng(seed).random((height // 64 + 1, width // 64 + 1))
    flat = there.repeat(64, 0).repeat(64, 1)[:height, :width] < 0.5
    luma[flat] = 128
    return luma


def overlap(a, b):
    return (abs(a["x"] - b["x"]) < a["width"] and abs(a["y"] - b["y"]) < a["height"])


@given(SIZES, SIZES, st.sampled_from([64, 96, 100, 128]), st.integers(1, 6), st.integers(0, 99),
       st.sampled_from([0.0, 0.1, 0.5]))
def test_best_tiles_lie_inside_apart_at_their_own_size_and_are_rich(height, width, size, most, seed, least):
    config = Tile(size=size, max_tiles=most, min_texture=least)
    tiles = place_tiles(patchy(height, width, seed), config)
    assert len(tiles) <= most
    for tile in tiles:
        assert 0 <= tile["x"] <= width - size and 0 <= tile["y"] <= height - size
        assert (tile["width"], tile["height"], tile["out_width"], tile["out_height"]) == (size,) * 4
        assert tile["texture"] >= least
    assert not any(overlap(a, b) for a, b in combinations(tiles, 2))
    assert [t["texture"] for t in tiles] == sorted((t["texture"] for t in tiles), reverse=True)


@given(SIZES, SIZES, st.sampled_from([64, 96, 128]))
def test_a_grid_holds_as_many_tiles_as_fit_and_reaches_every_edge(height, width, size):
    tiles = place_tiles(textured(height, width), Tile(mode="grid", size=size, min_texture=0))
    assert len(tiles) == (height // size) * (width // size)
    assert not any(overlap(a, b) for a, b in combinations(tiles, 2))
    for side, start in ((width, "x"), (height, "y")):
        starts = sorted({tile[start] for tile in tiles})
        if len(starts) > 1:
            assert (starts[0], starts[-1]) == (0, side - size)
            assert max(b - a for a, b in pairwise(starts)) < 2 * size     # no gap holds a tile
        elif starts:
            assert starts == [(side - size) // 2]


@given(SIZES, SIZES, st.sampled_from([64, 96, 100]))
def test_a_whole_picture_keeps_its_aspect_and_is_only_ever_reduced(height, width, size):
    tiles = place_tiles(textured(height, width), Tile(mode="whole", size=size, min_texture=0))
    assert len(tiles) == (min(height, width) >= size)
    for tile in tiles:
        assert (tile["x"], tile["y"], tile["width"], tile["height"]) == (0, 0, width, height)
        assert min(tile["out_width"], tile["out_height"]) == size
        assert tile["out_width"] <= width and tile["out_height"] <= height
        assert abs(max(tile["out_width"], tile["out_height"]) - size * max(width, height) / min(width, height)) <= 0.5


@pytest.mark.parametrize("mode", ["best", "grid", "whole"])
def test_a_picture_without_texture_has_no_tile(mode):
    smooth = np.broadcast_to(np.linspace(0, 255, 512, dtype=np.uint8), (512, 512))      # a gradient is no texture
    assert place_tiles(np.full((512, 512), 200, np.uint8), Tile(mode=mode, size=128)) == []
    assert place_tiles(np.ascontiguousarray(smooth), Tile(mode=mode, size=128)) == []


@pytest.mark.parametrize("mode", ["best", "grid", "whole"])
@pytest.mark.parametrize("shape", [(127, 500), (500, 127), (1, 1)])
def test_a_picture_smaller_than_a_tile_has_none(mode, shape):
    assert place_tiles(textured(*shape), Tile(mode=mode, size=128, min_texture=0)) == []


def test_a_picture_of_exactly_the_size_is_its_own_tile():
    for mode in ("best", "grid", "whole"):
        tile, = place_tiles(textured(128, 128), Tile(mode=mode, size=128))
        assert (tile["x"], tile["y"], tile["width"], tile["out_height"]) == (0, 0, 128, 128)


@pytest.mark.parametrize("side", ["left", "right", "top", "bottom"])
def test_the_best_tile_is_taken_from_the_textured_half(side):
    luma = np.full((512, 512), 90, np.uint8)
    half = {"left": np.s_[:, :256], "right": np.s_[:, 256:], "top": np.s_[:256], "bottom": np.s_[256:]}[side]
    luma[half] = textured(512, 512)[half]
    best = place_tiles(luma, Tile(size=128, max_tiles=4))
    assert len(best) == 4
    for tile in best:
        inside = luma[tile["y"]:tile["y"] + 128, tile["x"]:tile["x"] + 128]
        assert (inside != 90).mean() > 0.9


def test_the_texture_of_a_tile_is_the_share_of_its_blocks_that_are_not_flat():
    luma = np.full((256, 256), 128, np.uint8)
    luma[:, :64] = textured(256, 256)[:, :64]
    tile, = place_tiles(luma, Tile(mode="grid", size=256, min_texture=0))
    assert tile["texture"] == pytest.approx(64 / 256, abs=TEXTURE_BLOCK / 256)
    assert place_tiles(luma, Tile(mode="grid", size=256, min_texture=0.5)) == []


def test_noise_of_one_grey_level_is_no_texture():
    noisy = (128.5 + np.random.default_rng(0).normal(0, 1, (512, 512))).clip(0, 255).astype(np.uint8)
    assert not texture(noisy).any()
    assert texture(textured(512, 512)).all()


def test_photographs_have_tiles_and_vector_drawings_few(shared):
    import PIL.Image
    PIL.Image.MAX_IMAGE_PIXELS, limit = None, PIL.Image.MAX_IMAGE_PIXELS
    try:
        def count(folder):
            found = []
            for path in sorted((shared / "corpus" / folder).iterdir())[:4]:
                luma = np.asarray(PIL.Image.open(path).convert("L"))
                found.append(len(place_tiles(luma, Tile(size=1024, max_tiles=4))))
            return found
        assert min(count("photos")) >= 1 and sum(count("art")) < sum(count("photos")) / 2
    finally:
        PIL.Image.MAX_IMAGE_PIXELS = limit
