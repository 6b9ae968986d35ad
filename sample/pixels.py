"""From a picture to the size at which the network works, and back to exactly the size that was promised.

Three rules. `plan`, the default, keeps the aspect ratio and fills up with reflected pixels: a picture that is large
enough already is not resampled at all, neither on the way in nor on the way out. `plan_released` and `plan_page` are
the rules of the released test script and web page, which stretch each side to a multiple of 64 or 32: up to 3 % at a
short side of 1024, and two resamplings of everything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn import functional

UNIT = 64                       # pixels: 8 in a pixel of the latent, and 8 of those in one of the UNet's middle
PAGE_UNIT = 32
SHORT = 1024                    # what SDXL was trained on
MOST = 4096 * 4096              # pixels up to which small pictures are enlarged to the short side above
Size = tuple[int, int]          # height, width
Filter = Literal["bicubic", "lanczos", "area"]


@dataclass(frozen=True)
class Plan:
    """Sizes of one picture on its way."""

    source: Size
    promised: Size              # of the result
    content: Size               # to which the source is resampled
    working: Size               # with what is filled up at the right and the bottom
    filter: Filter = "bicubic"  # of the way in; bicubic is Pillow's, the others OpenCV's
    antialias: bool = True      # on the way out, where that shrinks
    truncate: bool = False      # to whole grey levels, instead of rounding


def plan(source: Size, upscale: float = 1.0, *, short: int = SHORT, unit: int = UNIT, most: int = MOST) -> Plan:
    """The default rule.

    Args:
        source: height and width.
        upscale: by which factor the result is larger.
        short: a shorter side below this many pixels is enlarged to it for the network, not in the result. Long
            strips are enlarged to `most` pixels at most.
        unit: sides at which the network works are multiples of this.
    """
    promised = _scaled(_checked(source), upscale)
    wanted = short / min(promised)
    allowed = math.sqrt(most / (promised[0] * promised[1]))
    content = _scaled(promised, max(1.0, min(wanted, allowed)))
    return Plan(source, promised, content, tuple(math.ceil(side / unit) * unit for side in content))


def plan_released(source: Size, upscale: float = 1.0, *, short: int = SHORT, fixed: int | None = None) -> Plan:
    """The test script's: sides to the nearest multiple of 64, and saved at the size before small ones are enlarged.

    `fixed` replaces the factor by that which makes the shorter side so long.
    """
    shorter = min(_checked(source))
    upscale = fixed / shorter if fixed else upscale
    promised = _scaled(source, upscale)
    working = _stretched(source, max(upscale, short / shorter), UNIT)
    return Plan(source, promised, working, working, antialias=False, truncate=True)


def plan_page(source: Size, upscale: float = 1.0, *, short: int = SHORT, fixed: int | None = None) -> Plan:
    """The web page's: sides to the nearest multiple of 32, and saved at that size.

    The filter goes by the user's factor, also where `short` enlarges. With `fixed` the shorter side gets that length,
    and sides are multiples of 64.
    """
    shorter = min(_checked(source))
    upscale = fixed / shorter if fixed else upscale
    working = _stretched(source, *((upscale, UNIT) if fixed else (max(upscale, short / shorter), PAGE_UNIT)))
    return Plan(source, working, working, working, filter="lanczos" if upscale > 1 else "area")


def prepare(image: np.ndarray, sizes: Plan) -> torch.Tensor:
    """(H, W, 3) uint8 RGB to (1, 3, H', W') float32 in [-1, 1] at the working size."""
    if image.dtype != np.uint8 or image.shape != (*sizes.source, 3):
        raise ValueError(f"a picture of {sizes.source} must be uint8 ({sizes.source[0]}, {sizes.source[1]}, 3), "
                         f"not {image.dtype} {image.shape}")
    content = resized(image, sizes.content, sizes.filter)
    fill = [(0, full - side) for full, side in zip(sizes.working, sizes.content, strict=True)]
    if any(after for _, after in fill):
        content = np.pad(content, [*fill, (0, 0)], mode="symmetric")     # also where there is less than is missing
    pixels = torch.from_numpy(np.ascontiguousarray(content.transpose(2, 0, 1)))[None]
    return pixels.float() / 255 * 2 - 1


def finish(pixels: torch.Tensor, sizes: Plan) -> np.ndarray:
    """(1, 3, H', W') float32 in about [-1, 1] at the working size to (H, W, 3) uint8 RGB at the promised size."""
    if tuple(pixels.shape) != (1, 3, *sizes.working):
        raise ValueError(f"expected pixels of shape {(1, 3, *sizes.working)}, not {tuple(pixels.shape)}")
    pixels = pixels[:, :, :sizes.content[0], :sizes.content[1]].float()
    if sizes.content != sizes.promised:
        pixels = functional.interpolate(pixels, sizes.promised, mode="bicubic", antialias=sizes.antialias)
    grey = pixels[0] * 127.5 + 127.5
    grey = (grey if sizes.truncate else grey.round()).clamp(0, 255)
    return grey.to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()


def resized(image: np.ndarray, size: Size, by: Filter) -> np.ndarray:
    """(H, W, 3) uint8 at another (height, width); the same array if that is its size already."""
    if image.shape[:2] == tuple(size):
        return image
    if by == "bicubic":
        return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))
    return cv2.resize(image, size[::-1], interpolation={"lanczos": cv2.INTER_LANCZOS4, "area": cv2.INTER_AREA}[by])


def _checked(source: Size) -> Size:
    if min(source) < 1:
        raise ValueError(f"a picture of {source[1]} x {source[0]} pixels cannot be restored")
    return source


def _scaled(size: Size, factor: float) -> Size:
    return tuple(max(round(side * factor), 1) for side in size)


def _stretched(size: Size, factor: float, unit: int) -> Size:
    # Python and numpy round halves to even: 2.5 units are 2
    return tuple(max(round(side * factor / unit), 1) * unit for side in size)
