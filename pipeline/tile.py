"""Tile: which rectangles of the kept images become samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from .config import Corpus, Tile
from .decode import decode_fast
from .ingest import sources
from .jobs import RowJob, Unit
from .score import read_image
from .selection import selection
from .storage import Folder
from .tables import QUARANTINE, TILES, Part, Table

TEXTURE_BLOCK = 32      # pixels; a face's skin is flat at this size, hair and eyes are not
TEXTURE_LEVEL = 6.0     # mean Sobel response at half size; white noise alone reaches it at a sigma of about 4


# A sample's key, in SQL over `uid` and `tile`; `sample_key` is the same in Python.
KEY = "format('{}-{}-{}-{}x{}', uid, tile.x, tile.y, tile.out_width, tile.out_height)"


def sample_key(uid: str, tile: dict) -> str:
    """The key of a tile's sample: content and place."""
    return f"{uid}-{tile['x']}-{tile['y']}-{tile['out_width']}x{tile['out_height']}"


def tiles(workspace: Folder) -> Table:
    return Table(workspace / "tiles", TILES)


@dataclass
class TileJob(RowJob):
    """The tiles of every kept image; an image without enough texture has none, and keeps its row."""

    workspace: Folder
    corpus: Corpus
    retry_errors: bool = False
    name = "tile"

    def __post_init__(self) -> None:
        self.input, self.output = selection(self.workspace), tiles(self.workspace)
        self.quarantine = Table(self.workspace / "quarantine" / self.name, QUARANTINE)
        self.limits = self.corpus.score.limits
        self.settings = {"tile": self.corpus.tile.model_dump(), "limits": self.limits.model_dump()}
        self.row_timeout_s = self.corpus.score.row_timeout_s

    def inputs(self) -> Iterator[tuple[str, dict[str, Part]]]:
        places = sources(self.workspace).parts()
        return ((key, parts | {"places": places[key]}) for key, parts in super().inputs())

    def rows(self, unit: Unit) -> list[dict]:
        chosen = self.input.read(unit.parts["input"])
        kept = {row["ref"]: row for row in chosen.to_pylist() if row["kept"]}
        places = sources(self.workspace)
        rows = places.read(unit.parts["places"], ["ref", "uri", "offset", "length", "name"]).to_pylist()
        return [kept[row["ref"]] | row for row in rows if row["ref"] in kept]

    def process(self, row: dict) -> dict:
        # Without the colour profile: it costs as much as decoding and moves no texture.
        raster = decode_fast(read_image(row, self.limits.max_bytes), self.limits)
        luma = raster.upright(cv2.cvtColor(raster.pixels, cv2.COLOR_RGB2GRAY))
        found = place_tiles(luma, self.corpus.tile)
        return {"ref": row["ref"], "uid": row["uid"], "group": row["group"], "tiles": found}


def place_tiles(luma: np.ndarray, config: Tile) -> list[dict]:
    """Tiles of one image, best first: rows of `TILE`.

    luma: (H, W) uint8. Tiles do not overlap and are never enlarged; each has at least
    `config.min_texture` of its blocks textured. [] if the image is smaller than a tile.
    """
    height, width = luma.shape
    if min(height, width) < config.size:
        return []
    detail = texture(luma)
    if config.mode == "whole":
        scale = config.size / min(height, width)
        candidates = [(0, 0, width, height, round(width * scale), round(height * scale))]
    else:
        step = config.size if config.mode == "grid" else max(TEXTURE_BLOCK, config.size // 4)
        candidates = [(x, y, config.size, config.size, config.size, config.size)
                      for y in _starts(height, config.size, step) for x in _starts(width, config.size, step)]
    scored = [_tile(place, detail) for place in candidates]
    rich = [tile for tile in scored if tile["texture"] >= config.min_texture]
    if config.mode != "best":
        return rich
    return list(_apart(sorted(rich, key=lambda t: (-t["texture"], t["y"], t["x"])), config.max_tiles))


def texture(luma: np.ndarray) -> np.ndarray:
    """(H // 32, W // 32) bool: blocks whose mean absolute Sobel response says that there is texture.

    Measured at half the size, which halves the response to noise and hardly changes that to texture.
    """
    rows, columns = luma.shape[0] // TEXTURE_BLOCK, luma.shape[1] // TEXTURE_BLOCK
    size = columns * TEXTURE_BLOCK // 2, rows * TEXTURE_BLOCK // 2
    half = cv2.resize(luma[: 2 * size[1], : 2 * size[0]], size, interpolation=cv2.INTER_AREA)
    gradient = cv2.Sobel(half, cv2.CV_16S, 1, 0), cv2.Sobel(half, cv2.CV_16S, 0, 1)
    strength = cv2.addWeighted(cv2.convertScaleAbs(gradient[0]), 0.5, cv2.convertScaleAbs(gradient[1]), 0.5, 0)
    return cv2.resize(strength, (columns, rows), interpolation=cv2.INTER_AREA) > TEXTURE_LEVEL


def _starts(length: int, size: int, step: int) -> list[int]:
    """Places along one side, spread evenly from edge to edge, at most `step` apart (a grid: at least)."""
    count = length // size if step == size else -(-(length - size) // step) + 1
    if count == 1:
        return [(length - size) // 2]
    return [round(i * (length - size) / (count - 1)) for i in range(count)]


def _tile(place: tuple[int, ...], detail: np.ndarray) -> dict:
    x, y, width, height, out_width, out_height = place
    inside = detail[y // TEXTURE_BLOCK:(y + height) // TEXTURE_BLOCK, x // TEXTURE_BLOCK:(x + width) // TEXTURE_BLOCK]
    return {"x": x, "y": y, "width": width, "height": height, "out_width": out_width, "out_height": out_height,
            "texture": float(inside.mean()) if inside.size else 0.0}


def _apart(candidates: list[dict], wanted: int) -> Iterator[dict]:
    """The best candidates that do not overlap."""
    taken: list[dict] = []
    for tile in candidates:
        if len(taken) == wanted:
            return
        if all(abs(tile["x"] - t["x"]) >= tile["width"] or abs(tile["y"] - t["y"]) >= tile["height"] for t in taken):
            taken.append(tile)
            yield tile
