"""The pixels of a tile, from its source file."""

from __future__ import annotations

import hashlib

import cv2
import numpy as np

from .decode import Limits, decode
from .score import read_image


class SourceChanged(ValueError):
    """A file is no longer what it was when it was scored."""

    reason = "changed"


class Crops:
    """Reads and decodes the source files of tiles; keeps the last one, since the tiles of an image follow one another.

    Rows have `ref`, `uid`, `uri`, `offset`, `length` and `tile`.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits, self.uid = limits, None
        self.data, self.image = b"", None

    def file(self, row: dict) -> bytes:
        """The whole file.

        Raises:
            SourceChanged: it has other bytes than when it was scored.
            ImageRefused, OSError: as when it was scored, if it has gone since.
        """
        if row["uid"] != self.uid:
            self.uid = None
            data = read_image(row, self.limits.max_bytes)
            if hashlib.sha256(data).hexdigest()[: len(row["uid"])] != row["uid"]:
                raise SourceChanged(f"{row['uri']} has changed since it was scored; run ingest and score again")
            self.data, self.image, self.uid = data, None, row["uid"]
        return self.data

    def pixels(self, row: dict) -> np.ndarray:
        """(H, W, 3) uint8 of the tile at its final size; raises as `file`."""
        data, tile = self.file(row), row["tile"]
        if self.image is None:
            self.image = decode(data, self.limits)
        crop = self.image[tile["y"]:tile["y"] + tile["height"], tile["x"]:tile["x"] + tile["width"]]
        if (tile["out_width"], tile["out_height"]) != (tile["width"], tile["height"]):
            crop = cv2.resize(crop, (tile["out_width"], tile["out_height"]), interpolation=cv2.INTER_AREA)
        return np.ascontiguousarray(crop)
