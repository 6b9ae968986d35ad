"""`clearshard evaluate`: a SUPIR measured on pictures whose truth is known."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from degrade.strict import ConfigError
from pipeline.cluster import Totals
from pipeline.commands import Limit, Terminal, console, errors, interruptible, reported
from pipeline.stages import duration
from pipeline.storage import Folder

from .commands import Colours, Device, Level, MemoryLevel, PresetName, Quality, Steps, Tile
from .run import usable

if TYPE_CHECKING:
    from .evaluate import Batches, Measures

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A SUPIR folder: imported, trained, or tiny.")]
Images = Annotated[list[Path], typer.Argument(metavar="IMAGES…", help="Good pictures, or folders of them.")]
Out = Annotated[Path, typer.Option("--out", help="Folder of evaluation.json, .md and .png: new, or an earlier run's.")]
Recipe = Annotated[str, typer.Option("--recipe", metavar="NAME|FILE", help="How they are degraded; see clearshard "
                                     "recipe list.")]
Seed = Annotated[int, typer.Option("--seed", help="Of degradation, noise and resampling, with the pictures' names.")]
Taus = Annotated[list[float] | None, typer.Option("--tau", min=0, help="Also with this pull towards the first stage; 0 "
                                                  "is none. May be given several times.")]
Metrics = Annotated[list[str] | None, typer.Option("--metric", help="Also a full-reference metric of pyiqa, such as "
                                                   "lpips. May be given several times.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Pictures of one size that are sampled together.")]
Shown = Annotated[int, typer.Option("--shown", min=0, help="So many pictures are kept, and shown on the sheet.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say how much is pending.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the evaluation that OUT holds.")]


def evaluate(model: Model, images: Images, out: Out, recipe: Recipe = "supir", seed: Seed = 0,
             preset: PresetName = None, steps: Steps = None, tau: Taus = None, quality_words: Quality = "supir",
             colours: Colours = "wavelet", metric: Metrics = None, batch: Batch = 8, tile: Tile = None,
             memory: MemoryLevel = Level.balanced, device: Device = "auto", shown: Shown = 6, limit: Limit = None,
             dry_run: DryRun = False, overwrite: Overwrite = False) -> None:
    """Measure what each part of a SUPIR does to degraded pictures.

    Good pictures are degraded, always in the same way, and brought back by the plain encoder, the robust one, the whole
    model, the model without control, and with every --tau. For example:

    \b
      clearshard evaluate supir photos --out evaluation --tau 0 --tau 4 --tau 1

    Stop it whenever you like: the same command goes on.
    """
    interruptible()
    with reported(), usable():
        asked = Asked(model, images, out, recipe, seed, preset, steps, tau or [], quality_words, colours, metric or [],
                      tile, memory.value, device, limit, overwrite and not dry_run)
        asked.go(batch, shown, dry_run)


class Asked:
    """One command."""

    def __init__(self, model: Path, images: Sequence[Path], out: Path, recipe: str, seed: int, preset: str | None,
                 steps: int | None, taus: Sequence[float], quality: str, colours: str, metrics: Sequence[str],
                 tile: int | None, level: str, device: str, limit: int | None, overwrite: bool) -> None:
        from caption.prompts import load_quality
        from degrade import SecondOrderDegrader
        from models.fingerprint import fingerprint

        from .evaluate import variants
        from .memory import Memory
        from .model import preset_of
        from .restore import inputs
        chosen = preset_of(model, preset, {"steps": steps} if steps else {})
        self.model, self.out, self.memory = model, Folder.at(str(out)), Memory.at(level, device)
        self.degrader, self.wanted = SecondOrderDegrader(recipe, seed), variants(chosen, taus)
        self.sources = sorted(inputs(images, out), key=lambda source: source.name)[:limit]
        if not self.sources:
            raise ConfigError(f"no images in {', '.join(map(str, images))}")
        load_quality(quality)
        if colours not in ("wavelet", "adain", "none"):
            raise ConfigError(f"--colours {colours!r}: there are wavelet, adain and none")
        if self.out.local is None:
            raise ConfigError(f"--out {out}: only a local folder can be appended to")
        self.path, self.tile = Path(self.out.local), tile or self.memory.tile
        self.measures = measures(metrics, str(self.memory.device))
        if overwrite:
            clear(self.path)
        self.settings: dict[str, Any] = {
            "model": fingerprint(model), "recipe": self.degrader.recipe.name, "seed": seed, "tile": self.tile,
            "steps_of_recipe": self.degrader.recipe.to_yaml(), "preset": chosen.model_dump(mode="json"),
            "quality_words": quality, "colours": colours, "measures": list(self.measures),
            "dtype": str(self.memory.dtype).removeprefix("torch.")}

    def go(self, batch: int, shown: int, dry_run: bool) -> None:
        from .evaluate import LINES, Batches, Lines, check_same
        check_same(self.out, self.settings, write=not dry_run)
        batches = Batches(self.sources, Lines(self.path / LINES), list(self.wanted), batch)
        pending = batches.pending()
        console.print(f"{len(self.sources)} pictures in {len(self.wanted)} variants, {pending} of "
                      f"{len(self.sources) * len(self.wanted)} to make and measure on {self.memory.device}, "
                      f"{self.settings['preset']['steps']} steps of sampling", markup=False)
        if dry_run:
            return
        seconds = self._measure(batches, pending, [source.name for source in self.sources[:shown]])
        for name, kind, message in batches.refused:
            errors.print(f"{name}: {kind}: {message}", style="red", markup=False)
        from .evaluation import write
        write(self.out, batches.lines, batches.there, list(self.wanted), {"folder": str(self.model)} | self.settings,
              batches.refused)
        console.print(f"{len(batches.there)} pictures measured in {duration(seconds)}: {self.path / 'evaluation.md'}",
                      markup=False)
        if batches.refused:
            raise typer.Exit(1)

    def _measure(self, batches: Batches, pending: int, shown: list[str]) -> float:
        from .evaluate import Maker, evaluate
        from .supir import SupirPipeline
        bars, totals, started = Bars(), Totals(), time.perf_counter()
        pipeline = SupirPipeline.from_pretrained(self.model, self.memory) if pending else None
        make = pipeline and Maker(pipeline, self.degrader, self.settings["quality_words"], self.settings["colours"],
                                  self.tile)

        def watch(count: int) -> None:
            totals.rows += count
            totals.seconds = time.perf_counter() - started
            bars.advance(totals)
        bars.begin(SimpleNamespace(name="evaluate"), pending)
        try:
            evaluate(batches, make, self.wanted, self.measures, self.out, shown, watch)
        finally:
            bars.end()
        return time.perf_counter() - started


def clear(folder: Path) -> None:
    """Deletes an evaluation, and nothing else that lies beside it."""
    from .evaluate import LINES, SETTINGS, SHOWN
    for name in (LINES, SETTINGS):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / SHOWN, ignore_errors=True)


class Bars(Terminal):
    """Those of the corpus, without Ray."""

    waiting = "first batch"


def measures(metrics: Sequence[str], device: str) -> Measures:
    """The three that need nothing, and those of pyiqa.

    Raises:
        ConfigError: pyiqa or the weights of a metric are not here.
    """
    from pipeline.metrics import MetricUnavailable, full_reference

    from .measures import MEASURES
    try:
        return MEASURES | {name: full_reference(name, device) for name in metrics}
    except MetricUnavailable as error:
        raise ConfigError(f"--metric: {error}") from None
