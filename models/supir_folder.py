"""A folder of SUPIR in diffusers' layout: `adaptor/`, `robust_encoder/`, and the prior (SDXL), perhaps by reference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open

from .checkpoint import CheckpointError
from .fingerprint import fingerprint
from .robust import NAMES, RobustEncoder
from .supir import SupirAdaptor, SupirUNet, prior_config

INDEX = "supir.json"
LICENCE = ("The weights that the authors of SUPIR published may be used for non-commercial purposes only (SUPIR "
           "software licence, SupPixel, 2024), and its terms name hosting, and training on outputs, as commercial. They "
           "stay under that licence in this folder, whatever the licence of the program that reads them.")
UNKNOWN = "unknown: whoever made the checkpoint decides"



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
          licence: str = UNKNOWN) -> None:
    """A folder that `SupirPipeline.from_pretrained` reads; complete once `supir.json` is there, which comes last."""
    out.mkdir(parents=True, exist_ok=True)
    (out / INDEX).unlink(missing_ok=True)
    adaptor.save_pretrained(out / "adaptor")
    robust.save_pretrained(out / "robust_encoder")
    if include_prior:
        shutil.copytree(prior, out / "prior", dirs_exist_ok=True)
    place = "prior" if include_prior else str(prior.resolve())
    index = {"format": 1, "prior": place, "prior_fingerprint": fingerprint(prior), "licence": licence}
    (out / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def index_of(folder: Path) -> dict[str, Any]:
    """What `supir.json` says, with the prior's folder found.

    Raises:
        CheckpointError: no such folder, not complete, or the prior is not where it was.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {INDEX}: it is no SUPIR folder, or the command that made it was "
                              "stopped. Make one with `clearshard models import-supir`") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / INDEX} is damaged: {error}") from None
    prior = folder / index["prior"] if not Path(index["prior"]).is_absolute() else Path(index["prior"])
    if not (prior / "unet" / "config.json").is_file():
        raise CheckpointError(f"{folder} refers to its prior at {prior}, and no SDXL in diffusers' layout is there; "
                              f"put it there, or name another in {INDEX}")
    return index | {"prior": prior}


def load(folder: Path, dtype: torch.dtype | None = None) -> tuple[SupirUNet, Any, RobustEncoder]:
    """The guided UNet, the autoencoder and the robust encoder of a folder."""
    prior, options = index_of(folder)["prior"], {"torch_dtype": dtype} if dtype else {}
    unet = UNet2DConditionModel.from_pretrained(prior / "unet", **options)
    adaptor = SupirAdaptor.from_pretrained(folder / "adaptor", **options)
    vae = AutoencoderKL.from_pretrained(prior / "vae", **options)
    return SupirUNet(unet, adaptor), vae, RobustEncoder.from_pretrained(folder / "robust_encoder", **options)


def describe(folder: Path) -> dict[str, Any]:
    """What lies in a folder of a model: per part its class, parameters, dtypes and size; fingerprint and licence."""
    parts = {}
    for config in sorted(folder.glob("*/config.json")):
        counted = [_counted(file) for file in sorted(config.parent.glob("*.safetensors"))]
        about = json.loads(config.read_text(encoding="utf-8"))
        parts[config.parent.name] = {
            "class": about.get("_class_name") or ", ".join(about.get("architectures", [])) or "?",
            "parameters": sum(count for count, _ in counted),
            "dtypes": sorted(set().union(*(kinds for _, kinds in counted))),
            "fingerprint": fingerprint(config.parent)}
    index = json.loads((folder / INDEX).read_text(encoding="utf-8")) if (folder / INDEX).is_file() else {}
    return {"parts": parts, "prior": index.get("prior"), "licence": index.get("licence") or _card_licence(folder)}


def _counted(file: Path) -> tuple[int, set[str]]:
    with safe_open(file, "pt") as opened:
        slices = [opened.get_slice(name) for name in opened.keys()]     # noqa: SIM118
        return sum(torch.Size(one.get_shape()).numel() for one in slices), {one.get_dtype() for one in slices}


def _card_licence(folder: Path) -> str:
    """The licence that a model card states in its head, if there is one."""
    for name in ("README.md", "MODEL_CARD.md"):
        if (folder / name).is_file():
            for line in (folder / name).read_text(encoding="utf-8", errors="replace").splitlines()[:40]:
                if line.startswith(("license:", "licence:")):
                    return line.partition(":")[2].strip()
    return UNKNOWN


