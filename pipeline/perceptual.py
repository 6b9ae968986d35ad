"""A 64-bit perceptual hash: near copies of a picture differ in few bits, mirrored copies can be found too.

After C. Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions (2010), section 3.2.1:
area-averaged 32x32 luma, two-dimensional DCT, low frequencies, threshold at their median. Two points that
implementations disagree on: the block is the 8x8 of lowest frequencies with the mean (DC) inside it, but
the median is taken over the 63 others and the DC bit is always 0, because brightness says nothing about
content. So 63 bits carry information, about half of them set.
"""

import cv2
import numpy as np

SIDE = 32   # pixels of the reduced picture
LOW = 8     # frequencies kept per axis
_BITS = np.uint64(1) << np.arange(63, -1, -1, dtype=np.uint64)  # row-major, first bit highest
_MIRROR = np.where(np.arange(LOW) % 2, -1.0, 1.0)  # cos((2(N-1-x)+1)kπ/2N) = (-1)^k cos((2x+1)kπ/2N)


def perceptual_hash(luma: np.ndarray) -> tuple[int, int]:
    """Hash of the picture and hash of the picture mirrored left to right, both unsigned 64-bit.

    luma: (H, W) uint8 or float32, any size; larger than 32x32 it is averaged, not sampled.
    """
    small = cv2.resize(luma, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:LOW, :LOW]
    return _bits(low), _bits(low * _MIRROR)


def hamming(first: int, second: int) -> int:
    """Number of bits that differ."""
    return (int(first) ^ int(second)).bit_count()


def _bits(low: np.ndarray) -> int:
    flat = low.ravel()
    above = flat > np.median(flat[1:])
    above[0] = False
    return int(_BITS[above].sum())
