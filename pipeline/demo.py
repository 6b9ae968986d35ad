"""Demo: a small corpus from the photographs that come with scikit-image."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Annotated

import typer

from .commands import console, run
from .config import NAME, parse
from .storage import Folder

# Its largest pictures measure about a thousand pixels, so tiles are small here. The folder is a messy pile as it
# stands: drawings, scans, thumbnails, arrays and copies lie between the photographs.
CONFIG = """\
# The demo's corpus: small tiles, because the pictures are small.
sources:
  - uri: {photographs}
    group: hq
    licence: see scikit-image's data/README.txt
select:
  min_side: 256
  facts: {{flat_share: {{max: 0.9}}}}
tile: {{size: 256, max_tiles: 3}}
shard: {{samples: 20}}
"""


def demo(folder: Annotated[str, typer.Argument(help="Where to build it.")] = "demo") -> None:
    """Build a small corpus from real photographs, from the files to verified shards, in under three minutes."""
    started = time.perf_counter()
    package = importlib.util.find_spec("skimage")
    if package is None:
        console.print("the demo's photographs come with scikit-image: pip install 'clearshard[demo]'")
        raise typer.Exit(2)
    workspace = Folder.at(folder)
    if not workspace.exists(NAME):
        text = CONFIG.format(photographs=Path(package.origin).parent / "data")
        parse(text)
        workspace.write(NAME, text.encode())
    run(folder)
    console.print(f"\nIn {time.perf_counter() - started:.0f} seconds, from photographs to shards:")
    places = {"shards": "shards", "manifest": "shards/manifest.parquet", "report": "reports/corpus.html"}
    for what, where in places.items():
        console.print(f"  {what:<9} {workspace}/{where}", markup=False)
    console.print(f"Read them with webdataset or tar; check them with: clearshard verify {folder}", markup=False)
