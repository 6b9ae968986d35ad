"""A folder of SUPIR in diffusers' layout: `adaptor/`, `robust_encoder/`, and the prior (SDXL), perhaps by reference."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from .checkpoint import CheckpointError
from .fingerprint import fingerprint
from .robust import NAMES, RobustEncoder
from .supir import SupirAdaptor, SupirUNet, prior_config
from .supir_index import INDEX, UNKNOWN, read_index, stored_variant


def prior_part(prior: Path, part: str) -> dict[str, Any]:
    """The configuration of the prior's UNet or autoencoder, as the networks here take it.

    Raises:
        CheckpointError: no folder in diffusers' layout, or no SDXL.
    """
    path = prior / part / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{prior} has no {part}/config.json: it is no SDXL in diffusers' layout") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if part == "unet":
        if config.get("addition_embed_type") != "text_time":
            raise CheckpointError(f"{prior} is no SDXL: its UNet takes no sizes beside the text (cross_attention_dim "
                                  f"{config.get('cross_attention_dim')}); SUPIR's prior is SDXL or a finetune of it")
        with torch.device("meta"):
            return prior_config(UNet2DConditionModel.from_config(config))
    with torch.device("meta"):
        full = AutoencoderKL.from_config(config).config
    return {name: list(value) if isinstance(value := full[name], tuple) else value for name in NAMES}


def write(out: Path, adaptor: SupirAdaptor, robust: RobustEncoder, prior: Path, include_prior: bool = False,
          licence: str = UNKNOWN, variant: str | None = None, max_shard_size: str = "10GB") -> None:
    """A folder that `load` reads; complete once `supir.json` is there, which comes last.

    A prior in the folder, or beside it, is referred to by a relative path, so that all can be moved together; one
    elsewhere by where it is.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / INDEX).unlink(missing_ok=True)
    options = {"variant": variant, "max_shard_size": max_shard_size}
    adaptor.save_pretrained(out / "adaptor", **options)
    robust.save_pretrained(out / "robust_encoder", **options)
    if include_prior:
        shutil.copytree(prior, prior := out / "prior", dirs_exist_ok=True)
    write_index(out, prior, licence)


def write_index(out: Path, prior: Path, licence: str, **described: Any) -> None:
    """`supir.json`, which makes a folder complete. described: further keys, see docs/supir_weights.md."""
    index = {"format": 1, "prior": reference(prior, out), "prior_fingerprint": fingerprint(prior), "licence": licence,
             **described}
    (out / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def reference(prior: Path, out: Path) -> str:
    """How a folder refers to its prior."""
    prior, out = prior.resolve(), out.resolve()
    beside = prior.parent == out.parent or out in prior.parents
    return Path(os.path.relpath(prior, out)).as_posix() if beside else str(prior)


def index_of(folder: Path) -> dict[str, Any]:
    """What `supir.json` says, with the prior's folder found.

    Raises:
        CheckpointError: no such folder, not complete, or the prior is not where it was.
    """
    index = read_index(folder)
    prior = folder / index["prior"]         # which an absolute path replaces
    if not (prior / "unet" / "config.json").is_file():
        raise CheckpointError(f"{folder / INDEX} refers to its prior as {index['prior']!r}, and no SDXL in diffusers' "
                              f"layout is at {prior.resolve()}. Put it there, or write its place into {INDEX}: "
                              "absolute, or relative to the folder")
    return index | {"prior": prior}


def load(folder: str | Path, dtype: torch.dtype | None = None,
         variant: str | None = None) -> tuple[SupirUNet, AutoencoderKL, RobustEncoder]:
    """The guided UNet, the autoencoder and the robust encoder of a folder.

    dtype: float32 without; variant: such as fp16; without, the plain weights, or the one variant that there is.

    Raises:
        CheckpointError: no complete folder, or the prior is not where it was.
    """
    folder = Path(folder)
    prior = index_of(folder)["prior"]

    def part(kind: type, place: Path) -> Any:
        return kind.from_pretrained(place, variant=stored_variant(place, variant),
                                    **({"torch_dtype": dtype} if dtype else {}))
    unet, vae = part(UNet2DConditionModel, prior / "unet"), part(AutoencoderKL, prior / "vae")
    adaptor, robust = part(SupirAdaptor, folder / "adaptor"), part(RobustEncoder, folder / "robust_encoder")
    return SupirUNet(unet, adaptor), vae, robust
