"""The numbers that a forecast rests on, each with its origin, and what holds where nothing was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config import Corpus

MEASURED, ARITHMETIC, PUBLISHED, GIVEN, ASSUMED = "measured here", "arithmetic", "published", "given", "assumed"


@dataclass(frozen=True)
class Assumption:
    """One number; `origin` is MEASURED, ARITHMETIC, PUBLISHED, GIVEN or ASSUMED, `source` says from what."""

    name: str
    value: float | str
    unit: str
    origin: str
    source: str


class Ledger:
    """Assumptions by name; keeps which of them a forecast has asked for, and what the user should be warned of.

    Of layers with the same name the last counts.
    """

    def __init__(self, *layers: Mapping[str, Assumption]) -> None:
        self.known = {name: each for layer in layers for name, each in layer.items()}
        self.used: dict[str, Assumption] = {}
        self.warnings: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self.known

    def value(self, name: str) -> float:
        return float(self.note(self.known[name]).value)

    def note(self, assumption: Assumption) -> Assumption:
        self.used[assumption.name] = assumption
        return assumption


# Rows a second in docs/benchmarks.md: of score on one core, of the others as a whole.
BENCHMARKS = {"ingest": 110_000.0, "score": 35.0, "dedup": 357_000.0, "select": 500_000.0, "plan": 50_000.0}
BYTES_PER_PIXEL = {"jpeg": 0.4, "webp": 0.75, "png": 1.5}       # 54 tiles of 1024 pixels, of the same photographs
PHOTOGRAPHS = "35 photographs of 6 to 24 megapixels"
TILES_PER_IMAGE = 2.0
# From 64,000 made-up rows in parts of 1000 (benchmarks/memory.py), rounded up for longer names; captions are reckoned.
BYTES_PER_ROW = {"sources": 60, "scores": 130, "metrics": 30, "duplicates": 1, "selection": 35, "tiles": 40,
                 "captions": 800, "plan": 200, "index and manifest": 300}
EFFICIENCY = 0.5        # of the ideal rate of a GPU job: what captioning at scale reaches with some care


def tile_pixels(corpus: Corpus) -> float:
    """Pixels of a sample; a whole photograph is 3 by 2."""
    return corpus.tile.size**2 * (1.5 if corpus.tile.mode == "whole" else 1)


def assumed(corpus: Corpus) -> dict[str, Assumption]:
    """What holds as long as nothing is measured."""
    tile, encoding = corpus.tile, corpus.shard.encoding
    per_image, why = {
        "whole": (1.0, "tile.mode: whole"),
        "grid": (float(max(1, (4000 // tile.size) * (3000 // tile.size))), "the grid on 12 megapixels"),
        "best": (min(TILES_PER_IMAGE, tile.max_tiles), PHOTOGRAPHS)}[tile.mode]
    found = (
        Assumption("images", 1_000_000, "images", ASSUMED, "nothing is listed yet; say --images N"),
        Assumption("decoded share", 1.0, "of the images", ASSUMED, "an upper bound"),
        Assumption("kept share", 0.5, "of the decoded images", ASSUMED, "a guess; score and select a sample"),
        Assumption("tiles per kept image", per_image, "tiles", ASSUMED, why),
        Assumption("image bytes", BYTES_PER_PIXEL[encoding] * tile_pixels(corpus), "bytes", ASSUMED,
                   f"{BYTES_PER_PIXEL[encoding]:g} bytes a pixel as {encoding}; {PHOTOGRAPHS}"),
        Assumption("provenance bytes", 1200, "bytes", ASSUMED, "KEY.json with every score"),
        Assumption("caption tokens", 200, "tokens", ASSUMED, "a long description; say --caption-tokens N"),
        Assumption("bytes per caption token", 4, "bytes", ASSUMED, "English"),
        Assumption("original bytes", 1e6, "bytes", ASSUMED, "of an image that is fetched"),
        Assumption("efficiency", EFFICIENCY, "of the ideal rate", ASSUMED, "plan twice the ideal time"),
        Assumption("cores per GPU", 1, "cores", ASSUMED, "decode and resize for it"),
    )
    tables = (Assumption(f"bytes per row of {name}", value, "bytes", ASSUMED, "made-up rows in parts of 1000")
              for name, value in BYTES_PER_ROW.items())
    return {each.name: each for each in (*found, *tables)}
