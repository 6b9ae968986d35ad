"""Bytes to pixels: every format and mode lands in the same place, and damage is refused."""

import pickle
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageCms, ImageFile

from pipeline.decode import FORMATS, ImageRefused, Limits, decode, decode_fast, read_header

PILLOW_NAMES = {"jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "tiff": "TIFF", "avif": "AVIF", "gif": "GIF",
                "bmp": "BMP", "jpeg2000": "JPEG2000", "ppm": "PPM"}  # fmt: skip


def scene(height: int = 96, width: int = 128) -> np.ndarray:
    """(H, W, 3) uint8 with smooth areas, edges and some noise; no two corners alike."""
    rng = np.random.default_rng(5)
    blocks = np.kron(rng.integers(0, 230, (-(-height // 16), -(-width // 16), 3)), np.ones((16, 16, 1)))
    return (blocks[:height, :width] + rng.uniform(0, 25, (height, width, 1))).astype(np.uint8)


def encoded(pixels, format: str = "PNG", mode: str | None = None, **options) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels, mode)
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def refusal(data: bytes, limits: Limits | None = None) -> ImageRefused:
    with pytest.raises(ImageRefused) as caught:
        decode(data, limits)
    return caught.value


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What a camera with this EXIF orientation stores of an upright picture."""
    transposes = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
                  7: "TRANSVERSE", 8: "ROTATE_270"}  # fmt: skip
    method = transposes.get(orientation)
    return np.asarray(Image.fromarray(pixels).transpose(Image.Transpose[method])) if method else pixels


def exif(orientation) -> bytes:
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


# Formats and modes

small_pictures = st.tuples(st.integers(1, 20), st.integers(1, 20)).flatmap(lambda s: arrays(np.uint8, (*s, 3)))


@settings(max_examples=40, deadline=None)
@given(small_pictures, st.sampled_from(["PNG", "BMP", "PPM", "TIFF"]))
def test_lossless_files_decode_to_the_pixels_that_were_saved(pixels, format):
    decoded = decode(encoded(pixels, format))
    assert np.array_equal(decoded, pixels)
    assert decoded.dtype == np.uint8 and decoded.flags.c_contiguous


@settings(max_examples=40, deadline=None)
@given(small_pictures, st.integers(1, 8), st.sampled_from(["PNG", "TIFF", "WEBP"]))
def test_every_orientation_comes_out_upright(pixels, orientation, format):
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    data = encoded(turned(pixels, orientation), format, exif=exif(orientation), **options)
    header = read_header(data)
    assert (header.height, header.width) == pixels.shape[:2]
    assert header.orientation == orientation
    assert np.array_equal(decode(data), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "AVIF"])
def test_lossy_photographs_come_out_upright(orientation, format):
    upright = scene()
    data = encoded(turned(upright, orientation), format, quality=95, exif=exif(orientation))
    assert np.abs(decode(data).astype(int) - upright).mean() < 6


def test_the_eight_orientations_of_one_photograph_are_one_picture(shared):
    files = sorted((shared / "corpus/odd/orientation").glob("*_[1-8].jpg"))
    pictures = [decode(path.read_bytes()).astype(int) for path in files]
    assert len(pictures) == 8
    for picture in pictures[1:]:
        assert picture.shape == pictures[0].shape
        assert np.abs(picture - pictures[0]).mean() < 5  # each was compressed on its own


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_recognised_by_its_bytes(format):
    data = encoded(scene(), PILLOW_NAMES[format])
    assert read_header(data).format == format
    assert np.abs(decode(data).astype(int) - scene()).mean() < 25  # GIF has 256 colours


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_pixels_are_those_of_pillow(mode, progressive):
    data = encoded(Image.fromarray(scene()).convert(mode), "JPEG", quality=85, progressive=progressive)
    pillow = np.asarray(Image.open(BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode(data) - pillow).max() <= 1


def test_cmyk_jpeg_follows_the_convention_of_adobe():
    data = encoded(Image.fromarray(scene()).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(decode(data).astype(int) - scene()).mean() < 8


def test_grey_and_one_bit_pictures_get_three_equal_channels():
    grey = scene()[..., 0]
    assert np.array_equal(decode(encoded(grey)), np.repeat(grey[..., None], 3, 2))
    bits = Image.fromarray(grey).convert("1")
    assert set(np.unique(decode(encoded(bits)))) == {0, 255}


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (128, 0), (129, 1), (32768, 128), (65535, 255)])
@pytest.mark.parametrize(("format", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B")])
def test_sixteen_bit_grey_is_scaled_and_rounded(value, expected, format, mode):
    image = Image.new(mode, (4, 4), value)
    assert (decode(encoded(image, format)) == expected).all()


def test_sixteen_bit_colour_keeps_its_high_bits():
    rows = b"".join(b"\0" + struct.pack(">6H", 0, 0x8000, 0xFFFF, 0x1234, 0x5678, 0x9ABC) for _ in range(2))
    header = struct.pack(">2I5B", 2, 2, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    assert decode(data)[0].tolist() == [[0, 0x80, 0xFF], [0x12, 0x56, 0x9A]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize(("alpha", "expected"), [(0, 255), (255, 100), (128, 177)])
def test_transparent_parts_show_white(mode, alpha, expected):
    image = Image.new("RGBA", (5, 4), (100, 100, 100, alpha)).convert(mode)
    assert np.abs(decode(encoded(image)).astype(int) - expected).max() <= 1
    assert read_header(encoded(image)).has_alpha


def test_a_transparent_palette_colour_shows_white():
    image = Image.new("P", (4, 2), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((0, 0), 1)
    for format in ("PNG", "GIF"):
        decoded = decode(encoded(image, format, transparency=0))
        assert decoded[0, 0].tolist() == [200, 100, 50]
        assert decoded[1, 1].tolist() == [255, 255, 255]


def test_a_transparent_colour_of_rgb_and_deep_grey_shows_white():
    rgb = Image.fromarray(np.array([[[1, 2, 3], [9, 9, 9]]], np.uint8))
    assert decode(encoded(rgb, transparency=(1, 2, 3)))[0].tolist() == [[255] * 3, [9] * 3]
    deep = Image.fromarray(np.array([[1000, 65535 // 2]], np.uint16))
    assert decode(encoded(deep, transparency=1000))[0, :, 0].tolist() == [255, 127]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pictures_without_a_defined_white_are_refused(mode):
    assert refusal(encoded(Image.new(mode, (4, 4), 7), "TIFF")).reason == "unsupported_mode"


# Colour profiles


def swapped_profile() -> bytes:
    """The sRGB profile with the red and blue primaries exchanged: a wide change that no one can overlook."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"tmpX", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"tmpX", b"bXYZ", 1)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_a_colour_profile_is_converted_to_srgb(format):
    image = Image.new("RGB", (16, 16), (200, 40, 40))
    options = {"lossless": True} if format == "WEBP" else {}
    plain = decode(encoded(image, format, **options)).astype(int)
    converted = decode(encoded(image, format, icc_profile=swapped_profile(), **options)).astype(int)
    assert np.abs(converted - plain[..., ::-1]).max() <= 3
    assert np.abs(converted - plain).max() > 100


def test_an_srgb_profile_changes_nothing():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(decode(encoded(scene(), icc_profile=profile)), scene())
    assert read_header(encoded(scene(), icc_profile=profile)).has_icc


@pytest.mark.parametrize("profile", [b"not a profile", swapped_profile()[:200], b"\0" * 600])
def test_a_broken_profile_counts_as_srgb(profile):
    assert np.array_equal(decode(encoded(scene(), icc_profile=profile)), scene())


def test_a_profile_of_another_colour_model_counts_as_srgb():
    grey = scene()[..., 0]
    assert np.array_equal(decode(encoded(grey, icc_profile=swapped_profile()))[..., 0], grey)


# Refusals


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not_an_image"),
        (b'{"error": "gone"}', "not_an_image"),
        (b"Access denied\n", "not_an_image"),
        (b"\0" * 4096, "not_an_image"),
        (bytes(range(128, 255)), "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "unsupported_format"),
        (b"8BPS\0\1", "unsupported_format"),
        (b"\0\0\0\x20ftypheic\0\0\0\0", "unsupported_format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported_format"),
        (b"\x89PNG\r\n\x1a\n", "corrupt"),
        (b"\xff\xd8\xff\xe0", "corrupt"),
        (b"GIF89a" + b"\0" * 7, "corrupt"),
    ],
)
def test_what_is_no_picture_is_refused_with_its_reason(data, reason):
    assert refusal(data).reason == reason


def test_a_refusal_says_what_the_file_looks_like():
    assert "HTML page" in str(refusal(b"<html><head><title>429 Too Many Requests</title>"))


def test_a_decompression_bomb_is_refused_from_its_header():
    error = refusal(claiming(50_000, 50_000))
    assert error.reason == "too_many_pixels" and "50000x50000" in str(error)


def test_a_picture_without_pixels_is_refused():
    assert refusal(claiming(0, 5)).reason == "zero_size"


def claiming(width: int, height: int) -> bytes:
    """A small PNG whose header claims this size."""
    data = bytearray(encoded(Image.new("1", (8, 8))))
    data[16:24] = struct.pack(">2I", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def test_the_limits_are_those_of_the_caller_and_not_of_pillow(monkeypatch):
    data = encoded(scene())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert np.array_equal(decode(data), scene())
    assert refusal(data, Limits(max_pixels=scene()[..., 0].size - 1)).reason == "too_many_pixels"
    assert refusal(data, Limits(max_bytes=len(data) - 1)).reason == "too_many_bytes"
    assert Image.MAX_IMAGE_PIXELS == 10


def test_another_library_cannot_let_damaged_files_pass(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES"):
        decode(encoded(scene()))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_picture_or_is_refused(format):
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    first, *others = [Image.new("RGB", (16, 16), colour) for colour in colours]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(first, format, save_all=True, append_images=others, **options)
    assert read_header(data).frames == 3
    assert np.abs(decode(data).astype(int) - [200, 0, 0]).max() <= 2
    assert refusal(data, Limits(animated="refuse")).reason == "animated"


def test_a_camera_raw_file_does_not_pass_as_its_thumbnail():
    preview = encoded(scene(), "TIFF", tiffinfo={254: 1})
    assert refusal(preview).reason == "unsupported_format"


VARIANTS = {
    "jpeg": lambda: encoded(scene(), "JPEG", quality=90),
    "jpeg progressive": lambda: encoded(scene(), "JPEG", progressive=True),
    "jpeg cmyk": lambda: encoded(Image.fromarray(scene()).convert("CMYK"), "JPEG"),
    "png": lambda: encoded(scene()),
    "webp": lambda: encoded(scene(), "WEBP"),
    "tiff": lambda: encoded(scene(), "TIFF"),
    "tiff lzw": lambda: encoded(scene(), "TIFF", compression="tiff_lzw"),
    "tiff jpeg": lambda: encoded(scene(), "TIFF", compression="jpeg"),
    "avif": lambda: encoded(scene(), "AVIF"),
    "gif": lambda: encoded(scene(), "GIF"),
    "bmp": lambda: encoded(scene(), "BMP"),
    "jpeg2000": lambda: encoded(scene(), "JPEG2000"),
    "ppm": lambda: encoded(scene(), "PPM"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cut_file_is_refused_or_had_lost_no_pixel(variant):
    data = VARIANTS[variant]()
    whole = decode(data)
    refused = 0
    for cut in {*np.linspace(1, len(data) - 1, 40).astype(int).tolist(), len(data) - 2, len(data) - 5, len(data) - 13}:
        try:
            assert np.array_equal(decode(data[:cut]), whole), f"half-read after {cut} of {len(data)} bytes"
        except ImageRefused:
            refused += 1
    assert refused > 30


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(VARIANTS)), st.data())
def test_damaged_bytes_never_raise_anything_but_a_refusal(variant, draw):
    data = bytearray(VARIANTS[variant]())
    for _ in range(draw.draw(st.integers(1, 6))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        assert decode(bytes(data), Limits(max_pixels=10**6)).ndim == 3
    except ImageRefused as error:
        assert error.reason and str(error).startswith(error.reason)


def test_padding_before_a_jpeg_marker_is_harmless():
    data = encoded(scene(), "JPEG")
    assert np.array_equal(decode(data[:-2] + b"\0" * 40 + data[-2:]), decode(data))
    tables = data.find(b"\xff\xdb")
    assert np.array_equal(decode(data[:tables] + b"\1\2\3" + data[tables:]), decode(data))


def test_entropy_data_that_lost_its_place_is_not_taken_for_padding():
    data = encoded(scene(), "JPEG")
    rest = bytes(value for value in scene().tobytes()[:400] if value != 255)
    assert refusal(data[:-2] + rest + data[-2:]).reason == "corrupt"


def test_nonsense_in_exif_is_ignored():
    for orientation in (0, 9, 65535):
        assert np.array_equal(decode(encoded(scene(), exif=exif(orientation))), scene())
    assert np.array_equal(decode(encoded(scene(), exif=b"Exif\0\0garbage that is no TIFF header")), scene())


def test_a_refusal_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(refusal(b"")))
    assert error.reason == "empty" and str(error) == str(refusal(b""))


def test_nothing_is_printed_about_a_damaged_tiff():
    program = (
        "import sys\n"
        "from pipeline.decode import ImageRefused, decode\n"
        "try: decode(sys.stdin.buffer.read())\n"
        "except ImageRefused as error: print(error.reason)\n"
    )
    bits = Image.fromarray(scene()).convert("1")
    data = bytearray(encoded(bits, "TIFF", compression="group4"))
    data[60:120] = bytes(60)
    done = subprocess.run([sys.executable, "-c", program], input=bytes(data), capture_output=True,
                          cwd=Path(__file__).parents[2], timeout=60)  # fmt: skip
    assert done.stdout.strip() == b"corrupt"
    assert done.stderr == b""


def test_every_odd_file_decodes_or_is_refused(shared):
    decoded, reasons = 0, set()
    for path in sorted((shared / "corpus/odd").rglob("*.*")):
        data = path.read_bytes()
        try:
            picture = decode(data)
        except ImageRefused as error:
            reasons.add(error.reason)
            continue
        header = read_header(data)
        assert picture.shape == (header.height, header.width, 3) and picture.dtype == np.uint8
        decoded += 1
    assert decoded > 100
    assert {"not_an_image", "unsupported_format", "corrupt", "unsupported_mode"} <= reasons


# The fast way, for scoring


@pytest.mark.parametrize("orientation", [1, 6])
def test_the_fast_raster_differs_in_chroma_only(orientation):
    data = encoded(scene(), "JPEG", quality=90, exif=exif(orientation))
    raster = decode_fast(data)
    fast = raster.upright(raster.srgb(raster.pixels)).astype(float)
    luma = np.array([0.299, 0.587, 0.114])
    assert fast.shape == decode(data).shape
    assert np.abs(fast @ luma - decode(data) @ luma).mean() < 1.0


def test_the_fast_raster_converts_a_part_like_the_whole():
    data = encoded(scene(), "JPEG", quality=90, subsampling=0, icc_profile=swapped_profile())
    raster = decode_fast(data)
    assert np.array_equal(raster.srgb(raster.pixels[::4, ::4]), decode(data)[::4, ::4])
