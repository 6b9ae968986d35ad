"""Bytes to pixels: the one decode function of the project, and the refusals that come before it.

Every picture becomes (H, W, 3) uint8 sRGB, upright, the same way everywhere:
EXIF orientation applied, ICC profile converted (relative colorimetric with black-point compensation;
a broken profile, or one that belongs to another colour model, counts as sRGB, as in browsers),
alpha composited over white, 16-bit grey scaled by 255/65535, CMYK without a profile by the plain
complement, of an animation or a multi-page file the first picture. Byte and pixel limits are checked
from the header; damaged data is refused, never half-read.
"""

import contextlib
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import cv2
import numpy as np
import simplejpeg
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from pydantic import BaseModel, ConfigDict, Field

from .colour import ALPHA_MODES, DEEP_GREY, converted, flattened

# A filter once, narrow and at import: warnings.catch_warnings() around each call is not safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

# The plugin classes, not Image.open: that one guesses among every format, and applies a process-wide limit.
FORMATS = {
    "jpeg": JpegImagePlugin.JpegImageFile,
    "png": PngImagePlugin.PngImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
    "tiff": TiffImagePlugin.TiffImageFile,
    "avif": AvifImagePlugin.AvifImageFile,
    "gif": GifImagePlugin.GifImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "jpeg2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
    "ppm": PpmImagePlugin.PpmImageFile,
}

SIGNATURES = (
    (rb"\xff\xd8\xff", "jpeg"),
    (rb"\x89PNG\r\n\x1a\n", "png"),
    (rb"RIFF....WEBP", "webp"),
    (rb"II\*\x00\x10\x00\x00\x00CR|IIU\x00|FUJIFILMCCD", "camera raw"),
    (rb"II\*\x00|MM\x00\*|II\+\x00|MM\x00\+", "tiff"),
    (rb"....ftyp(avif|avis|.{8,40}avif)", "avif"),
    (rb"....ftyp(heic|heix|hevc|mif1|msf1)", "HEIC"),
    (rb"....ftypcrx", "camera raw"),
    (rb"....ftyp", "video"),
    (rb"GIF8[79]a", "gif"),
    (rb"\x00\x00\x00\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", "jpeg2000"),
    (rb"P[1-6]\s", "ppm"),
    (rb"8BPS", "Photoshop"),
    (rb"DDS ", "DDS"),
    (rb"\x00\x00\x01\x00", "ICO"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "EPS"),
    (rb"\x00\x00\x00\x0cJXL |\xff\x0a", "JPEG XL"),
    (rb"(?i:\s*(<\?xml[^>]*>\s*)?<svg)", "SVG"),
    (rb"BM", "bmp"),
)
LOOKS_LIKE = (
    (rb"(?i:\s*<!doctype html|\s*<html|\s*<head)", "an HTML page, perhaps the server's error page"),
    (rb"%PDF", "a PDF document"),
    (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!", "an archive"),
    (rb"\s*[\[{<]", "JSON or XML text"),
    (rb"[\t\r\n\x20-\x7e]+\Z", "plain text"),
    (rb"\x00+\Z", "zeros only, perhaps an unfinished download"),
)

MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr"}
FULL_SCALE_I = {"png", "ppm", "jpeg2000"}  # formats whose 32-bit "I" mode holds 16-bit samples
MAX_SCANS = 200  # encoders write about 10; thousands of scans make a small progressive JPEG run for hours
TIFF_DAMAGE = re.compile(rb"(?i)bad code word|premature|read error|corrupt|not enough data|invalid data")
TRANSPOSE = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}  # EXIF 2.3, tag 0x0112: from the stored picture to the upright one

_stderr_lock = threading.Lock()


class ImageRefused(ValueError):
    """The bytes are no picture that a corpus should hold; `reason` is a slug that can be counted.

    Reasons: empty, not_an_image, unsupported_format, unsupported_mode, zero_size, too_many_bytes,
    too_many_pixels, animated, truncated, corrupt.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(f"{reason}: {message}")
        self.reason = reason

    def __reduce__(self):
        return ImageRefused, (self.reason, str(self).removeprefix(f"{self.reason}: "))


class Limits(BaseModel):
    """What is refused before any pixel is decoded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_pixels: int = Field(200_000_000, gt=0)       # width times height, as the header says
    max_bytes: int = Field(512 * 2**20, gt=0)        # size of the file
    animated: Literal["first", "refuse"] = "first"   # animations and multi-page files


@dataclass(frozen=True)
class Header:
    """What a file says about itself; nothing has been decoded."""

    format: str                        # key of FORMATS
    mode: str                          # Pillow's mode as stored: RGB, L, CMYK, P, I;16, ...
    width: int                         # pixels, upright
    height: int                        # pixels, upright
    orientation: int                   # EXIF, 1 to 8; 1 where absent or nonsense
    frames: int                        # pictures of an animation or a multi-page file; 1 for a photograph
    has_alpha: bool                    # an alpha channel, or a transparent colour
    has_icc: bool                      # an embedded colour profile, broken or not
    luma_table: tuple[int, ...] = ()   # JPEG: 64 quantisation steps of the first component


@dataclass(frozen=True, eq=False)
class Raster:
    """Pixels as stored, with the two steps that are still owed; cheap to finish on a small part."""

    header: Header
    pixels: np.ndarray      # (h, w, 3) uint8, as stored: neither rotated nor (JPEG) colour-converted
    profile: bytes | None   # ICC profile still to be applied
    orientation: int        # orientation still to be applied

    def srgb(self, pixels: np.ndarray) -> np.ndarray:
        """Colours of any (h, w, 3) uint8 selection of `pixels` as sRGB, same shape."""
        return converted(pixels, self.profile, "L" if self.header.mode == "L" else "RGB")

    def upright(self, pixels: np.ndarray) -> np.ndarray:
        """Any (h, w, ...) array in the stored position, turned as EXIF asks; contiguous."""
        return np.ascontiguousarray(TRANSPOSE.get(self.orientation, lambda a: a)(pixels))


def read_header(data: bytes, limits: Limits | None = None) -> Header:
    """Header of the picture, with every limit checked.

    Raises ImageRefused for anything that `decode` would refuse without looking at pixels.
    """
    return _open(data, limits or Limits())[1]


def decode(data: bytes, limits: Limits | None = None) -> np.ndarray:
    """The picture as (H, W, 3) uint8 sRGB, upright and contiguous. Raises ImageRefused."""
    raster = _raster(data, limits or Limits(), fast=False)
    return raster.upright(raster.srgb(raster.pixels))


def decode_fast(data: bytes, limits: Limits | None = None) -> Raster:
    """Pixels for measuring: luma as in `decode`, chroma upsampled by repetition, position as stored.

    Same refusals as `decode`. Not for pictures that anyone looks at or trains on.
    """
    return _raster(data, limits or Limits(), fast=True)


def _raster(data: bytes, limits: Limits, fast: bool) -> Raster:
    image, header = _open(data, limits)
    with _refusals(header.format):
        profile = image.info.get("icc_profile") or None
        if header.format == "jpeg" and header.mode != "CMYK":
            pixels = _jpeg(data, "GRAY" if header.mode == "L" else "RGB", fast)
            if header.mode == "L":
                pixels = cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
        else:
            if header.format == "jpeg":
                # Pillow overlooks damaged entropy data. 255 - x: Adobe writes CMYK inverted.
                image = Image.fromarray(255 - _jpeg(data, "CMYK", fast), "CMYK")
            else:
                _load(image, header.format)
            if image.mode in ("1", "L") and not profile and "transparency" not in image.info:
                # What `flattened` gives, without carrying three channels through Pillow.
                pixels = cv2.cvtColor(np.asarray(image.convert("L")), cv2.COLOR_GRAY2RGB)
            else:
                pixels, profile = np.array(flattened(image, profile)), None
    orientation = 1 if header.format == "tiff" else header.orientation  # Pillow turns TIFF while loading
    stored = (header.height, header.width) if orientation < 5 else (header.width, header.height)
    if pixels.shape != (*stored, 3):
        raise ImageRefused("corrupt", f"the header says {stored[::-1]}, the data holds {pixels.shape[1::-1]}")
    return Raster(header, pixels, profile, orientation)


def _open(data: bytes, limits: Limits) -> tuple[Image.Image, Header]:
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True: damaged files would pass as whole "
                           "ones; find the import that sets it and set it back to False")
    if len(data) > limits.max_bytes:
        raise ImageRefused("too_many_bytes", f"{len(data)} bytes; max_bytes is {limits.max_bytes}")
    format = _sniff(data)
    with _refusals(format), _quiet(format):
        image = FORMATS[format](BytesIO(data))
        width, height = image.size
        if width * height > limits.max_pixels:
            raise ImageRefused("too_many_pixels", f"{width}x{height} is {width * height} pixels, "
                                                  f"max_pixels is {limits.max_pixels}")
        _check_content(image, format, data)
        header = _header(image, format, data)
    if header.frames > 1 and limits.animated == "refuse":
        raise ImageRefused("animated", f"{header.frames} pictures; animated='first' would take the first")
    return image, header


def _sniff(data: bytes) -> str:
    if not data:
        raise ImageRefused("empty", "0 bytes; fetch the file again")
    head = bytes(data[:512])
    format = next((name for magic, name in SIGNATURES if re.match(magic, head, re.S)), None)
    if format in FORMATS:
        return format
    if format:
        raise ImageRefused("unsupported_format", f"{format}; convert it to one of {', '.join(FORMATS)}")
    unknown = f"bytes {head[:8].hex(' ')}"
    what = next((text for magic, text in LOOKS_LIKE if re.match(magic, head, re.S)), unknown)
    raise ImageRefused("not_an_image", f"this looks like {what}; no known image begins like this")


def _check_content(image: Image.Image, format: str, data: bytes) -> None:
    if image.mode not in MODES | DEEP_GREY and not (image.mode == "I" and format in FULL_SCALE_I):
        raise ImageRefused("unsupported_mode", f"{format} with Pillow mode {image.mode} has no defined way "
                                               "to 8 bits; export it as 8- or 16-bit RGB or grey")
    # The first directory of DNG, NEF, ARW, ... holds a thumbnail: it would pass as the photograph.
    if format == "tiff" and (50706 in image.tag_v2 or int(image.tag_v2.get(254, 0)) & 1):
        raise ImageRefused("unsupported_format", "a camera raw file in a TIFF container; develop it first")
    scans = data.count(b"\xff\xda") if image.info.get("progressive") else 1
    if scans > MAX_SCANS:
        raise ImageRefused("corrupt", f"progressive JPEG with {scans} scans; the limit is {MAX_SCANS}")


def _header(image: Image.Image, format: str, data: bytes) -> Header:
    width, height = image.size
    orientation = _orientation(image, format, data)
    if orientation >= 5 and format != "tiff":  # Pillow gives the size of a TIFF upright
        width, height = height, width
    return Header(
        format=format,
        mode=image.mode,
        width=width,
        height=height,
        orientation=orientation,
        frames=_frames(format, data),
        has_alpha=image.mode in ALPHA_MODES or "transparency" in image.info,
        has_icc=bool(image.info.get("icc_profile")),
        luma_table=tuple(next(iter(image.quantization.values()), ())) if format == "jpeg" else (),
    )


def _frames(format: str, data: bytes) -> int:
    if format not in {"gif", "tiff", "webp", "png", "avif"}:
        return 1
    try:
        return int(FORMATS[format](BytesIO(data)).n_frames)  # its own object: counting moves the position
    except Exception:  # what follows the first picture is damaged; the first may still be whole
        return 1


def _orientation(image: Image.Image, format: str, data: bytes) -> int:
    try:
        exif = Image.Image.getexif(image)  # the base class: PngImageFile.getexif would decode the pixels
        late = data.rfind(b"eXIf") if format == "png" and "exif" not in image.info else -1
        if late >= 4:  # PNG allows the chunk after the pixels
            exif = Image.Exif()
            exif.load(data[late + 4 : late + 4 + int.from_bytes(data[late - 4 : late], "big")])
        value = exif.get(0x0112, 1)
        return value if isinstance(value, int) and 1 <= value <= 8 else 1
    except Exception:  # metadata that cannot be read says nothing about the pixels
        return 1


def _jpeg(data: bytes, colorspace: str, fast: bool) -> np.ndarray:
    """libjpeg-turbo, where each of its warnings counts as damage but for those listed here."""
    try:
        return simplejpeg.decode_jpeg(data, colorspace, fastupsample=fast)
    except ValueError as error:
        message = str(error)
    if re.search(r"Unknown Adobe color transform|unknown JFIF revision|bad ICC marker|thumbnail", message):
        return simplejpeg.decode_jpeg(data, colorspace, fastupsample=fast, strict=False)
    stray = re.search(r"(\d+) extraneous bytes before marker 0x(\w\w)", message)
    if stray:
        cleaned = _without_stray(data, int(stray[1]), bytes([0xFF, int(stray[2], 16)]))
        for candidate in cleaned:
            with contextlib.suppress(ValueError):
                return simplejpeg.decode_jpeg(candidate, colorspace, fastupsample=fast)
    raise ImageRefused("truncated" if "Premature end" in message else "corrupt", f"JPEG: {message}")


def _without_stray(data: bytes, count: int, marker: bytes) -> Iterator[bytes]:
    """The file without the bytes that libjpeg skipped, for each place where they may lie.

    Some cameras pad before a marker, which is harmless. But libjpeg reports its last warning only, and
    damaged entropy data leaves the same one; what decodes without any warning afterwards was padding.
    A long rest of data before the end of the image is no padding: the decoder had lost its place.
    """
    for at in {data.find(marker, 2 + count), data.rfind(marker)}:
        stray = data[max(at - count, 0) : at]
        if at >= count + 2 and not (marker == b"\xff\xd9" and count > 16 and len(set(stray)) > 1):
            yield data[: at - count] + data[at:]


def _load(image: Image.Image, format: str) -> None:
    with _quiet(format) as messages:
        image.load()
        found = TIFF_DAMAGE.search(messages())
    if found:
        raise ImageRefused("corrupt", f"libtiff: {found[0].decode()}")


@contextlib.contextmanager
def _refusals(format: str) -> Iterator[None]:
    """Whatever a decoder throws at damaged bytes, as ImageRefused."""
    try:
        yield
    except ImageRefused:
        raise
    except Image.DecompressionBombError as error:
        raise ImageRefused("too_many_pixels", f"{format}: {error}") from error
    except SyntaxError as error:  # Pillow's word for a header it cannot use
        empty = "not identified by this driver" in str(error)  # after reading it, for lack of width or height
        raise ImageRefused("zero_size" if empty else "corrupt", f"{format}: {error}") from error
    except Exception as error:  # struct.error, zlib.error, MemoryError, OverflowError, ...
        reason = "truncated" if "truncated" in str(error).lower() else "corrupt"
        raise ImageRefused(reason, f"{format}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _quiet(format: str) -> Iterator:
    """Keeps what libtiff prints away from the log; yields a function that gives those bytes.

    The C library knows no other way than file descriptor 2, which belongs to the process: one at a time.
    """
    if format != "tiff":
        yield lambda: b""
        return
    with _stderr_lock, tempfile.TemporaryFile() as caught:
        kept = os.dup(2)
        os.dup2(caught.fileno(), 2)
        try:
            yield lambda: os.pread(caught.fileno(), 1 << 16, 0)
        finally:
            os.dup2(kept, 2)
            os.close(kept)
