"""Tiles as a model is shown them: cropped from their source, no larger than it can see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
import simplejpeg

from pipeline.ahead import Batch
from pipeline.crops import Crops
from pipeline.decode import Limits
from pipeline.jobs import Timed

if TYPE_CHECKING:
    from .local import Preparer


@dataclass(frozen=True)
class Shown:
    """Reads the tiles of rows; a row that cannot be read fails alone."""

    limits: Limits
    max_side: int | None
    row_timeout_s: float

    def __call__(self, rows: list[dict]) -> Batch:
        """A batch with `inputs`: a list of (H, W, 3) uint8 images."""
        crops, batch = Crops(self.limits), Batch(inputs=[])
        with Timed(lambda row: self._fitted(crops.pixels(row)), self.row_timeout_s) as read:
            for row in rows:
                try:
                    batch.inputs.append(read(row))
                    batch.rows.append(row)
                except Exception as error:
                    batch.failed.append((row, error))
        return batch

    def _fitted(self, image: np.ndarray) -> np.ndarray:
        scale = (self.max_side or np.inf) / max(image.shape[:2])
        if scale >= 1:
            return image
        size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
        return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


@dataclass(frozen=True)
class Encoded:
    """`inputs` as JPEG files, for a model behind a server."""

    shown: Shown

    def __call__(self, rows: list[dict]) -> Batch:
        batch = self.shown(rows)
        batch.inputs = [simplejpeg.encode_jpeg(image, 95, "RGB", "444") for image in batch.inputs]
        return batch


@dataclass(frozen=True)
class Tensors:
    """`inputs` as arrays by name, padded on the left, for a model of this folder; rows have `question` and `system`."""

    shown: Shown
    folder: str

    def __call__(self, rows: list[dict]) -> Batch:
        batch = self.shown(rows)
        if batch.rows:
            questions, systems = ([row[name] for row in batch.rows] for name in ("question", "system"))
            tensors = preparer(self.folder)(batch.inputs, questions, systems)
            batch.inputs = {name: tensor.numpy() for name, tensor in tensors.items()}
        return batch


_preparers: dict[str, Preparer] = {}


def preparer(folder: str) -> Preparer:
    """The processor of a model, kept for the life of the process."""
    if folder not in _preparers:
        from .local import Preparer
        _preparers[folder] = Preparer(folder)
    return _preparers[folder]
