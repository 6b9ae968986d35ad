"""Demo: a small corpus from scikit-image's photographs, with captions and a few negatives, and two restorations."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands import console
from pipeline.config import NAME, parse
from pipeline.storage import Folder

# Its largest pictures measure about a thousand pixels, so tiles are small here. The folder is a messy pile as it
# stands: drawings, scans, thumbnails, arrays and copies lie between the photographs.
CONFIG = """\
# The demo's corpus: small tiles, because the pictures are small, and toy models, because nothing is downloaded.
sources:
  - uri: {photographs}
    group: hq
    licence: see scikit-image's data/README.txt
select:
  min_side: 256
  facts: {{flat_share: {{max: 0.9}}}}
tile: {{mode: whole, size: 256}}
caption:      # the toy LLaVA knows ten of the photographs by heart; of all others it says one of the ten captions
  transformers: {{model: {models}/llava, batch_size: 8}}
  prompt: {{name: sentence, question: "Describe this image in one sentence.", max_new_tokens: 40, min_words: 4}}
  tokenizer: {models}/sdxl/tokenizer
negatives:    # the toy SDXL has random weights
  model: {models}/sdxl
  count: 12
  size: 256
  steps: 4
  dtype: float32
shard: {{samples: 20}}
"""
RESTORED = ("chelsea.png", "coffee.png")


def command(run: Callable[[str], None]) -> Callable[..., None]:
    """`clearshard demo`, which ends in `clearshard run`."""
    def demo(folder: Annotated[str, typer.Argument(help="Where to build it.")] = "demo") -> None:
        """Build a small corpus from real photographs, from the files to captioned shards, in under three minutes."""
        started = time.perf_counter()
        package = importlib.util.find_spec("skimage")
        if package is None:
            console.print("the demo's photographs come with scikit-image: pip install 'clearshard[demo]'")
            raise typer.Exit(2)
        workspace = Folder.at(folder)
        models = Path(workspace.local) / "models"
        _clearshard("models", "tiny", models)
        if not workspace.exists(NAME):
            text = CONFIG.format(photographs=Path(package.origin).parent / "data", models=models)
            parse(text)
            workspace.write(NAME, text.encode())
        run(folder)
        originals = [Path(package.origin).parent / "data" / name for name in RESTORED]
        restored = Path(workspace.local) / "restored"
        _clearshard("restore", *originals, "--model", models / "supir", "--out", restored, "--scale", 1, "--short", 256,
                    "--steps", 4, "--caption", "auto", "--captioner", models / "llava")
        console.print(f"\nIn {time.perf_counter() - started:.0f} seconds, from photographs to captioned shards:")
        places = {"shards": "shards", "manifest": "shards/manifest.parquet", "report": "reports/corpus.html",
                  "restored": "restored/restored.html, by a toy SUPIR that was never trained"}
        for what, where in places.items():
            console.print(f"  {what:<9} {workspace}/{where}", markup=False)
        console.print(f"Read them with webdataset or tar; check them with: clearshard verify {folder}", markup=False)
    return demo


def _clearshard(*arguments: object) -> None:
    """A command in a process of its own: this one stays small, because it drives the cluster.

    Raises:
        typer.Exit: it failed, and has said why.
    """
    program = "from clearshard import app; app()"
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)])
    if done.returncode:
        raise typer.Exit(done.returncode)
