"""One `clearshard restore`: what was asked for, what is pending, and its progress on a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from degrade.strict import ConfigError
from pipeline.commands import console, errors
from pipeline.decode import Limits
from pipeline.stages import duration


@contextlib.contextmanager
def usable() -> Iterator[None]:
    """A folder of weights that cannot be used is a mistake of the command's, as any in its settings."""
    from models.checkpoint import CheckpointError
    try:
        yield
    except CheckpointError as error:
        raise ConfigError(str(error)) from None


def model_of(named: Path | None) -> Path:
    """The model's folder; says so where it is the embedded one."""
    from .model import find, introduced
    folder = find(named)
    if named is None:
        console.print(introduced(folder), markup=False)
    return folder


def asked_for(like: Path | None, model: Path, preset: str | None, tau: float | None, steps: int | None,
              scale: float | None, short: int | None, **plain: Any) -> dict[str, Any]:
    """Everything that decides a result, besides the image and the model: the user's, the model's, or the default."""
    from .model import SCALE, SHORT, preset_of, recommended
    from .restore import settings_like
    if like is not None:
        return settings_like(like)["asked"]
    own = recommended(model)
    changes = {name: value for name, value in (("tau", tau), ("steps", steps)) if value is not None}
    return plain | {"preset": preset_of(model, preset, changes).model_dump(mode="json"),
                    "scale": scale or own.scale or SCALE, "short": short or own.short or SHORT}


class Run:
    """One command."""

    def __init__(self, sources: list[Path], model: Path, out: Path, asked: dict[str, Any], caption: str,
                 captioner: str | None, level: str, device: str, overwrite: bool, compile: bool) -> None:
        from models.fingerprint import fingerprint
        from models.supir_folder import index_of

        from .memory import Memory
        from .restore import inputs
        if caption == "auto" and captioner is None:
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
        if prompt is None and self.caption == "file":
            prompt = beside(source)
        if prompt is None and self.caption == "auto":
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
        if self.caption == "auto" and not like:
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
