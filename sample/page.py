"""The page of restored images: before and after under a slider, in one file."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from pathlib import Path

import cv2
import jinja2
import numpy as np
import simplejpeg

from pipeline.decode import Limits, decode

from .restore import Input, outputs

PAGE, SHOWN, SIDE = "restored.html", 60, 1000       # pictures are shown at most so large


def write_page(folder: Path, sources: Iterable[Input]) -> Path:
    """Writes `restored.html` over the results that are there, and returns where it is."""
    there = [source for source in sources if outputs(folder, source)["image"].is_file()]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((Path(__file__).parent / "page.html.j2").read_text(encoding="utf-8"))
    rows = [row for source in there[:SHOWN] if (row := _row(folder, source))]
    (folder / PAGE).write_text(template.render(rows=rows, count=len(there)), encoding="utf-8")
    return folder / PAGE


def _row(folder: Path, source: Input) -> dict | None:
    places = outputs(folder, source)
    try:
        after = decode(places["image"].read_bytes(), Limits())
        before = decode(source.path.read_bytes(), Limits())
        made = json.loads(places["settings"].read_text(encoding="utf-8"))["made"]
    except Exception:       # the page must come out whatever became of a file meanwhile
        return None
    size = f"{before.shape[1]} × {before.shape[0]} to {after.shape[1]} × {after.shape[0]}"
    shape = _shown(after).shape[1::-1]
    return {"name": source.name, "size": size, "prompt": made.get("prompt", ""), "after": _data(_shown(after)),
            "before": _data(cv2.resize(before, shape, interpolation=cv2.INTER_CUBIC))}


def _shown(image: np.ndarray) -> np.ndarray:
    scale = SIDE / max(image.shape[:2])
    if scale >= 1:
        return image
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _data(image: np.ndarray) -> str:
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(image), 88, "RGB", "444")
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
