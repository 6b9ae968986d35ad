"""What a checkpoint or a folder of a model is: family, parts, parameters, dtypes, hashes, licence."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, CheckpointError, Shape
from .fingerprint import fingerprint
from .supir_index import INDEX, LICENCE, UNKNOWN, read_index, weight_files

SUPIR, SDXL, REFINER, SD1, SD2, LLAVA = "SUPIR", "SDXL", "SDXL refiner", "SD 1.5", "SD 2", "LLaVA"
UNRECOGNISED = "unknown"
SDXL_LICENCE = "SDXL 1.0 itself is under CreativeML OpenRAIL++-M; of a finetune whoever made it decides"
PARTS = {       # of the published layouts, the longest prefix first
    "control copy": "model.control_model.", "connectors": "model.diffusion_model.project_modules.",
    "UNet": "model.diffusion_model.", "robust encoder": "first_stage_model.denoise_encoder.",
    "autoencoder": "first_stage_model.", "text encoder 1": "conditioner.embedders.0.",
    "text encoder 2": "conditioner.embedders.1.", "text encoder": "cond_stage_model.",
    "language model": "language_model.", "vision tower": "vision_tower.", "projector": "multi_modal_projector."}
UNET = "model.diffusion_model."
WIDTHS = {768: SD1, 1024: SD2, 1280: REFINER, 2048: SDXL}       # of the text that the UNet reads


def text_width(shapes: Mapping[str, Shape]) -> int | None:
    """Numbers per token of the text that a published UNet's cross-attention reads."""
    return next((shape[1] for name, shape in shapes.items()
                 if name.startswith(UNET) and name.endswith(".attn2.to_k.weight")), None)


def family(shapes: Mapping[str, Shape]) -> str:
    """The family of a checkpoint in a published layout, by the names and shapes of its tensors."""
    def has(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in shapes)
    if has("model.control_model."):
        return SUPIR
    if has(f"{UNET}input_blocks."):
        if has(f"{UNET}label_emb."):
            return REFINER if has("conditioner.embedders.0.model.") else SDXL
        width = text_width(shapes)
        return SD2 if has("cond_stage_model.model.") else SD1 if has("cond_stage_model.") else \
            WIDTHS.get(width or 0, UNRECOGNISED)
    return LLAVA if has("multi_modal_projector.", "model.multi_modal_projector.") else UNRECOGNISED


def describe(path: Path) -> dict[str, Any]:
    """What lies in a folder of a model, or in a checkpoint file.

    `family`; `parts`: per part its class, parameters, dtypes and hash; `licence`; of a folder of SUPIR also `prior`
    and whether it changed since.

    Raises:
        CheckpointError: nothing there that is a model.
    """
    return describe_folder(path) if path.is_dir() else describe_file(path)


def describe_file(path: Path) -> dict[str, Any]:
    source = Checkpoint(path)
    parts: dict[str, list[str]] = {}
    for name in source:
        part = next((part for part, prefix in PARTS.items() if name.startswith(prefix)), "others")
        parts.setdefault(part, []).append(name)
    found, notes = family(source.shapes), {SUPIR: LICENCE, SDXL: SDXL_LICENCE}
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"family": f"{found} v0 layout" if found == SUPIR else found,
            "parts": {part: {"class": "tensors", "tensors": len(names), **_counted(source, names)}
                      for part, names in parts.items()},
            "sha256": digest, "bytes": path.stat().st_size,
            "licence": source.metadata.get("licence") or notes.get(found, UNKNOWN)}


def describe_folder(folder: Path) -> dict[str, Any]:
    configs = [*sorted(folder.glob("*/config.json")), *folder.glob("config.json")]
    if not configs and not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder} is no folder of a model: neither {INDEX}, nor a config.json in it or below")
    parts = {}
    for config in configs:
        about = json.loads(config.read_text(encoding="utf-8"))
        parts["." if config.parent == folder else config.parent.name] = {
            "class": about.get("_class_name") or ", ".join(about.get("architectures") or []) or "?",
            **_stored(config.parent), "fingerprint": fingerprint(config.parent)}
    about = {"family": folder_family(folder), "parts": parts}
    if not (folder / INDEX).is_file():
        return about | {"licence": _card_licence(folder) or (SDXL_LICENCE if about["family"] == SDXL else UNKNOWN)}
    index = read_index(folder)
    prior = folder / index["prior"]
    there = (prior / "unet" / "config.json").is_file()
    return about | {"prior": index["prior"], "prior_there": there, "licence": index.get("licence", UNKNOWN),
                    "prior_changed": there and fingerprint(prior) != index.get("prior_fingerprint")}


def folder_family(folder: Path) -> str:
    """The family of a folder: ours, diffusers' (a pipeline, or its UNet alone) or transformers'."""
    if (folder / INDEX).is_file():
        return SUPIR
    for place in (folder / "unet" / "config.json", folder / "config.json"):
        about = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
        if str(about.get("model_type", "")).startswith("llava"):
            return LLAVA
        if about.get("_class_name") in ("SupirAdaptor", "RobustEncoder"):
            return SUPIR
        if about.get("_class_name") == "UNet2DConditionModel":
            if about.get("addition_embed_type") == "text_time":
                return REFINER if about.get("cross_attention_dim") == 1280 else SDXL
            return WIDTHS.get(about.get("cross_attention_dim"), UNRECOGNISED)
    return UNRECOGNISED


def _counted(source: Checkpoint, names: Iterable[str]) -> dict[str, Any]:
    names = list(names)
    return {"parameters": sum(math.prod(source.shapes[name]) for name in names),
            "dtypes": sorted({str(source.dtypes[name]).removeprefix("torch.") for name in names})}


def _stored(folder: Path) -> dict[str, Any]:
    """Parameters and dtypes of a part; a variant beside the plain weights is named and not counted again."""
    files = weight_files(folder)
    sources = [Checkpoint(path) for path in files.get("", next(iter(files.values()), []))]
    counted = [_counted(source, source) for source in sources]
    found = {"parameters": sum(one["parameters"] for one in counted),
             "dtypes": sorted({dtype for one in counted for dtype in one["dtypes"]})}
    return found | ({"variants": sorted(filter(None, files))} if any(files) else {})


def _card_licence(folder: Path) -> str | None:
    """The licence that a model card states in its head, if there is one."""
    for name in ("README.md", "MODEL_CARD.md"):
        if (folder / name).is_file():
            for line in (folder / name).read_text(encoding="utf-8", errors="replace").splitlines()[:40]:
                if line.startswith(("license:", "licence:")):
                    return line.partition(":")[2].strip()
    return None
