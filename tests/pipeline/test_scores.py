"""Facts about pictures: each answers to what it claims to measure, whatever the size, format or position."""

import hashlib
from io import BytesIO

import cv2
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from pipeline import scores
from pipeline.decode import ImageRefused, Limits, decode
from pipeline.perceptual import hamming, perceptual_hash
from pipeline.scores import FACTS, SCORES_VERSION, score


@pytest.fixture(scope="session")
def photographs(shared) -> list[np.ndarray]:
    """Real photographs of about 480x320, taken down from larger ones: sharp at every pixel."""
    files = sorted((shared / "bsds/test").glob("*.jpg"))[:24]
    return [decode(path.read_bytes()) for path in files]


def encoded(pixels: np.ndarray, format: str = "PNG", **options) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def natural(height: int = 384, width: int = 512, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8 with the 1/f amplitude spectrum of photographs, down to single pixels."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    planes = [np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) / frequency) for _ in range(3)]
    mixed = np.stack([planes[0], planes[0] + 0.3 * planes[1], planes[0] + 0.3 * planes[2]], -1)
    return np.clip(128 + 45 * mixed / mixed.std(), 0, 255).astype(np.uint8)


def enlarged(pixels: np.ndarray, factor: float, interpolation: int) -> np.ndarray:
    return cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=interpolation)


def facts(pixels: np.ndarray, format: str = "PNG", **options) -> dict:
    return score(encoded(pixels, format, **options))


# The table


def test_every_fact_has_a_value_of_its_type_in_order():
    values = facts(natural(), "JPEG", quality=90)
    assert list(values) == [fact.name for fact in FACTS]
    for fact in FACTS:
        assert pa.array([values[fact.name]], fact.type).null_count == 0, fact.name


def test_facts_are_named_once_and_described_in_a_sentence():
    assert len(SCORES_VERSION) == 16
    assert len({fact.name for fact in FACTS}) == len(FACTS)
    assert all(fact.description.endswith(".") for fact in FACTS)


@settings(max_examples=60, deadline=None)
@example(np.zeros((4, 1, 3), np.uint8))  # OpenCV takes four rows of one for a scalar
@given(st.tuples(st.integers(1, 80), st.integers(1, 80)).flatmap(lambda s: arrays(np.uint8, (*s, 3))))
def test_small_pictures_of_any_content_have_facts_or_nulls(pixels):
    values = facts(pixels)
    for fact in FACTS:
        value = values[fact.name]
        assert value is None or not isinstance(value, float) or np.isfinite(value), fact.name
        assert pa.array([value], fact.type).type == fact.type


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700))
def test_windows_lie_on_the_jpeg_grid_and_reach_every_edge(height, width):
    rows, columns = np.mgrid[:height, :width]
    corners = (rows % 8 == 0) & (columns % 8 == 0)
    edge = (rows >= height - 8) | (columns >= width - 8)
    marks = (corners * 200 + (edge & ~corners) * 50).astype(np.uint8)
    seen = scores.full_resolution_windows(marks[..., None].repeat(3, 2))
    assert 1 <= len(seen) <= 9
    for window in seen:
        assert window.shape == (min(height, scores.WINDOW), min(width, scores.WINDOW))
        assert (window[::8, ::8] == 200).all()
    assert len(seen) == 1 or any((window == 50).any() for window in seen)


def test_a_refused_file_has_no_facts():
    with pytest.raises(ImageRefused):
        score(encoded(natural())[:-2000])
    with pytest.raises(ImageRefused):
        score(encoded(natural()), Limits(max_pixels=100))


def test_the_same_bytes_have_the_same_facts():
    data = encoded(natural(), "JPEG")
    assert score(data) == score(bytes(bytearray(data)))


def test_uid_is_the_hash_of_the_bytes():
    data = encoded(natural(8, 8))
    assert score(data)["uid"] == hashlib.sha256(data).hexdigest()[:32]


def test_width_and_height_are_those_of_the_upright_picture():
    data = Image.Exif()
    data[0x0112] = 6
    values = facts(natural(120, 200), "JPEG", exif=data.tobytes())
    assert (values["width"], values["height"]) == (120, 200)


# Single facts


@pytest.mark.parametrize("quality", [1, 10, 30, 50, 75, 85, 92, 95, 100])
def test_jpeg_quality_is_the_one_that_was_saved(quality):
    assert facts(natural(64, 64), "JPEG", quality=quality)["jpeg_quality"] == quality
    assert facts(natural(64, 64), "PNG")["jpeg_quality"] is None


def test_sharpness_falls_with_blur_and_not_with_size():
    sharp = natural(1200, 1600)
    values = [facts(cv2.GaussianBlur(sharp, (0, 0), sigma))["sharpness"] for sigma in (0.5, 1, 2, 4)]
    assert values == sorted(values, reverse=True) and values[0] > 4 * values[-1]
    assert facts(sharp)["sharpness"] == pytest.approx(facts(sharp[:400, :500])["sharpness"], rel=0.15)


def test_a_blurred_background_does_not_hide_a_sharp_subject():
    picture = cv2.GaussianBlur(natural(900, 900), (0, 0), 6)
    picture[300:600, 300:600] = natural(300, 300)
    assert facts(picture)["sharpness"] > 5 * facts(cv2.GaussianBlur(natural(900, 900), (0, 0), 6))["sharpness"]


def test_flat_share_is_the_share_without_texture():
    picture = natural(576, 576)
    assert facts(picture)["flat_share"] < 0.05
    picture[:, :288] = 120
    assert facts(picture)["flat_share"] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("sigma", [2.0, 5.0, 15.0])
def test_noise_is_measured_where_the_picture_is_flat(sigma):
    rng = np.random.default_rng(1)
    clean = np.full((400, 600, 3), 120.0)
    clean[:, 300:] = natural(400, 300)
    noisy = np.clip(clean + rng.normal(0, sigma, (400, 600, 1)), 0, 255).astype(np.uint8)
    assert facts(noisy)["noise"] == pytest.approx(sigma, rel=0.15)
    assert facts(np.full((64, 64, 3), 255, np.uint8))["noise"] is None


def test_blockiness_rises_as_jpeg_quality_falls():
    values = [facts(natural(), "JPEG", quality=quality)["blockiness"] for quality in (95, 50, 20, 5)]
    assert values == sorted(values) and values[-1] > 1.5
    assert facts(natural())["blockiness"] == pytest.approx(1, abs=0.03)


def test_entropy_counts_bits():
    assert facts(np.full((64, 64, 3), 90, np.uint8))["entropy"] == 0
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    assert facts(ramp)["entropy"] == pytest.approx(8)


def test_clipping_is_the_share_at_the_ends():
    picture = np.full((100, 200, 3), 128, np.uint8)
    picture[:, :50], picture[:, 180:] = 0, 255
    values = facts(picture)
    assert values["clipped_dark"] == pytest.approx(0.25) and values["clipped_bright"] == pytest.approx(0.1)


def test_colourfulness_follows_its_formula():
    pixels = natural(200, 200)
    few = pixels[::2, ::2].astype(float)
    red_green, yellow_blue = few[..., 0] - few[..., 1], few[..., :2].mean(-1) - few[..., 2]
    expected = np.hypot(red_green.std(), yellow_blue.std()) + 0.3 * np.hypot(red_green.mean(), yellow_blue.mean())
    assert facts(pixels)["colourfulness"] == pytest.approx(expected, rel=1e-4)


def test_grey_pictures_are_known_whatever_their_mode():
    grey = natural()[..., :1].repeat(3, 2)
    assert facts(grey, "JPEG", quality=60)["grey"] is True
    assert facts(grey[..., 0])["grey"] is True and facts(grey)["colourfulness"] == 0
    assert facts(natural())["grey"] is False


@pytest.mark.parametrize(("rows", "columns", "share"), [(0, 0, 0.0), (48, 0, 0.25), (0, 64, 0.25), (48, 64, 0.4375)])
def test_border_is_the_share_of_the_bars(rows, columns, share):
    picture = natural(384, 512)
    picture[:rows], picture[384 - rows :] = 0, 0
    picture[:, :columns], picture[:, 512 - columns :] = 0, 0
    assert facts(picture, "JPEG", quality=85)["border"] == pytest.approx(share, abs=0.02)


def test_a_picture_of_one_colour_is_all_border_and_has_no_hash():
    values = facts(np.full((100, 100, 3), 77, np.uint8))
    assert values["border"] == 1 and values["phash"] is None and values["upscale"] is None


# Enlargement


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("interpolation", [cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4])
def test_an_enlarged_picture_shows_its_factor(factor, interpolation):
    assert facts(natural())["upscale"] == 1.0
    value = facts(enlarged(natural(), factor, interpolation), "JPEG", quality=90)["upscale"]
    assert factor * 0.6 < value < factor * 1.4  # cubic filters leak a mirror image past the limit


def test_enlarged_photographs_are_told_from_native_ones(photographs):
    native = [facts(photograph, "JPEG", quality=85)["upscale"] for photograph in photographs]
    assert max(native) < 1.5
    for factor, least in ((2, 0.9), (3, 0.95)):
        found = [
            facts(enlarged(photograph, factor, interpolation), "JPEG", quality=quality)["upscale"]
            for photograph, interpolation, quality in zip(
                photographs, [cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4] * 8, [95, 90] * 12, strict=True
            )
        ]
        assert np.mean(np.array(found) > 1.5) >= least
        assert np.median(found) == pytest.approx(factor, rel=0.2)


def test_native_photographs_are_seldom_flagged(shared):
    files = [*(shared / "corpus/photos").glob("*.jpg"), *(shared / "corpus/camera").glob("*.jpg")]
    values = np.array([score(path.read_bytes())["upscale"] for path in files])
    assert len(values) > 25
    assert (values > 2).sum() == 0 and (values > 1.6).mean() < 0.15


# Hashes


def test_a_smaller_and_compressed_copy_keeps_its_hash(photographs):
    for photograph in photographs:
        luma = cv2.cvtColor(photograph, cv2.COLOR_RGB2GRAY)
        half = cv2.resize(luma, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        copy = cv2.imdecode(cv2.imencode(".jpg", half, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_GRAYSCALE)
        assert hamming(perceptual_hash(luma)[0], perceptual_hash(copy)[0]) <= 4


def test_different_photographs_have_distant_hashes(photographs):
    hashes = [perceptual_hash(cv2.cvtColor(photograph, cv2.COLOR_RGB2GRAY))[0] for photograph in photographs]
    assert min(hamming(a, b) for at, a in enumerate(hashes) for b in hashes[:at]) > 10


@pytest.mark.parametrize("size", [(384, 512), (37, 53), (1000, 31)])
def test_the_mirrored_hash_is_the_hash_of_the_mirrored_picture(size):
    luma = natural(*size)[..., 0].copy()
    own, mirrored = perceptual_hash(luma)
    flipped = perceptual_hash(np.ascontiguousarray(luma[:, ::-1]))
    assert hamming(mirrored, flipped[0]) <= 2 and hamming(own, flipped[1]) <= 2
    assert hamming(own, mirrored) > 8


def test_the_hash_ignores_brightness_and_contrast():
    luma = natural()[..., 0]
    other = (luma.astype(float) * 0.6 + 70).astype(np.uint8)
    assert hamming(perceptual_hash(luma)[0], perceptual_hash(other)[0]) <= 2


def test_the_facts_hold_the_hash_of_the_upright_picture_as_unsigned_64_bit():
    turned = Image.Exif()
    turned[0x0112] = 3
    upright, stored = facts(natural(), "PNG"), facts(natural()[::-1, ::-1], "PNG", exif=turned.tobytes())
    assert hamming(upright["phash"], stored["phash"]) <= 2
    assert 0 <= upright["phash"] < 2**64 and 0 <= upright["phash_mirror"] < 2**64
