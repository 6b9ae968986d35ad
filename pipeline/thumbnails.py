"""Small pictures for pages."""

from __future__ import annotations

import cv2
import numpy as np
import simplejpeg

THUMBNAIL = 168         # pixels of the longer side


def thumbnail_bytes(image: np.ndarray) -> bytes:
    """A JPEG of an (H, W, 3) uint8 image, at most THUMBNAIL pixels on its longer side."""
    scale = THUMBNAIL / max(image.shape[:2])
    if scale < 1:
        size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), 80, "RGB", "420")
