"""The command of this room: `clearshard restore`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from degrade.strict import ConfigError
from pipeline.commands import DryRun, console, errors, interruptible, reported
from pipeline.decode import Limits
from pipeline.stages import duration

CaptionFrom = StrEnum("CaptionFrom", ["auto", "file", "none"])
Level = StrEnum("Level", ["low", "balanced", "fast"])

Inputs = Annotated[list[Path], typer.Argument(metavar="INPUT…", help="Images, or folders of them with subfolders.")]
Model = Annotated[Path, typer.Option("--model", help="A SUPIR folder: imported, trained, or tiny.")]
Out = Annotated[Path, typer.Option("--out", help="Folder of the results: NAME.png, NAME.json, restored.html.")]
Scale = Annotated[float, typer.Option("--scale", min=0.1, max=16, help="How much larger the result is.")]
PresetName = Annotated[str, typer.Option("--preset", help="paper, quality, fidelity or lightning.")]
Prompt = Annotated[str | None, typer.Option("--prompt", help="What is to be seen, for all inputs.")]
Negative = Annotated[str | None, typer.Option("--negative-prompt", help="Instead of the quality words' own.")]
Quality = Annotated[str, typer.Option("--quality-words", help="supir, supir_brief, none, …")]
Caption = Annotated[CaptionFrom, typer.Option("--caption", help="auto: a captioner describes each input; file: "
                                              "NAME.txt beside it; none.")]
CaptionModel = Annotated[str | None, typer.Option("--captioner", help="Folder of a LLaVA, for --caption auto.")]
Tau = Annotated[float | None, typer.Option("--tau", help="Pull towards the first stage; smaller is stronger, 4 is the "
                                           "paper's.")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, max=1000, help="Of sampling; default: the preset's.")]
Tile = Annotated[int | None, typer.Option("--tile", min=256, help="Pixels of a window of sampling; default: the memory "
                                          "level's.")]
Seed = Annotated[int, typer.Option("--seed", help="Of all noise, with the picture's name.")]
Colours = Annotated[str, typer.Option("--colours", help="wavelet, adain or none: colours from the first stage.")]
SizeRule = Annotated[str, typer.Option("--size-rule", help="keep_aspect; released or page: sizes as the authors' "
                                       "programs, which stretch.")]
MemoryLevel = Annotated[Level, typer.Option("--memory", help="How much may lie on the device at once.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the networks: minutes for the first picture of "
                                       "each size, then faster.")]
Like = Annotated[Path | None, typer.Option("--like", help="Settings of an earlier result, from its .json or .png.")]
Released = Annotated[bool, typer.Option("--released-prompt", help="Caption and quality words run together and cut at "
                                        "77 tokens, as released.")]
Short = Annotated[int, typer.Option("--short", min=64, help="Smaller pictures are worked on with a shorter side of so "
                                    "many pixels.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Restore again what is there.")]


def restore(sources: Inputs, model: Model, out: Out, scale: Scale = 2.0, preset: PresetName = "quality",
            prompt: Prompt = None, negative_prompt: Negative = None, quality_words: Quality = "supir",
            caption: Caption = CaptionFrom.none, captioner: CaptionModel = None, tau: Tau = None, steps: Steps = None,
            tile: Tile = None, seed: Seed = 0, colours: Colours = "wavelet", size_rule: SizeRule = "keep_aspect",
            short: Short = 1024, memory: MemoryLevel = Level.balanced, device: Device = "auto",
            compile: Compile = False, like: Like = None, released_prompt: Released = False, dry_run: DryRun = False,
            overwrite: Overwrite = False) -> None:
    """Restore images with SUPIR.

    For example:

    \b
      clearshard restore old.jpg --model supir --out restored --scale 2 --prompt "a harbour at dusk"

    Stop it whenever you like: the same command goes on. Each PNG carries its settings, and --like repeats them exactly.
    """
    interruptible()
    with reported(), _told():
        asked = _asked(like, scale=scale, preset=preset, tau=tau, steps=steps, negative_prompt=negative_prompt,
                       quality=quality_words, tile=tile, seed=seed, colours=colours, size_rule=size_rule,
                       short=short, released_prompt=released_prompt, prompt=prompt)
        run = Run(sources, model, out, asked, caption, captioner, memory.value, device, overwrite, compile)
        run.go(dry_run, like is not None)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """A folder of weights that cannot be used is a mistake of the command's, as any in its settings."""
    from models.checkpoint import CheckpointError
    try:
        yield
    except CheckpointError as error:
        raise ConfigError(str(error)) from None


def _asked(like: Path | None, *, preset: str, tau: float | None, steps: int | None, **plain: Any) -> dict[str, Any]:
    """Everything that decides a result, besides the image and the model."""
    from .presets import choose
    from .restore import settings_like
    if like is not None:
        return settings_like(like)["asked"]
    changes = {name: value for name, value in (("tau", tau), ("steps", steps)) if value is not None}
    return plain | {"preset": choose(preset, changes, "command line").model_dump(mode="json")}


class Run:
    """One command."""

    def __init__(self, sources: list[Path], model: Path, out: Path, asked: dict[str, Any], caption: CaptionFrom,
                 captioner: str | None, level: str, device: str, overwrite: bool,
                 compile: bool) -> None:
        from models.fingerprint import fingerprint
        from models.supir_folder import index_of

        from .memory import Memory
        from .restore import inputs
        if caption is CaptionFrom.auto and captioner is None:
            raise ConfigError("--caption auto needs a captioner: --captioner FOLDER, such as llava-1.5-7b-hf")
        index_of(model)
        self.model, self.out, self.caption, self.captioner = model, out, caption, captioner
        self.memory, self.overwrite, self.compile = Memory.at(level, device), overwrite, compile
        self.sources = list(inputs(sources, out))
        if not self.sources:
            raise ConfigError(f"no images in {', '.join(map(str, sources))}")
        asked = asked | {"tile": asked["tile"] or self.memory.tile, "model": fingerprint(model),
                         "dtype": str(self.memory.dtype).removeprefix("torch.")}
        self.base = asked

    def asked(self, source: Any) -> dict[str, Any]:
        """The settings of one image: its caption, unless a prompt is given, and the name of its noise."""
        from .captions import beside, stored
        prompt = self.base["prompt"]
        if prompt is None and self.caption is CaptionFrom.file:
            prompt = beside(source)
        if prompt is None and self.caption is CaptionFrom.auto:
            place = stored(self.out, source)
            prompt = place.read_text(encoding="utf-8").strip() if place.is_file() else ""
        return self.base | {"prompt": prompt or "", "key": self.base.get("key", source.name)}

    def go(self, dry_run: bool, like: bool) -> None:
        from .restore import is_done
        pending = [source for source in self.sources
                   if self.overwrite or not is_done(self.out, source, self.asked(source))]
        console.print(f"{len(self.sources)} images, {len(pending)} to restore at --memory {self.memory.name} on "
                      f"{self.memory.device}, {self.base['dtype']}", markup=False)
        if dry_run or not pending:
            return
        if self.caption is CaptionFrom.auto and not like:
            from .captions import caption_all
            caption_all(pending, self.out, self.model, self.captioner, self.memory, scale=self.base["scale"],
                        limits=Limits(), say=lambda text: console.print(text, markup=False))
        self._restore(pending)

    def _restore(self, pending: list[Any]) -> None:
        from .memory import peak_gib, stored
        from .page import write_page
        from .presets import Preset
        from .restore import restore as restore_all
        from .supir import SupirPipeline
        expected = self.memory.estimate(*stored(self.model), self.base["short"])
        console.print(f"about {expected:.2g} GiB on {self.memory.device} for a square of {self.base['short']} pixels",
                      markup=False)
        pipeline = SupirPipeline.from_pretrained(self.model, self.memory, compile=self.compile)
        steps = self.base["preset"]["steps"]
        with Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"),
                      TimeRemainingColumn(), console=console, transient=True,
                      disable=not console.is_terminal) as progress:
            task = progress.add_task("restoring", total=len(pending) * steps)

            def one(image: Any, asked: dict[str, Any]) -> Any:
                progress.update(task, description=asked["key"])
                options = {name: asked[name] for name in (
                    "scale", "seed", "key", "quality", "colours", "size_rule", "short", "tile", "released_prompt")}
                return pipeline(image, asked["prompt"], asked["negative_prompt"], preset=Preset(**asked["preset"]),
                                on_step=lambda done: progress.advance(task), **options)

            def told(totals: Any, source: Any) -> None:
                if not console.is_terminal:
                    console.print(f"{source.name}: {totals.done} of {len(pending)} restored, "
                                  f"{totals.seconds / max(1, totals.done):.1f} s each", markup=False)
            totals = restore_all(pending, self.out, one, self.asked, limits=Limits(), overwrite=self.overwrite,
                                 watch=told)
        for name, kind, message in totals.refused:
            errors.print(f"{name}: {kind}: {message}", style="red", markup=False)
        console.print(f"restored {totals.done} images in {duration(totals.seconds)}, peak "
                      f"{peak_gib(self.memory.device):.1f} GiB: {write_page(self.out, self.sources)}", markup=False)
        if totals.refused:
            raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Adds this room's commands."""
    app.command()(restore)
