"""The pictures and tables of docs/degradation.md, made anew from the degrader.

    python benchmarks/degradation_page.py [--pictures] [--tables] [--keys 6]

Pictures: every operator on 256 pixels of scikit-image's astronaut (NASA, public domain), by itself, weak and strong.
Tables: the presets; and how far the torch route (on the CPU) is from the CPU route, over six photographs of
scikit-image, 320 pixels each and `--keys` draws of every preset, in grey levels of the 8-bit results. Both tables are
written between their markers in the page. Without an argument both are done, in about three minutes.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from PIL import Image, ImageDraw, ImageFont

from degrade import SecondOrderDegrader, load_recipe, presets
from degrade.keyed import Draws
from degrade.operator import as_bytes
from degrade.recipe import OPERATORS

PAGE = Path(__file__).parent.parent / "docs" / "degradation.md"
SIDE, GAP, LABEL = 256, 6, 22               # pixels
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina")


# Pictures ---------------------------------------------------------------------------------------------------

def kernel(kind: str, size: int = 21, **values: float) -> dict[str, Any]:
    return {"op": "blur", "kernel": {"kind": kind, "size": size} | values}


def resize(mode: str, side: int) -> dict[str, Any]:
    return {"op": "resize", "height": side, "width": side, "mode": mode}


def noise(family: str, grey: bool = False, **values: float) -> dict[str, Any]:
    return {"op": "noise", "family": family, "grey": grey, "field": Draws(0, "page", 0, family).field()} | values


def camera(shot: float, read: float) -> dict[str, Any]:
    return {"op": "camera", "shot": shot, "read": read, "field": Draws(0, "page", 0, "camera").field()}


def jpeg(quality: int, layout: str) -> dict[str, Any]:
    return {"op": "jpeg", "quality": quality, "subsampling": layout}


# Per picture its rows, and per row the weak and the strong step with their captions.
ROWS: dict[str, list[list[tuple[str, dict[str, Any]]]]] = {
    "blur": [
        [("iso, sigma 1", kernel("iso", sigma_x=1)), ("iso, sigma 3", kernel("iso", sigma_x=3))],
        [("aniso, sigma 2.5 and 0.5", kernel("aniso", sigma_x=2.5, sigma_y=0.5, theta=0.6)),
         ("aniso, sigma 5 and 1", kernel("aniso", sigma_x=5, sigma_y=1, theta=0.6))],
        [("generalized_iso, sigma 2, beta 0.5", kernel("generalized_iso", sigma_x=2, beta=0.5)),
         ("generalized_iso, sigma 2, beta 4", kernel("generalized_iso", sigma_x=2, beta=4))],
        [("plateau_iso, sigma 2, beta 2", kernel("plateau_iso", sigma_x=2, beta=2)),
         ("plateau_iso, sigma 2, beta 1", kernel("plateau_iso", sigma_x=2, beta=1))]],
    "sinc_motion": [
        [("sinc, cutoff 0.6 pi", kernel("sinc", cutoff=0.6 * np.pi)),
         ("sinc, cutoff pi/5", kernel("sinc", cutoff=np.pi / 5))],
        [("motion, 7 pixels", kernel("motion", length=7, theta=0.4)),
         ("motion, 17 pixels", kernel("motion", length=17, theta=0.4))]],
    "resize": [[(f"{mode}, x0.5", resize(mode, 128)), (f"{mode}, x0.25", resize(mode, 64))]
               for mode in ("nearest", "area", "bilinear", "bicubic", "lanczos", "bicubic_antialias")],
    "noise": [
        [("gaussian, sigma 10", noise("gaussian", sigma=10)), ("gaussian, sigma 30", noise("gaussian", sigma=30))],
        [("gaussian grey, sigma 10", noise("gaussian", True, sigma=10)),
         ("gaussian grey, sigma 30", noise("gaussian", True, sigma=30))],
        [("shot noise, scale 1", noise("poisson", scale=1)), ("shot noise, scale 3", noise("poisson", scale=3))],
        [("shot noise grey, scale 1", noise("poisson", True, scale=1)),
         ("shot noise grey, scale 3", noise("poisson", True, scale=3))],
        [("camera, shot 0.002, read 0.004", camera(0.002, 0.004)),
         ("camera, shot 0.012, read 0.02", camera(0.012, 0.02))]],
    "compression": [
        *([(f"JPEG 60, {layout}", jpeg(60, layout)), (f"JPEG 20, {layout}", jpeg(20, layout))]
          for layout in ("4:4:4", "4:4:0", "4:2:2", "4:2:0")),
        [("WebP 60", {"op": "webp", "quality": 60}), ("WebP 10", {"op": "webp", "quality": 10})]],
    "sharpen": [
        [("usm, weight 0.5", {"op": "usm", "weight": 0.5, "radius": 50, "threshold": 10}),
         ("usm, weight 1.5", {"op": "usm", "weight": 1.5, "radius": 50, "threshold": 10})],
        [("sharpen, amount 0.8, sigma 1", {"op": "sharpen", "amount": 0.8, "sigma": 1}),
         ("sharpen, amount 2, sigma 2", {"op": "sharpen", "amount": 2, "sigma": 2})]],
}


# What is shown of the photograph: top, left, side. Of compression less, so that its blocks and colours can be seen.
PARTS = {"compression": (330, 120, 128)}
FACE = (10, 110, SIDE)


def applied(image: np.ndarray, step: dict[str, Any] | None) -> Image.Image:
    """The image after one step; smaller ones enlarged so that their pixels can be seen."""
    result = Image.fromarray(as_bytes(OPERATORS[step["op"]].cpu(image, step)) if step else image)
    return result.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def write_pictures(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    font = ImageFont.load_default(13)
    for name, rows in ROWS.items():
        top, left, side = PARTS.get(name, FACE)
        image = np.ascontiguousarray(skimage.data.astronaut()[top:top + side, left:left + side])
        sheet = Image.new("RGB", (3 * SIDE + 2 * GAP, len(rows) * (SIDE + LABEL + GAP) - GAP), "white")
        for number, row in enumerate(rows):
            for column, (text, step) in enumerate([("original", None), *row]):
                left, top = column * (SIDE + GAP), number * (SIDE + LABEL + GAP)
                ImageDraw.Draw(sheet).text((left + 2, top + 3), text, "#1d2430", font)
                sheet.paste(applied(image, step), (left, top + LABEL))
        path = folder / f"{name}.jpg"
        sheet.save(path, quality=80, subsampling="4:4:4", optimize=True)
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


# Tables -----------------------------------------------------------------------------------------------------

def preset_table() -> str:
    lines = ["| preset | order | result | source |", "|---|---|---|---|"]
    for name in presets():
        recipe = load_recipe(name)
        passes = sum(step.op in ("blur", "noise") for step in recipe.steps)
        order = "first" if passes <= 2 else "second"
        if recipe.steps[0].op == "usm":
            order += ", sharpened first"
        if name == "supir_table1":
            order = "one of five"
        size = f"1/{recipe.scale}" if recipe.output == "lq" else "the input's size"
        lines.append(f"| `{name}` | {order} | {size} | {recipe.source} |")
    return "\n".join(lines)


def agreement_table(keys: int) -> str:
    lines = ["| preset | samples alike to the byte | mean | mean of the worst sample | largest |",
             "|---|---|---|---|---|"]
    images = []
    for name in PHOTOGRAPHS:
        image = getattr(skimage.data, name)()
        top, left = ((side - min(320, side)) // 2 for side in image.shape[:2])
        images.append(np.ascontiguousarray(image[top:top + 320, left:left + 320]))
    for name in presets():
        cpu, other = (SecondOrderDegrader(name, route=route) for route in ("cpu", "torch"))
        means, largest = [], 0
        for number, image in enumerate(images):
            batch = torch.from_numpy(np.stack([image.transpose(2, 0, 1)] * keys))
            names = [f"{PHOTOGRAPHS[number]}-{key}" for key in range(keys)]
            difference = (cpu(batch, names)[0].int() - other(batch, names)[0].int()).abs()
            means += difference.float().flatten(1).mean(1).tolist()
            largest = max(largest, int(difference.max()))
        alike = sum(mean == 0 for mean in means)
        lines.append(f"| `{name}` | {alike} of {len(means)} | {np.mean(means):.4f} | {max(means):.4f} | {largest} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def insert(name: str, text: str) -> None:
    """Puts a table between `<!-- NAME -->` and `<!-- end of NAME -->` of the page."""
    page = PAGE.read_text()
    marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}", re.S)
    if not pattern.search(page):
        raise SystemExit(f"{PAGE} has no place {marks[0]} … {marks[1]}")
    PAGE.write_text(pattern.sub(lambda _: f"{marks[0]}\n{text}\n{marks[1]}", page))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", action="store_true")
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--keys", type=int, default=6)
    options = parser.parse_args()
    both = not (options.pictures or options.tables)
    if options.pictures or both:
        write_pictures(PAGE.parent / "degradation")
    if options.tables or both:
        insert("presets", preset_table())
        insert("agreement", agreement_table(options.keys))


if __name__ == "__main__":
    main()
