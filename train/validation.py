"""Validation: the same images, noise and noise levels every time, and what the model makes of them, to look at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from torch import Tensor

from .batches import Batch, Loader
from .config import Training
from .named import Named
from .ranks import Ranks

if TYPE_CHECKING:
    from .loop import Trainer

LABEL = 18          # pixels of the line of names above a sheet


class Validator:
    """The images are those of the first positions of a corpus; each rank measures its share of them.

    Raises:
        CorpusError: as `Loader`.
    """

    def __init__(self, config: Training, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        data = config.data.model_copy(update={"flip": False, "workers": 0})
        if config.validation.corpus:
            data = data.model_copy(update={"corpus": config.validation.corpus, "repeat": {},
                                           "reading": config.data.reading.model_copy(update={"weights": None})})
        self.loader = Loader(data, config.seed, batch=1, micro_batch=1, device=ranks.device)
        self.micro = config.micro(ranks.count)

    def batch(self) -> Batch:
        """All of the images, for what is measured on them at the end."""
        return self.loader.at(range(self.config.validation.images))

    def losses(self, trainer: Trainer) -> dict[str, float]:
        """Means over the images, `validation/LOSS`, and for tasks with noise levels `validation/LOSS/LEVEL`.

        Every rank makes as many calls as every other, as FSDP2 needs; what is more than its share counts nothing.
        """
        found: dict[str, float] = {}
        for level in trainer.objective.levels or (None,):
            sums = self._sums(trainer, level)
            for name, value in sums.items():
                if level is not None:
                    found[f"validation/{name}/{level}"] = value
                found[f"validation/{name}"] = found.get(f"validation/{name}", 0) + value / max(
                    1, len(trainer.objective.levels))
        return found

    @torch.no_grad()
    def _sums(self, trainer: Trainer, level: int | None) -> dict[str, float]:
        images, sums = self.config.validation.images, {}
        stride = self.micro * self.ranks.count
        for start in range(0, images, stride):
            first = start + self.ranks.rank * self.micro
            positions = range(first, first + self.micro)
            losses = trainer.losses(self.loader.at(positions), level=level)
            counts = torch.tensor([position < images for position in positions], device=self.ranks.device)
            for name, values in losses.items():
                sums[name] = sums.get(name, 0) + (values * counts).sum()
        total = self.ranks.summed(torch.stack(list(sums.values())))
        return {name: value / images for name, value in zip(sums, total.tolist(), strict=True)}

    @torch.no_grad()
    def previews(self, trainer: Trainer) -> np.ndarray | None:
        """The sheet of pictures, which is also written to `previews/`; None where none are wanted."""
        count = min(self.config.validation.previews, self.config.validation.images)
        if not count or (not self.ranks.first and not trainer.parallel.sharded):
            return None
        batch = self.loader.at(range(count))
        with trainer.parallel.whole(), trainer.parallel.autocast():
            pictures = trainer.objective.preview(batch, Named(self.config.seed, batch.keys, batch.epochs))
        if not self.ranks.first:
            return None
        drawn = sheet(pictures)
        save(drawn, Path(self.config.out) / "previews" / f"step-{trainer.step:09d}.png")
        return drawn


def sheet(pictures: Mapping[str, Tensor]) -> np.ndarray:
    """Named (B, 3, H, W) pictures in [0, 1] as one (rows, columns, 3) uint8 picture: a row per image."""
    columns = []
    for name, images in pictures.items():
        images = images.float().cpu().clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
        label = np.full((LABEL, images.shape[2], 3), 255, np.uint8)
        cv2.putText(label, name, (2, LABEL - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (0, 0, 0), 1, cv2.LINE_AA)
        columns.append(np.concatenate([label, *images]))
    return np.concatenate(columns, axis=1)


def save(pixels: np.ndarray, path: Path) -> None:
    """Writes (H, W, 3) uint8 RGB as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
