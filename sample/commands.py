"""The commands of this room: `clearshard restore` and `clearshard evaluate`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands import DryRun, interruptible, reported

from .run import Run, asked_for, model_of, usable

CaptionFrom = StrEnum("CaptionFrom", ["auto", "file", "none"])
Level = StrEnum("Level", ["low", "balanced", "fast"])

Inputs = Annotated[list[Path], typer.Argument(metavar="INPUT…", help="Images, or folders of them with subfolders.")]
Model = Annotated[Path | None, typer.Option("--model", help="A SUPIR folder: imported, trained, or tiny; default: the "
                                            "small one that comes with the program.")]
Out = Annotated[Path, typer.Option("--out", help="Folder of the results: NAME.png, NAME.json, restored.html.")]
Scale = Annotated[float | None, typer.Option("--scale", min=0.1, max=16, help="How much larger the result is; default: "
                                             "the model's, or 2.")]
PresetName = Annotated[str | None, typer.Option("--preset", help="paper, quality, fidelity or lightning; default: the "
                                                "model's, or quality.")]
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
Short = Annotated[int | None, typer.Option("--short", min=64, help="Smaller pictures are worked on with a shorter side "
                                           "of so many pixels; default: the model's, or 1024.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Restore again what is there.")]


def restore(sources: Inputs, model: Model = None, out: Out = Path("restored"), scale: Scale = None,
            preset: PresetName = None, prompt: Prompt = None, negative_prompt: Negative = None,
            quality_words: Quality = "supir", caption: Caption = CaptionFrom.none, captioner: CaptionModel = None,
            tau: Tau = None, steps: Steps = None, tile: Tile = None, seed: Seed = 0, colours: Colours = "wavelet",
            size_rule: SizeRule = "keep_aspect", short: Short = None, memory: MemoryLevel = Level.balanced,
            device: Device = "auto", compile: Compile = False, like: Like = None, released_prompt: Released = False,
            dry_run: DryRun = False, overwrite: Overwrite = False) -> None:
    """Restore images with SUPIR.

    For example:

    \b
      clearshard restore old.jpg
      clearshard restore old.jpg --model supir --out restored --scale 2 --prompt "a harbour at dusk"

    Stop it whenever you like: the same command goes on. Each PNG carries its settings, and --like repeats them exactly.
    """
    interruptible()
    with reported(), usable():
        folder = model_of(model)
        asked = asked_for(like, folder, preset, tau, steps, scale, short, negative_prompt=negative_prompt,
                          quality=quality_words, tile=tile, seed=seed, colours=colours, size_rule=size_rule,
                          released_prompt=released_prompt, prompt=prompt)
        run = Run(sources, folder, out, asked, caption.value, captioner, memory.value, device, overwrite, compile)
        run.go(dry_run, like is not None)


def register(app: typer.Typer) -> None:
    """Adds this room's commands."""
    from . import evaluate_commands
    app.command()(restore)
    app.command()(evaluate_commands.evaluate)
