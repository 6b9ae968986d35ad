"""The contact sheet of `clearshard degrade`: originals beside their low-quality partners, and what was done to them."""

from __future__ import annotations

import base64
import heapq
import json
from pathlib import Path

import jinja2
import numpy as np
import simplejpeg
import yaml

from .decode import decode
from .degraded_image import Found, Maker
from .jobs import error_class
from .storage import Folder
from .tables import digest

PAGE = "contact-sheet.html"
SHOWN = 48
SIDE = 256              # pixels of the part of an original that is shown


class Chosen:
    """The sample of images that is shown: those with the smallest hashes of their keys, whatever the order."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, str, Found]] = []

    def offer(self, found: Found) -> None:
        entry = -int(digest(found.key), 16), found.key, found
        if len(self._heap) < SHOWN:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)

    def sorted(self) -> list[Found]:
        return [found for _, _, found in sorted(self._heap, key=lambda entry: entry[1])]


def write_sheet(maker: Maker, chosen: list[Found], images: int, refused: int) -> str:
    """Writes the page into the output folder; returns where it is."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((Path(__file__).parent / "degraded.html.j2").read_text())
    recipe = yaml.safe_load(maker.settings.recipe)
    text = template.render(recipe=recipe, settings=maker.settings, folder=str(Path(maker.images).absolute()),
                           images=images, refused=refused, samples=[_sample(maker, found) for found in chosen])
    Folder.at(maker.output).write(PAGE, text.encode("utf-8", "replace"))
    return str(Path(maker.output) / PAGE)


def _sample(maker: Maker, found: Found) -> dict:
    from degrade.words import words
    sample = {"name": found.key, "size": "", "hq": None, "lq": None, "words": [], "problem": None}
    try:
        lq = decode(Path(maker.picture(found)).read_bytes())
        parameters = json.loads(Path(maker.parameters(found)).read_text())
        hq = maker.original(found)
        (hq_part, lq_part), (height, width) = centres(hq, lq), hq.shape[:2]
        return sample | {"size": f"{width} × {height} to {lq.shape[1]} × {lq.shape[0]}", "hq": _jpeg(hq_part),
                         "lq": _jpeg(lq_part), "words": words(parameters)}
    except Exception as error:      # the page must come out whatever became of the files
        return sample | {"problem": error_class(error)}


def centres(hq: np.ndarray, lq: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same square from the middle of both, in their own pixels."""
    ratio = hq.shape[0] / lq.shape[0]
    side = max(1, int(min(SIDE, *hq.shape[:2]) / ratio))
    parts = []
    for image, scale in ((hq, ratio), (lq, 1.0)):
        top, left = ((length - side) // 2 for length in lq.shape[:2])
        rows, columns = (slice(round(start * scale), round((start + side) * scale)) for start in (top, left))
        parts.append(np.ascontiguousarray(image[rows, columns]))
    return parts[0], parts[1]


def _jpeg(image: np.ndarray) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(simplejpeg.encode_jpeg(image, 92, "RGB", "444")).decode()
