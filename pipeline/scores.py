"""Facts about one picture: sizes, cheap quality measures, hashes. What to keep is decided later, from these.

One decode serves all of them. Texture is measured on full-resolution luma, in at most nine 192-pixel windows
at fixed places that cover the frame, so a value means the same for 2 and for 50 megapixels. Colour and
composition are measured on a strided sample of at most 384 pixels, upright and in sRGB.
"""

from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

import cv2
import numpy as np
import pyarrow as pa
from scipy import fft

from .decode import Header, Limits, Raster, decode_fast
from .perceptual import perceptual_hash

WINDOW = 192    # pixels; a multiple of 8, so that windows lie on the JPEG grid
PER_AXIS = 3    # windows per axis at most
BLOCK = 32      # pixels; one block is flat or not
SAMPLE = 384    # pixels, longest side of the sample
SEGMENT = 128   # pixels, one line of the spectrum; smaller pictures have no `upscale`


@dataclass(frozen=True)
class Fact:
    """One column of the scores table. A new `version` makes every row pending again."""

    name: str
    type: pa.DataType
    unit: str
    better: Literal["higher", "lower"] | None
    description: str   # one sentence, for the report
    version: int = 1


FACTS = (
    Fact("uid", pa.string(), "", None, "First 32 hexadecimal digits of the SHA-256 of the bytes."),
    Fact("width", pa.int32(), "pixels", "higher", "Width of the upright picture."),
    Fact("height", pa.int32(), "pixels", "higher", "Height of the upright picture."),
    Fact("format", pa.string(), "", None, "File format as the bytes say, not the name."),
    Fact("mode", pa.string(), "", None, "Colour mode as stored, in Pillow's terms."),
    Fact("frames", pa.int32(), "", None, "Pictures in the file; above 1 if animated."),
    Fact("bytes", pa.int64(), "bytes", "higher", "Size of the file."),
    Fact("bytes_per_pixel", pa.float32(), "bytes", "higher", "File size over width times height."),
    Fact("jpeg_quality", pa.int32(), "1 to 100", "higher", "The nearest IJG quality; null if not a JPEG."),
    Fact("sharpness", pa.float32(), "grey levels", "higher", "Deviation of the Laplacian in the sharpest third."),
    Fact("flat_share", pa.float32(), "0 to 1", "lower", "Share of 32-pixel blocks with almost no texture."),
    Fact("noise", pa.float32(), "grey levels", "lower", "Sigma of the noise where the picture is flattest."),
    Fact("blockiness", pa.float32(), "ratio", "lower", "Steps across the 8-pixel grid over the others."),
    Fact("upscale", pa.float32(), "factor", "lower", "Seeming enlargement: where the spectrum ends."),
    Fact("entropy", pa.float32(), "bits", "higher", "Entropy of the luma histogram, at most 8."),
    Fact("clipped_dark", pa.float32(), "0 to 1", "lower", "Share of pixels with luma 2 or less."),
    Fact("clipped_bright", pa.float32(), "0 to 1", "lower", "Share of pixels with luma 253 or more."),
    Fact("colourfulness", pa.float32(), "", None, "Hasler and Süsstrunk: 0 grey, 33 moderate, 80 strong."),
    Fact("grey", pa.bool_(), "", None, "Whether no more than one pixel in 200 has a visible colour."),
    Fact("border", pa.float32(), "0 to 1", "lower", "Share of the frame taken by uniform bars."),
    Fact("phash", pa.uint64(), "", None, "Perceptual hash; null for a picture of a single colour."),
    Fact("phash_mirror", pa.uint64(), "", None, "Perceptual hash of the mirrored picture."),
)  # fmt: skip
SCORES_VERSION = sha256(repr([(fact.name, fact.version) for fact in FACTS]).encode()).hexdigest()[:16]


def score(data: bytes, limits: Limits | None = None) -> dict:
    """One value per fact, in the order of FACTS; None where a fact has no meaning. Raises ImageRefused."""
    raster = decode_fast(data, limits)
    header = raster.header
    windows = full_resolution_windows(raster.pixels)
    textures = [texture(window) for window in windows]
    colour = sample(raster)
    luma = cv2.cvtColor(colour, cv2.COLOR_RGB2GRAY)
    phash, phash_mirror = perceptual_hash(luma) if np.ptp(luma) > 2 else (None, None)
    return {
        "uid": sha256(data).hexdigest()[:32],
        "width": header.width,
        "height": header.height,
        "format": header.format,
        "mode": header.mode,
        "frames": header.frames,
        "bytes": len(data),
        "bytes_per_pixel": len(data) / (header.width * header.height),
        "jpeg_quality": jpeg_quality(header),
        "sharpness": sharpness(textures),
        "flat_share": flat_share(textures),
        "noise": noise(textures),
        "blockiness": blockiness(windows),
        "upscale": upscale(windows, textures),
        "entropy": entropy(luma),
        "clipped_dark": float((luma <= 2).mean()),
        "clipped_bright": float((luma >= 253).mean()),
        "colourfulness": colourfulness(colour),
        "grey": is_grey(colour),
        "border": border(luma),
        "phash": phash,
        "phash_mirror": phash_mirror,
    }


def full_resolution_windows(pixels: np.ndarray) -> list[np.ndarray]:
    """Luma of at most nine (<=192, <=192) uint8 windows of (H, W, 3) uint8, corners at multiples of 8."""

    def starts(length: int) -> list[int]:
        count = min(PER_AXIS, -(-length // WINDOW))
        room = max(length - WINDOW, 0)
        places = np.linspace(0, room, count) if count > 1 else [room / 2]
        return [int(place) // 8 * 8 for place in places]

    height, width = pixels.shape[:2]
    return [
        cv2.cvtColor(pixels[top : top + WINDOW, left : left + WINDOW], cv2.COLOR_RGB2GRAY)
        for top in starts(height)
        for left in starts(width)
    ]


def sample(raster: Raster) -> np.ndarray:
    """Every k-th pixel of the picture, at most 384 on the longest side: (h, w, 3) uint8 sRGB, upright."""
    stride = -(-max(raster.pixels.shape[:2]) // SAMPLE)
    return raster.upright(raster.srgb(np.ascontiguousarray(raster.pixels[::stride, ::stride])))


@dataclass(frozen=True, eq=False)
class Texture:
    """What one window says; the arrays hold one value per 32-pixel block."""

    laplacian: float         # standard deviation, grey levels
    gradient: np.ndarray     # mean of the Sobel magnitude
    gradient_var: np.ndarray  # variance of the Sobel magnitude
    noise: np.ndarray        # sigma after Immerkær, grey levels
    level: np.ndarray        # mean luma


_IMMERKAER = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)


def texture(window: np.ndarray) -> Texture:
    """Filters over one (h, w) uint8 window, averaged over its 32-pixel blocks (one block if smaller)."""
    blocks = tuple(max(length // BLOCK, 1) for length in window.shape)
    rows, columns = (min(count * BLOCK, length) for count, length in zip(blocks, window.shape, strict=True))
    window = window[:rows, :columns]

    def per_block(values: np.ndarray) -> np.ndarray:
        return cv2.resize(values, blocks[::-1], interpolation=cv2.INTER_AREA).ravel()

    luma = window.astype(np.float32)
    squared = cv2.Sobel(luma, cv2.CV_32F, 1, 0) ** 2 + cv2.Sobel(luma, cv2.CV_32F, 0, 1) ** 2
    gradient = per_block(cv2.sqrt(squared))
    residual = np.abs(cv2.filter2D(luma, cv2.CV_32F, _IMMERKAER))
    return Texture(
        laplacian=float(cv2.meanStdDev(cv2.Laplacian(luma, cv2.CV_32F))[1][0, 0]),
        gradient=gradient,
        gradient_var=np.maximum(per_block(squared) - gradient**2, 0),
        noise=per_block(residual) * (np.sqrt(np.pi / 2) / 6),
        level=per_block(luma),
    )


def jpeg_quality(header: Header) -> int | None:
    """The quality from 1 to 100 whose IJG luma table (ITU-T T.81, table K.1, scaled) is nearest; None if no JPEG.

    Exact for libjpeg and its kin. Makers with tables of their own get the nearest step sizes.
    """
    if len(header.luma_table) != 64:
        return None
    return int(np.abs(_IJG_TABLES - np.array(header.luma_table)).sum(1).argmin()) + 1


def sharpness(textures: list[Texture]) -> float:
    """Standard deviation of the Laplacian in grey levels, mean over the sharpest third of the windows.

    The square root of the measure of Pech-Pacheco et al. (2000). Per full-resolution pixel, so it does not
    depend on the size of the picture; a blurred background does not count. Noise and contrast raise it too.
    """
    values = sorted((each.laplacian for each in textures), reverse=True)
    return float(np.mean(values[: -(-len(values) // 3)]))


def flat_share(textures: list[Texture]) -> float:
    """Share of blocks whose Sobel magnitude has a variance below 100 (grey levels squared).

    In the manner of LSDIR (Li et al., CVPR workshops 2023), whose blocks are larger. Sky and blurred
    background are flat too; artwork is nearly all flat.
    """
    return float((np.concatenate([each.gradient_var for each in textures]) < FLAT_VARIANCE).mean())


def noise(textures: list[Texture]) -> float | None:
    """Sigma in grey levels: J. Immerkær (1996), equation 5, median over the flattest quarter of the blocks.

    Blocks near black or white are left out, because clipping hides noise; None if no others exist.
    """
    level, gradient, sigma = (
        np.concatenate([getattr(each, name) for each in textures]) for name in ("level", "gradient", "noise")
    )
    usable = np.flatnonzero((level > 8) & (level < 247))
    flattest = usable[np.argsort(gradient[usable], kind="stable")[: -(-len(usable) // 4)]]
    return float(np.median(sigma[flattest])) if len(flattest) else None


def blockiness(windows: list[np.ndarray]) -> float | None:
    """Mean step across the 8-pixel grid over mean step elsewhere: 1 is none; JPEG 75 reads 1.1 to 1.4, 20 about 2.

    Half a grey level is added to both, because a grid in a sky of equal pixels is seen by nobody. Sees the grid
    of a JPEG, or of what was saved from one without crop or resize. None below 16 pixels.
    """
    across, inside = [], []
    for window in windows:
        if min(window.shape) < 16:
            continue
        down, right = cv2.absdiff(window[1:], window[:-1]), cv2.absdiff(window[:, 1:], window[:, :-1])
        for steps, along in ((down, 1), (right, 0)):
            mean = cv2.reduce(steps, along, cv2.REDUCE_AVG, dtype=cv2.CV_32F).ravel()
            grid = np.arange(1, len(mean) + 1) % 8 == 0
            across.append(mean[grid].mean())
            inside.append(mean[~grid].mean())
    return float((np.mean(across) + 0.5) / (np.mean(inside) + 0.5)) if across else None


def upscale(windows: list[np.ndarray], textures: list[Texture]) -> float | None:
    """Factor, at least 1, by which the picture seems to have been enlarged: 0.5 over where its spectrum ends.

    Photographs have line spectra near 1/f²; times f² they are level, up to the lens. Interpolation leaves
    nothing above its source's limit of 0.5/factor cycles per pixel. The end is where the levelled spectrum,
    averaged in decibels over the most textured windows, first lies 8 dB below its low frequencies.
    It measures resolution, whatever took it away: a soft lens, shaken hands, strong denoising or low JPEG
    quality read as 1.2 to 1.8. Measured: above 1.5 are 4 of 32 native camera photographs and none of 125 native
    web pictures, and of those web pictures enlarged by 1.5, 2 and 3 about 32%, 98% and all; above 1.75 none of
    either native kind, and 8%, 83% and 99%. Not seen: enlargement of a picture with almost no texture, whose
    spectrum is compression noise (15% of centre crops from the camera photographs), and enlargement by a
    network that invents detail. None below 128 pixels or for a single colour.
    """
    strength = [float(each.gradient.mean()) for each in textures]
    order = np.argsort(strength)[::-1][: -(-2 * len(windows) // 5)]
    chosen = [windows[at] for at in order if min(windows[at].shape) >= SEGMENT and strength[at] > 0]
    if not chosen:
        return None
    level = np.mean([10 * np.log10(_line_spectrum(window)[1:] * _FREQUENCY**2 + 1e-9) for window in chosen], axis=0)
    level = np.convolve(np.pad(level, 2, mode="edge"), np.ones(5) / 5, "valid")
    low = (_FREQUENCY > 0.03) & (_FREQUENCY < 0.12)
    below = np.flatnonzero((level < level[low].max() - END_DB) & (_FREQUENCY > 0.05))
    return float(max(0.5 / _FREQUENCY[below[0]], 1.0)) if len(below) else 1.0


def _line_spectrum(window: np.ndarray) -> np.ndarray:
    """Mean power of rows and columns, (SEGMENT // 2 + 1,): Welch's method on every fourth line."""
    lines = np.concatenate([
        part[::4, start : start + SEGMENT]
        for part in (window, window.T)
        for start in range(0, part.shape[1] - SEGMENT + 1, SEGMENT // 2)
    ]).astype(np.float32)
    lines -= lines.mean(1, keepdims=True)
    spectrum = fft.rfft(lines * _HANN, axis=1)
    return (spectrum.real**2 + spectrum.imag**2).mean(0)


def entropy(luma: np.ndarray) -> float:
    """Shannon entropy in bits of the 256-bin histogram of (h, w) uint8."""
    share = cv2.calcHist([luma], [0], None, [256], [0, 256]).ravel() / luma.size
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum()) + 0.0


def colourfulness(colour: np.ndarray) -> float:
    """Hasler and Süsstrunk (2003), metric M^(3), of (h, w, 3) uint8 sRGB."""
    few = colour[::2, ::2].astype(np.float32)  # moments do not need every pixel
    opponents = cv2.transform(few, np.array([[1, -1, 0], [0.5, 0.5, -1]], np.float32))
    mean, deviation = cv2.meanStdDev(opponents)
    return float(np.linalg.norm(deviation) + 0.3 * np.linalg.norm(mean))


def is_grey(colour: np.ndarray) -> bool:
    """Whether the channels of at most one pixel in 200 differ by more than 12 levels, (h, w, 3) uint8."""
    red, green, blue = cv2.split(colour)
    spread = cv2.max(cv2.max(red, green), blue) - cv2.min(cv2.min(red, green), blue)
    return bool((spread > 12).mean() <= 0.005)


def border(luma: np.ndarray) -> float:
    """Share of (h, w) uint8 outside the picture proper: bars of one level along its edges.

    A line belongs to a bar when all of it lies within 10 levels of the edge's mean. A burnt-out sky that
    fills whole rows counts as a bar too; a picture of one colour is all border.
    """
    inner = 1.0
    for lines in (luma, luma.T):
        low, high = lines.min(1).astype(int), lines.max(1).astype(int)
        bars = 0
        for side in (slice(None), slice(None, None, -1)):
            edge = lines[side][0].mean()
            uniform = (high[side] < edge + 10) & (low[side] > edge - 10)
            bars += len(uniform) if uniform.all() else int(uniform.argmin())
        inner *= max(1 - bars / len(lines), 0.0)
    return 1.0 - inner


FLAT_VARIANCE = 100.0
END_DB = 8.0   # between 6 (soft photographs read as enlarged) and 12 (enlargements by 2 pass)
_FREQUENCY = np.arange(1, SEGMENT // 2 + 1) / SEGMENT   # cycles per pixel
_HANN = np.hanning(SEGMENT).astype(np.float32)
_K1 = np.array([
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
])  # fmt: skip
_QUALITY = np.arange(1, 101)
_SCALE = np.where(_QUALITY < 50, 5000 // _QUALITY, 200 - 2 * _QUALITY)   # jcparam.c of libjpeg
_IJG_TABLES = ((_K1 * _SCALE[:, None] + 50) // 100).clip(1, 255)
