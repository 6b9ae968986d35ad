"""JPEG as libjpeg-turbo computes it, batched in torch: every sample has its own size and quality.

Followed step by step: fixed-point colour conversion, chroma averaged with alternating rounding, edges repeated to whole
blocks, the integer cosine transforms, tables scaled as whole numbers, chroma interpolated with triangular weights
("fancy upsampling"), rounded colour conversion. Whole numbers are kept in float32, which holds nearly all of them
exactly. Sources: ITU-T T.81, annexes A and K; Loeffler, Ligtenberg and Moschytz (1989) for the transform.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from .canvas import Canvas

# Pixels per chroma sample: rows, columns.
MCU = {"4:4:4": (1, 1), "4:4:0": (2, 1), "4:2:2": (1, 2), "4:2:0": (2, 2)}

# ITU-T T.81, tables K.1 and K.2.
LUMA = np.array([
    [16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55], [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62], [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99]])
CHROMA = np.full((8, 8), 99)
CHROMA[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]


def tables(quality: int) -> np.ndarray:
    """The quantisation tables of a quality from 1 to 100: luma and chroma, (2, 8, 8), whole numbers in 1 … 255."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return np.clip((np.stack([LUMA, CHROMA]) * scale + 50) // 100, 1, 255)


def compressed(canvas: Canvas, qualities: Sequence[int], layout: str) -> torch.Tensor:
    """The pixels after a round trip: whole grey levels, 0 to 255, shape of the canvas."""
    height, width = canvas.pixels.shape[2:]
    down, across = MCU[layout] if canvas.pixels.shape[1] == 3 else (1, 1)
    bottom, right = -height % (8 * down), -width % (8 * across)
    pixels = canvas.padded(0, bottom, 0, right, "replicate").round().clip(0, 255)
    table = canvas.upload(np.stack([tables(quality) for quality in qualities]))
    if pixels.shape[1] == 1:
        return quantised(pixels, table[:, :1])[:, :, :height, :width]
    luma, chroma = _ycc(pixels)
    luma = quantised(luma, table[:, :1])
    sizes = tuple(-(-h // down) for h in canvas.heights), tuple(-(-w // across) for w in canvas.widths)
    small = Canvas(_averaged(chroma, down, across), *sizes)
    # Below the image libjpeg repeats the last row of averages, not of pixels.
    small = small.last_row_repeated() if down > 1 else small
    small = small.with_pixels(quantised(small.pixels, table[:, 1:].expand(-1, 2, -1, -1)))
    chroma = _interpolated(small, down, across)
    narrow = [width <= 2 for width in small.widths] if across == 2 else []
    if any(narrow):                          # libjpeg interpolates only where there is more than that
        repeated = small.pixels.repeat_interleave(down, 2).repeat_interleave(across, 3)
        chroma = torch.where(canvas.column(narrow) > 0, repeated, chroma)
    return _rgb(luma, chroma)[:, :, :height, :width]


def _ycc(rgb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Luma (B, 1, H, W) and chroma (B, 2, H, W) in 16-bit fixed point, which float32 holds exactly."""
    red, green, blue = rgb.unbind(1)
    luma = (19595 * red + 38470 * green + 7471 * blue + 32768) / 65536
    blueness = (32768 * blue - 11059 * red - 21709 * green + 32767) / 65536 + 128
    redness = (32768 * red - 27439 * green - 5329 * blue + 32767) / 65536 + 128
    return luma.floor()[:, None], torch.stack([blueness, redness], 1).floor()


def _rgb(luma: torch.Tensor, chroma: torch.Tensor) -> torch.Tensor:
    luma, (blueness, redness) = luma[:, 0], (chroma - 128).unbind(1)
    red = luma + (1.402 * redness).round()
    green = luma + (-0.344136 * blueness - 0.714136 * redness).round()
    blue = luma + (1.772 * blueness).round()
    return torch.stack([red, green, blue], 1).clip(0, 255)


def _averaged(plane: torch.Tensor, down: int, across: int) -> torch.Tensor:
    """Means of `down` x `across` pixels; halves are rounded down and up in turn, from column to column."""
    if (down, across) == (1, 1):
        return plane
    batch, channels, height, width = plane.shape
    total = plane.view(batch, channels, height // down, down, width // across, across).sum((3, 5))
    turn = torch.arange(total.shape[3], device=plane.device) % 2
    bias = {(1, 2): turn, (2, 2): 1 + turn, (2, 1): 1}[down, across]
    return ((total + bias) / (down * across)).floor()


def _interpolated(canvas: Canvas, down: int, across: int) -> torch.Tensor:
    """Chroma at the size of the image: 3/4 of the nearest sample and 1/4 of the next, along each halved axis."""
    plane = canvas.padded(down - 1, down - 1, across - 1, across - 1, "replicate")
    if (down, across) == (1, 1):
        return plane
    if down == 2:
        plane = _doubled(plane, 2)
    if across == 2:
        plane = _doubled(plane, 3)
    turn = torch.arange(plane.shape[3 if across == 2 else 2], device=plane.device) % 2
    bias = 8 - turn if down == across else 1 + turn
    bias = bias if across == 2 else bias[:, None]
    return ((plane + bias) / (16 if down == across else 4)).floor()


def _doubled(plane: torch.Tensor, axis: int) -> torch.Tensor:
    """Four times the interpolated values, from a plane with one sample of border along the axis."""
    count = plane.shape[axis] - 2
    before, here, after = (plane.narrow(axis, start, count) for start in (0, 1, 2))
    return torch.stack([3 * here + before, 3 * here + after], axis + 1).flatten(axis, axis + 1)


@functools.cache
def _transform(device: torch.device) -> torch.Tensor:
    """The 8-point cosine transform of libjpeg ("islow"), times 2**13 sqrt(8), in whole numbers: (8, 8).

    After Loeffler, Ligtenberg and Moschytz (1989): the odd half is a sum of products of sums, whose constants are
    rounded to 13 bits one by one. That makes its entries differ from rounded cosines, and results by one in places.
    """
    odd = np.diag([2446, 16819, 25172, 12299]) + 9633
    for members, constant in (((0, 3), -7373), ((1, 2), -20995), ((0, 2), -16069), ((1, 3), -3196)):
        odd[np.ix_(members, members)] += constant
    even = np.array([[8192, 8192, 8192, 8192], [10703, 4433, -4433, -10703],
                     [8192, -8192, -8192, 8192], [4433, -10704, 10704, -4433]])
    matrix = np.zeros((8, 8))
    matrix[0::2] = np.hstack([even, even[:, ::-1]])
    halves = odd[::-1, ::-1]                                  # frequencies 1, 3, 5, 7; differences from the outside in
    matrix[1::2] = np.hstack([halves, -halves[:, ::-1]])
    return torch.tensor(matrix, dtype=torch.float32).to(device)


def _descaled(values: torch.Tensor, bits: int) -> torch.Tensor:
    return (values / 2 ** bits + 0.5).floor()


def quantised(plane: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Blocks of 8 x 8 transformed, divided by the table, rounded, and back: whole levels in 0 … 255."""
    batch, channels, height, width = plane.shape
    transform = _transform(plane.device)
    blocks = (plane - 128).view(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    eighths = _descaled(transform @ _descaled(blocks @ transform.T, 11), 15)
    steps = table[:, :, None, None]
    blocks = eighths.sign() * ((eighths.abs() / (8 * steps) + 0.5).floor() * steps)
    blocks = _descaled(_descaled(transform.T @ blocks, 11) @ transform, 18)
    plane = blocks.transpose(3, 4).reshape(batch, channels, height, width)
    return (plane + 128).clip(0, 255)
