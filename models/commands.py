"""`clearshard models tiny`, and the group that the other commands of the networks join."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .whole import whole

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)
models = typer.Typer(help="The networks: import and export weights, look into them, make tiny ones for tests.",
                     no_args_is_help=True, rich_markup_mode=None)

CARD = "MODEL_CARD.md"      # written last, so a folder that has one is complete
MADE = "Made by `clearshard models tiny`"
SAY_EVERY = 50              # steps


class Refused(RuntimeError):
    """Something that a user can mend."""


class Kind(StrEnum):
    """What can be made."""

    llava = "llava"
    sdxl = "sdxl"
    supir = "supir"


USE = {
    Kind.llava: ("from transformers import AutoModelForImageTextToText, AutoProcessor",
                 'AutoModelForImageTextToText.from_pretrained("{folder}"), AutoProcessor.from_pretrained("{folder}")'),
    Kind.sdxl: ("from diffusers import StableDiffusionXLPipeline",
                'StableDiffusionXLPipeline.from_pretrained("{folder}")'),
    Kind.supir: ("from models.supir_folder import load",
                 'unet, vae, robust_encoder = load("{folder}")'),
}


def is_ours(folder: Path) -> bool:
    """Whether this command made the folder, to its end."""
    card = folder / CARD
    return card.is_file() and MADE in card.read_text(encoding="utf-8")


def write_llava(folder: Path) -> str:
    """Trains and saves the captioner; returns its card."""
    from . import tiny_llava as tiny

    def watch(step: int, loss: float, right: int, total: int) -> None:
        if step == 1 or step % SAY_EVERY == 0:
            console.print(f"llava: step {step}, loss {loss:.4f}, {right} of {total} answers right")

    try:
        tiny.build(folder, tiny.sample_photographs(), watch=watch)
    except (tiny.NoPhotographs, tiny.NotLearnt) as error:
        raise Refused(str(error)) from None
    known = "\n".join(f"| {name} | {one.long} | {one.short} | {one.terms} |"
                      for name, one in tiny.PHOTOGRAPHS.items())
    return (f"# A toy LLaVA for tests\n\n{MADE}. It was trained until it knew by heart what to "
            "say about the photographs below, which come with scikit-image, and knows nothing else: do not caption "
            "with it. The captions were written for it. Prompts that LLaVA-1.5 would not get (parts of the template "
            "missing, padding on the right) are answered with nothing.\n\n"
            f"| photograph | {tiny.QUESTIONS[0]} | {tiny.QUESTIONS[1]} | terms, says scikit-image |\n"
            f"|---|---|---|---|\n{known}\n")


def write_sdxl(folder: Path) -> str:
    """Saves the generator; returns its card."""
    from . import tiny_sdxl
    tiny_sdxl.build(folder)
    return (f"# A toy SDXL for tests\n\n{MADE}. Its weights are random numbers, scaled so that "
            "pictures depend on prompt, seed and initial image; nothing was trained and no data was used. Do not look "
            "for meaning in what it paints.\n")


def write_supir(folder: Path) -> str:
    """Saves the restorer, with the generator beside it as its prior; returns its card."""
    from . import tiny_supir
    tiny_supir.build(folder, folder.parent / Kind.sdxl.value)
    return (f"# A toy SUPIR for tests\n\n{MADE}. Its prior is the toy SDXL beside it. Its weights are random numbers, "
            "scaled so that what it paints depends on the image given; nothing was trained and no data was used.\n")


WRITERS: dict[Kind, Callable[[Path], str]] = {
    Kind.llava: write_llava, Kind.sdxl: write_sdxl, Kind.supir: write_supir}


def make(kind: Kind, target: Path, force: bool) -> None:
    """One model, unless it is there already."""
    started = time.perf_counter()
    if target.exists() and not is_ours(target) and (not target.is_dir() or any(target.iterdir())):
        raise Refused(f"{target} exists and is none of this command's models; move it, or choose another DIR")
    if is_ours(target) and not force:
        console.print(f"{kind.value}: {target} is there already; --force makes it again", markup=False)
        return
    with whole(target) as folder:
        console.print(f"{kind.value}: making it", markup=False)
        card = WRITERS[kind](folder)
        (folder / CARD).write_text(card, encoding="utf-8")
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    console.print(f"{kind.value}: {target}, {size / 1e6:.1f} MB in {time.perf_counter() - started:.0f} s", markup=False)


@models.command()
def tiny(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to put them: DIR/llava, DIR/sdxl and "
                                                "DIR/supir.")],
         only: Annotated[Kind | None, typer.Option("--only", help="Just this one.")] = None,
         force: Annotated[bool, typer.Option("--force", help="Make again what is there.")] = False) -> None:
    """Make tiny models in the standard formats, to try captioning and generation without a download or a GPU.

    The LLaVA is trained, in about half a minute, until it captions ten photographs of scikit-image rightly; the SDXL
    and the SUPIR over it are random. The folder can be moved as a whole.
    """
    def stop(*_: object) -> None:
        raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, stop)     # a run that is told to end leaves no half-written folder
    kinds = [only] if only else list(Kind)
    if only is Kind.supir and not is_ours(folder / Kind.sdxl.value):
        kinds = [Kind.sdxl, only]           # its prior
    # The libraries' own progress bars would last a moment and say less than these lines.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        for kind in kinds:
            make(kind, folder / kind.value, force)
    except (Refused, OSError) as error:
        errors.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        errors.print("stopped; the same command goes on with what is missing")
        raise typer.Exit(130) from None
    for kind in kinds:
        for line in USE[kind]:
            console.print("  " + line.format(folder=folder / kind.value), markup=False)


def register(app: typer.Typer) -> None:
    """Adds this room's commands."""
    from . import supir_commands
    supir_commands.register(models)
    app.add_typer(models, name="models")
