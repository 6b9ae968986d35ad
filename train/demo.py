"""`clearshard demo`: the whole path on scikit-image's photographs, from a messy pile of files to restored pictures."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands import console, reported
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
RUN = """\
# A minute of training for the demo; configs/ has runs that are meant.
task: {task}
data: {{corpus: [{corpus}], crop: 128, recipe: supir, workers: 0}}
out: {out}
images: {images}
batch: 4
log_every: 5
optimizer: {{rate: {rate}, warmup: 40}}
ema: {{half_life: 100}}
checkpoints: {{every: {every}}}
validation: {{every: {images}, images: 4, previews: 3}}
"""
RESTORED = ("chelsea.png", "coffee.png")
LOOK_S = 0.05


@dataclass(frozen=True)
class Start:
    """What training begins with: the SUPIR that comes with the program, or the toy."""

    what: str
    prior: Path
    images: int                     # of each training
    rate: float
    steps: int                      # of sampling
    trained: bool = False
    task: dict = field(default_factory=dict)            # keys of both tasks
    adaptor: dict = field(default_factory=dict)         # and of the second one


def start(models: Path) -> Start:
    """Imports here, because these load torch, and `clearshard --help` loads this file."""
    from models.supir_index import INDEX, read_index
    from sample.model import EMBEDDED, recommended
    if (EMBEDDED / INDEX).is_file():
        prior = EMBEDDED / read_index(EMBEDDED)["prior"]
        described = recommended(EMBEDDED).model_dump(exclude_none=True)
        return Start("the small SUPIR of this program", prior, 160, 1e-6, 16, True, {"start": str(EMBEDDED)},
                     {"described": described | {"about": "the small SUPIR of this program, trained on in its demo"}})
    return Start("a toy of random weights", models / "sdxl", 400, 1e-3, 4)


def command(run: Callable[[str], None]) -> Callable[..., None]:
    """`clearshard demo`; `run` is `clearshard run`."""
    def demo(folder: Annotated[str, typer.Argument(help="Where to build it.")] = "demo") -> None:
        """Go the whole path in about four minutes: photographs, captioned shards, training, restored pictures.

        One page shows all of it. The training is killed on the way, and goes on.
        """
        started = time.perf_counter()
        package = importlib.util.find_spec("skimage")
        if package is None:
            console.print("the demo's photographs come with scikit-image: pip install 'clearshard[demo]'")
            raise typer.Exit(2)
        with reported():
            photographs, root = Path(package.origin).parent / "data", Path(Folder.at(folder).local)
            corpus(root, photographs, run)
            begun = start(root / "models")
            train(root, begun)
            restore(root, photographs, begun)
            from .demo_page import write
            page = write(root, begun.what, begun.trained, RESTORED)
        console.print(f"\nIn {time.perf_counter() - started:.0f} seconds, from photographs to restored pictures:")
        places = {"page": page, "corpus": root / "shards", "training": root / "training", "pictures": root / "restored"}
        for what, where in places.items():
            console.print(f"  {what:<9} {where}", markup=False)
    return demo


def corpus(root: Path, photographs: Path, run: Callable[[str], None]) -> None:
    """Captioned shards."""
    head("from photographs to captioned shards")
    _clearshard("models", "tiny", root / "models")
    workspace = Folder.at(str(root))
    if not workspace.exists(NAME):
        text = CONFIG.format(photographs=photographs, models=root / "models")
        parse(text)
        workspace.write(NAME, text.encode())
    run(str(root))


def train(root: Path, begun: Start) -> None:
    """The robust encoder, killed once; then the adaptor."""
    folder = root / "training"
    folder.mkdir(exist_ok=True)
    tasks = {"encoder": {"name": "supir.encoder"},
             "adaptor": {"name": "supir.adaptor", "encoder": str(folder / "encoder"), "preview_steps": begun.steps,
                         **begun.adaptor}}
    for name, task in tasks.items():
        task = {**task, "prior": str(begun.prior), **begun.task}
        text = RUN.format(task=json.dumps(task), corpus=json.dumps(str(root)), out=json.dumps(str(folder / name)),
                          images=begun.images, rate=begun.rate, every=begun.images // 4)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    head(f"training of the robust encoder, from {begun.what}")
    killed(folder)
    _clearshard("train", folder / "encoder.yaml")
    head("training of the adaptor")
    _clearshard("train", folder / "adaptor.yaml")


def killed(folder: Path) -> None:
    """Trains the encoder until its first checkpoint, and kills it there; not where there is one already.

    Raises:
        typer.Exit: it failed by itself, and has said why.
    """
    def saved() -> list[str]:
        return [path.parent.name for path in (folder / "encoder" / "checkpoints").glob("step-*[0-9]/state.json")]
    if saved():
        return
    process = subprocess.Popen(words("train", folder / "encoder.yaml"))
    try:
        while process.poll() is None and not saved():
            time.sleep(LOOK_S)
    except BaseException:
        process.terminate()         # it saves first
        raise
    if process.poll() is None:
        process.kill()
        process.wait()
        (folder / "killed.json").write_text(json.dumps({"checkpoint": int(max(saved()).rpartition("-")[2])}))
        console.print("\nkilled with SIGKILL, in the middle of its work; the same command once more:\n")
    elif process.returncode:
        raise typer.Exit(process.returncode)


def restore(root: Path, photographs: Path, begun: Start) -> None:
    """Two of the photographs, degraded to half their size and brought back."""
    head("two photographs degraded and restored")
    (root / "photographs").mkdir(exist_ok=True)
    for name in RESTORED:
        shutil.copy(photographs / name, root / "photographs" / name)
    _clearshard("degrade", root / "photographs", root / "degraded", "--recipe", "realesrgan_x2")
    degraded = [root / "degraded" / f"{name}.png" for name in RESTORED]
    _clearshard("restore", *degraded, "--model", root / "training" / "adaptor" / "model", "--out", root / "restored",
                "--scale", 2, "--short", 256, "--steps", begun.steps)


def head(text: str) -> None:
    console.print(f"\n{text[0].upper()}{text[1:]}\n", style="bold", markup=False)


def words(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from clearshard import app; app()", *map(str, arguments)]


def _clearshard(*arguments: object) -> None:
    """A command in a process of its own: this one stays small, because it drives the cluster.

    Raises:
        typer.Exit: it failed, and has said why.
    """
    done = subprocess.run(words(*arguments))
    if done.returncode:
        raise typer.Exit(done.returncode)
