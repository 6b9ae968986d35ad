"""`clearshard models import-supir`, `export` and `inspect`: weights in, out and described."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .commands import console, stoppable

if TYPE_CHECKING:
    from .supir_files import Imported


class Precision(StrEnum):
    """Kinds of numbers that weights can be written in."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


Dtype = Annotated[Precision | None, typer.Option("--dtype", help="Write the weights in this precision; default: "
                                                 "each as it is.")]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """What a user can mend becomes one line and exit status 1; a stop becomes 130. Nothing half-made stays."""
    from safetensors import SafetensorError

    from .checkpoint import CheckpointError

    with stoppable(CheckpointError, SafetensorError, stopped="nothing half-made is left"):
        yield


def quiet() -> None:
    """The libraries' own bars and remarks would say less than the lines here."""
    import diffusers
    import transformers
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def torch_dtype(precision: Precision | None) -> Any:
    import torch
    return {None: None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def depth_of(given: str | None) -> str | list[int] | None:
    """`released`, `paper`, or numbers: one per level."""
    if given is None or given in ("released", "paper"):
        return given
    try:
        return [int(number) for number in given.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{given!r} is neither released, nor paper, nor numbers such as 1,2,10",
                                 param_hint="--depth") from None


def import_supir(
        checkpoint: Annotated[Path, typer.Option("--checkpoint", metavar="FILE", help="SUPIR's weights: SUPIR-v0Q, "
                                                 "SUPIR-v0F or an export, .ckpt or .safetensors.")],
        base: Annotated[Path, typer.Option("--base", metavar="SDXL", help="SDXL or a finetune: a folder in diffusers' "
                                           "layout, or one .safetensors or .ckpt file.")],
        out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to make.")],
        base_config: Annotated[Path | None, typer.Option(
            "--base-config", metavar="DIR", help="Where --base is one file: SDXL's configuration and tokenizers, a "
            "folder without weights; default: the hub's cache.")] = None,
        depth: Annotated[str | None, typer.Option("--depth", help="Insist on this control copy: released, paper, or "
                                                  "transformer blocks per level such as 1,2,10; default: what the "
                                                  "file holds.")] = None,
        dtype: Dtype = None,
        include_prior: Annotated[bool, typer.Option("--include-prior", help="Copy SDXL into DIR too, instead of "
                                                    "referring to it.")] = False,
        licence: Annotated[str | None, typer.Option("--licence", help="Of the weights, where they are not the "
                                                    "authors'.")] = None,
        force: Annotated[bool, typer.Option("--force", help="Replace a SUPIR folder at DIR.")] = False) -> None:
    """Turn SUPIR's published weights and an SDXL into a folder that everything here reads.

    The authors published two files: v0Q, for quality on heavily damaged images, and v0F, for fidelity to lightly
    damaged ones. Each holds what SUPIR adds; the rest is SDXL, which DIR refers to, or holds where --base is one file.
    A pickled .ckpt is read without running code in it. Every tensor is used, or known and dropped by name; otherwise
    nothing is written.

      hf download stabilityai/stable-diffusion-xl-base-1.0 --local-dir sdxl
      clearshard models import-supir --checkpoint SUPIR-v0Q.ckpt --base sdxl --out supir-v0q
    """
    wanted = depth_of(depth)
    with reported():
        quiet()
        from .supir_files import import_supir
        report = import_supir(checkpoint, base, out, base_config=base_config, depth=wanted, dtype=torch_dtype(dtype),
                              include_prior=include_prior, licence=licence, force=force)
        say_imported(report, out)


def say_imported(report: Imported, out: Path) -> None:
    from .supir_index import read_index
    preset = f"the preset {report.preset}" if report.preset else "no preset"
    console.print(f"{out}: {report.used} tensors; transformer blocks per level of the control copy: "
                  f"{','.join(map(str, report.depth))}, {preset}", markup=False)
    for name, why in report.dropped.items():
        console.print(f"  dropped: {name}, {why}", markup=False)
    if report.from_prior:
        console.print(f"  {len(report.from_prior)} tensors that the checkpoint repeats are from the prior; its copies "
                      f"were not used: {report.from_prior[0]}, …", markup=False)
    console.print(f"Licence: {read_index(out)['licence']}", markup=False)


def export(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A SUPIR folder.")],
           out: Annotated[Path, typer.Argument(metavar="FILE", help="The .safetensors to write.")],
           dtype: Dtype = None,
           variant: Annotated[str | None, typer.Option("--variant", help="Of the weights in DIR, as fp16.")] = None,
           force: Annotated[bool, typer.Option("--force", help="Replace FILE.")] = False) -> None:
    """Write what SUPIR adds to SDXL as one file with the authors' names, for ComfyUI and other programs.

    Importing it again gives the same weights, bit for bit, unless --dtype rounds them.
    """
    with reported():
        from .supir_files import export_supir
        count = export_supir(folder, out, torch_dtype(dtype), variant=variant, force=force)
        console.print(f"{out}: {count} tensors, {out.stat().st_size / 1e6:.1f} MB", markup=False)


def inspect(path: Annotated[Path, typer.Argument(metavar="DIR|FILE", help="A SUPIR folder, a folder of diffusers or "
                                                 "transformers, a .safetensors or a .ckpt.")],
            as_json: Json = False) -> None:
    """Say what a model is: family, parts, parameters, precision, hashes, licence. Weights are not loaded.

    A file's hash is SHA-256, as download pages show it; a folder's are of its content (sizes, headers and ends of
    weights), and change when a file does.
    """
    with reported():
        from .families import describe
        about = describe(path)
    if as_json:
        console.print(json.dumps(about, indent=1, ensure_ascii=False), markup=False)
        return
    console.print(f"{path}: {about['family']}", markup=False)
    for name, part in about["parts"].items():
        known = [part["class"], f"{part['parameters']:,} parameters", *part["dtypes"], part.get("fingerprint")]
        console.print(f"  {name}: " + ", ".join(filter(None, known)), markup=False)
    if "prior" in about:
        state = "as it was" if not about["prior_changed"] else "changed since the import"
        console.print(f"  prior: {about['prior']}, {state if about['prior_there'] else 'not there'}", markup=False)
    if "sha256" in about:
        console.print(f"  SHA-256 {about['sha256']}, {about['bytes']:,} bytes", markup=False)
    console.print(f"Licence: {about['licence']}", markup=False)


def register(models: typer.Typer) -> None:
    models.command("import-supir")(import_supir)
    models.command()(export)
    models.command()(inspect)
