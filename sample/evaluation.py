"""What an evaluation says: means, paired differences, a table for people and a sheet of pictures."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.storage import Folder

from .evaluate import ALONE, PLAIN, RESTORED, ROBUST, SHOWN, TRUTH, UNPULLED, Lines, kept_as
from .measures import interval

NAME = "evaluation"
CELL, TITLE, GAP = 192, 20, 4       # pixels of the sheet
DIGITS = {"ssim": 4, "lpips": 4}    # the others are dB: two


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Which variant is compared with which."""
    pulled = [(name, UNPULLED) for name in names if name.startswith("tau ")]
    return [(ROBUST, PLAIN), (RESTORED, ALONE), *pulled]


def summary(lines: Lines, there: dict[str, str], names: Sequence[str], seed: int) -> dict[str, Any]:
    """Means by variant and measure, and of each pair the mean difference with its 95 % confidence interval.

    there: names of pictures with the hashes of their files, all of them measured in all variants.
    """
    measured = {name: [lines.found[image, content, name] for image, content in there.items()] for name in names}
    kinds = list(measured[names[0]][0]) if there else []
    values = {name: {kind: np.array([row[kind] for row in rows]) for kind in kinds} for name, rows in measured.items()}
    differences = []
    for of, against in pairs(names) if there else []:
        for kind in kinds:
            found = interval(values[of][kind] - values[against][kind], seed, f"{of} - {against}: {kind}")
            differences.append({"of": of, "against": against, "measure": kind, **found._asdict()})
    return {"images": len(there), "measures": kinds, "differences": differences,
            "means": {name: {kind: float(values[name][kind].mean()) for kind in kinds} for name in names}}


def write(out: Folder, lines: Lines, there: dict[str, str], names: Sequence[str], settings: dict[str, Any],
          refused: Sequence[tuple[str, str, str]]) -> None:
    """Writes evaluation.json, .md and .png.

    Raises:
        WorkspaceError: the folder takes no more.
    """
    found = summary(lines, there, names, settings["seed"])
    said = {"format": 1, "settings": settings, **found,
            "refused": [{"image": name, "class": kind, "message": message} for name, kind, message in refused]}
    out.write(f"{NAME}.json", json.dumps(said, indent=1, ensure_ascii=False).encode())
    out.write(f"{NAME}.md", table(said).encode())
    picture = sheet(out, list(there), [TRUTH, *names])
    if picture is not None:
        data = io.BytesIO()
        picture.save(data, "PNG")
        out.write(f"{NAME}.png", data.getvalue())


def table(said: dict[str, Any]) -> str:
    """The Markdown of what evaluation.json says."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["figure"] = figure
    text = (Path(__file__).parent / f"{NAME}.md.j2").read_text(encoding="utf-8")
    return environment.from_string(text).render(**said)


def figure(value: float, kind: str, signed: bool = False) -> str:
    """A number as it is printed."""
    return f"{value:{'+' if signed else ''}.{DIGITS.get(kind, 2)}f}"


def sheet(out: Folder, images: Sequence[str], names: Sequence[str]) -> Image.Image | None:
    """The kept pictures, a row per image and a column per variant: their middles, one to one. None if none is kept."""
    kept = set((out / SHOWN).names())
    rows = [image for image in images if kept_as(image, TRUTH) in kept]
    if not rows:
        return None
    width, height = len(names) * (CELL + GAP), TITLE + len(rows) * (CELL + TITLE + GAP)
    whole, font = Image.new("RGB", (width, height), "white"), ImageFont.load_default(size=14)
    draw = ImageDraw.Draw(whole)
    for column, name in enumerate(names):
        draw.text((column * (CELL + GAP) + 2, 2), name, "black", font)
    for row, image in enumerate(rows):
        top = TITLE + row * (CELL + TITLE + GAP)
        draw.text((2, top + 2), image, "grey", font)
        for column, name in enumerate(names):
            if (file := kept_as(image, name)) in kept:
                whole.paste(_middle((out / SHOWN).read(file)), (column * (CELL + GAP), top + TITLE))
    return whole


def _middle(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = min(CELL, picture.width), min(CELL, picture.height)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))
