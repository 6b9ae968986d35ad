"""`clearshard models tiny` and `new`, and the group that the other commands of the networks join."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
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
NEW = "Made by `clearshard models new`"
SAY_EVERY = 50              # steps
STOPPED = 130               # exit status after Ctrl-C, as shells have it


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


def is_ours(folder: Path, made: str = MADE) -> bool:
    """Whether this command made the folder, to its end."""
    card = folder / CARD
    return card.is_file() and made in card.read_text(encoding="utf-8")


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


def write_new(folder: Path, seed: int) -> str:
    """Saves the untrained generator of the mini's shapes; returns its card."""
    from . import mini
    mini.build(folder, seed)
    return (f"# A small SDXL, untrained\n\n{NEW} with --seed {seed}. It has SDXL's layout and the shapes of the mini; "
            "autoencoder and UNet have fresh weights and are to be trained, text encoders have random ones and stay as "
            "they are. The autoencoder's scaling_factor is 1 until its training measures one.\n")


WRITERS: dict[Kind, Callable[[Path], str]] = {
    Kind.llava: write_llava, Kind.sdxl: write_sdxl, Kind.supir: write_supir}


def make(name: str, target: Path, force: bool, writer: Callable[[Path], str], made: str = MADE) -> None:
    """One model, unless it is there already. `made`: what its card says if this command wrote it."""
    started = time.perf_counter()
    if target.exists() and not is_ours(target, made) and (not target.is_dir() or any(target.iterdir())):
        raise Refused(f"{target} exists and is none of this command's models; move it, or choose another DIR")
    if is_ours(target, made) and not force:
        console.print(f"{name}: {target} is there already; --force makes it again", markup=False)
        return
    with whole(target) as folder:
        console.print(f"{name}: making it", markup=False)
        card = writer(folder)
        (folder / CARD).write_text(card, encoding="utf-8")
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    console.print(f"{name}: {target}, {size / 1e6:.1f} MB in {time.perf_counter() - started:.0f} s", markup=False)


@contextlib.contextmanager
def stoppable(*mendable: type[Exception], stopped: str = "the same command goes on with what is missing"
              ) -> Iterator[None]:
    """What a user can mend becomes one line and exit status 1; a stop becomes 130 and leaves no half-written folder."""
    def stop(*_: object) -> None:
        raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, stop)
    # The libraries' own progress bars would last a moment and say less than the lines here.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        yield
    except (Refused, OSError, *mendable) as error:
        errors.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        errors.print(f"stopped; {stopped}")
        raise typer.Exit(STOPPED) from None


@models.command()
def tiny(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to put them: DIR/llava, DIR/sdxl and "
                                                "DIR/supir.")],
         only: Annotated[Kind | None, typer.Option("--only", help="Just this one.")] = None,
         force: Annotated[bool, typer.Option("--force", help="Make again what is there.")] = False) -> None:
    """Make tiny models in the standard formats, to try captioning and generation without a download or a GPU.

    The LLaVA is trained, in about half a minute, until it captions ten photographs of scikit-image rightly; the SDXL
    and the SUPIR over it are random. The folder can be moved as a whole.
    """
    kinds = [only] if only else list(Kind)
    if only is Kind.supir and not is_ours(folder / Kind.sdxl.value):
        kinds = [Kind.sdxl, only]           # its prior
    with stoppable():
        for kind in kinds:
            make(kind.value, folder / kind.value, force, WRITERS[kind])
    for kind in kinds:
        for line in USE[kind]:
            console.print("  " + line.format(folder=folder / kind.value), markup=False)


@models.command()
def new(folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make, in diffusers' layout.")],
        seed: Annotated[int, typer.Option("--seed", min=0, help="Of the weights that are drawn.")] = 0,
        force: Annotated[bool, typer.Option("--force", help="Make again what is there.")] = False) -> None:
    """Make an untrained small SDXL to train from: a few million parameters, eight channels of latent.

    Autoencoder and UNet are as PyTorch initialises them; the text encoders are random and meant to stay so.
    """
    with stoppable():
        make("new", folder, force, lambda target: write_new(target, seed), NEW)


def register(app: typer.Typer) -> None:
    """Adds this room's commands."""
    from . import supir_commands
    supir_commands.register(models)
    app.add_typer(models, name="models")
