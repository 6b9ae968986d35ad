"""The page of `clearshard demo`: samples with their captions, both trainings, restored pictures, in one file."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import jinja2

from pipeline.decode import Limits, decode
from pipeline.thumbnails import thumbnail_bytes

from .meters import METRICS

PAGE, SHOWN = "demo.html", 12
RUNS = {"encoder": "The robust encoder", "adaptor": "The adaptor"}


def write(root: Path, begun: str, trained: bool, restored: Sequence[str]) -> Path:
    """Writes `reports/demo.html` of a demo's folder. begun: in words, what training began with; trained: by anyone."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((Path(__file__).parent / "demo.html.j2").read_text(encoding="utf-8"))
    killed = root / "training" / "killed.json"
    page = root / "reports" / PAGE
    page.write_text(template.render(
        begun=begun, trained=trained, counts=counts(root), samples=samples(root),
        runs=[run(root / "training" / name, title) for name, title in RUNS.items()],
        killed=json.loads(killed.read_text()) if killed.is_file() else None,
        pictures=[pictures(root, name) for name in restored]), encoding="utf-8")
    return page


def counts(root: Path) -> dict[str, int]:
    """Samples by group."""
    found: dict[str, int] = {}
    for name, shard in json.loads((root / "shards" / "corpus.json").read_text())["shards"].items():
        group = name.rpartition("-")[0]
        found[group] = found.get(group, 0) + shard["samples"]
    return found


def samples(root: Path) -> list[dict[str, str]]:
    """The first samples of every shard, read as anybody would read them."""
    import webdataset
    found = []
    shards = sorted((root / "shards").glob("*.tar"))
    for shard in shards:
        for sample in islice(webdataset.WebDataset(str(shard), shardshuffle=False), -(-SHOWN // len(shards))):
            image = next(sample[kind] for kind in ("jpg", "png", "webp") if kind in sample)
            found.append({"group": shard.name.rpartition("-")[0], "caption": sample.get("txt", b"").decode(),
                          "image": embedded(thumbnail_bytes(decode(image, Limits())), "jpeg")})
    return found


def run(folder: Path, title: str) -> dict:
    """One training: its loss as the points of a line in a box of 100 by 100, and its last previews."""
    lines = [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    top, last = max(loss for _, loss in losses), losses[-1][0]
    preview = max((folder / "previews").glob("*.png"))
    return {"title": title, "steps": last, "first": losses[0][1], "last": losses[-1][1], "name": folder.name,
            "points": " ".join(f"{100 * step / last:.1f},{100 - 95 * loss / top:.1f}" for step, loss in losses),
            "preview": embedded(preview.read_bytes(), "png")}


def pictures(root: Path, name: str) -> dict[str, str]:
    """A photograph, degraded, and restored."""
    places = {"degraded": root / "degraded" / f"{name}.png", "restored": root / "restored" / f"{name}.png.png",
              "photograph": root / "photographs" / name}
    return {what: embedded(place.read_bytes(), "png") for what, place in places.items()}


def embedded(data: bytes, kind: str) -> str:
    """A picture as the text of an address."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
