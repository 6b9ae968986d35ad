"""The commands of the degrader: `clearshard degrade`, `clearshard recipe list` and `clearshard recipe show`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from .commands import DryRun, Terminal, console, errors, interruptible, reported
from .config import ConfigError
from .degraded import REFUSED, FolderJob, Result
from .degraded_image import Maker, Settings
from .degraded_workers import prepared
from .stages import duration
from .storage import Folder

recipe = typer.Typer(help="The degradation recipes: which there are, and what is in one.", no_args_is_help=True,
                     rich_markup_mode=None)

Images = Annotated[str, typer.Argument(metavar="IN", help="Folder of images, with its subfolders; or one image.")]
Output = Annotated[str, typer.Argument(metavar="OUT", help="Folder for the results: new, or an earlier run's.")]
RecipeName = Annotated[str, typer.Option("--recipe", metavar="NAME|FILE", help="A preset or a YAML file; see "
                                         "clearshard recipe list.")]
Seed = Annotated[int, typer.Option("--seed", help="Of all draws; another one degrades every image otherwise.")]
Epoch = Annotated[int, typer.Option("--epoch", help="What training uses to degrade an image otherwise each time.")]
Compat = Annotated[bool, typer.Option("--compat", help="The arithmetic of basicsr 1.4.2, its defects included.")]
Sheet = Annotated[bool, typer.Option("--contact-sheet", help="Also write contact-sheet.html: 48 originals beside "
                                     "their results, with what was done to each.")]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Processes to use; default: one per core.")]
Crop = Annotated[bool, typer.Option("--crop-to-multiple/--no-crop", help="First cut right and bottom so that sides "
                                    "are multiples of the recipe's scale, if the results are smaller.")]
MaxPixels = Annotated[int, typer.Option("--max-pixels", min=256, help="Larger images are refused; a pixel may take "
                                        "200 bytes of memory.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete what other settings made in OUT.")]


class Bars(Terminal):
    """Those of the corpus, without Ray."""

    waiting = "starting workers"


def degrade(images: Images, output: Output, recipe: RecipeName, seed: Seed = 0, epoch: Epoch = 0,
            compat: Compat = False, contact_sheet: Sheet = False, workers: Workers = None, dry_run: DryRun = False,
            crop: Crop = True, max_pixels: MaxPixels = Settings.max_pixels, overwrite: Overwrite = False) -> None:
    """Make the low-quality partner of every image in a folder.

    For example:

    \b
      clearshard degrade photos lq --recipe realesrgan_x4 --contact-sheet

    IN/a/b.jpg becomes OUT/a/b.jpg.png, and OUT/a/b.jpg.json with what was drawn for it. Stop it whenever you like: the
    same command goes on. Images that cannot be degraded are listed at the end and in OUT/refused.jsonl.
    """
    interruptible()
    with reported():
        if not dry_run:
            prepared()          # while this process loads torch, too
        from degrade import SecondOrderDegrader
        degrader = SecondOrderDegrader(recipe, seed, compat="basicsr" if compat else None)    # refuses what cannot be
        settings = Settings(degrader.recipe.to_yaml(), seed, epoch, degrader.compat, crop, max_pixels)
        job = FolderJob(maker(images, output, settings), workers or cores(), contact_sheet,
                        overwrite, Bars())
        if dry_run:
            rehearse(job)
            return
        conclude(job, job.run(" ".join(["clearshard", *sys.argv[1:]])))


def maker(images: str, output: str, settings: Settings) -> Maker:
    """What makes the images of a folder, or the one image."""
    for place in (images, output):
        if Folder.at(place).local is None:
            raise ConfigError(f"{place}: this command reads and writes local folders only; for object stores, make "
                              "shards with clearshard run and degrade in training")
    source, target = (Folder.at(place).local for place in (images, output))
    if os.path.isfile(source):
        return Maker(os.path.dirname(source), target, settings, os.path.basename(source))
    return Maker(source, target, settings)


def cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rehearse(job: FolderJob) -> None:
    done, pending, seconds = job.rehearse()
    text = f"degrade: {pending} images pending, {done} done"
    if seconds is not None:
        total = duration(seconds * pending / job.workers)
        text += f"; {1e3 * seconds:.0f} ms each, so about {total} with {job.workers} workers"
    console.print(text, markup=False)


def conclude(job: FolderJob, result: Result) -> None:
    """Says what was done; exit status 1 if no image has a result."""
    totals = result.totals
    for outcome in result.refused:
        errors.print(f"refused: {outcome.found.key}: {outcome.reason}: {outcome.message}", style="red", markup=False)
    if totals.failed > len(result.refused):
        errors.print(f"and {totals.failed - len(result.refused)} more", style="red")
    made = totals.rows - totals.failed
    text = f"degrade: {made} images in {duration(totals.seconds)} ({made / max(totals.seconds, 1e-9):.1f}/s)"
    if not totals.rows:
        text = "degrade: nothing to do" if result.written else f"degrade: no files in {job.maker.images}"
    if result.done_before:
        text += f", {result.done_before} done before"
    if totals.failed:
        reasons = sorted(totals.errors.items(), key=lambda item: (-item[1], item[0]))
        text += f", {totals.failed} refused ({', '.join(f'{name} {count}' for name, count in reasons)}): "
        text += os.path.join(job.maker.output, REFUSED)
    console.print(text, markup=False)
    if result.sheet:
        console.print(f"contact sheet: {result.sheet}", markup=False)
    raise typer.Exit(0 if result.written else 1)


@recipe.command("list")
def list_recipes() -> None:
    """List the presets: name, size of the result, source. For example: clearshard recipe list"""
    from degrade import load_recipe, presets
    known = [load_recipe(name) for name in presets()]
    width = max(len(preset.name) for preset in known)
    for preset in known:
        size = f"1/{preset.scale} size" if preset.output == "lq" else "same size"
        console.print(f"{preset.name:<{width}}  {size:<9}  {preset.source}", markup=False)


@recipe.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="A preset or a YAML file.")],
                full: Annotated[bool, typer.Option("--full", help="Every range, defaults included.")] = False) -> None:
    """Print a recipe as YAML, to read or to start one of your own: clearshard recipe show supir > mine.yaml"""
    with reported():
        from degrade import load_recipe, presets
        from degrade.recipe import PRESETS
        checked = load_recipe(name)
        path = PRESETS / f"{name}.yaml" if name in presets() else Path(name)
        sys.stdout.write(checked.to_yaml() if full else path.read_text(encoding="utf-8"))


def register(app: typer.Typer) -> None:
    """Adds the degrader's commands."""
    app.command()(degrade)
    app.add_typer(recipe, name="recipe")
