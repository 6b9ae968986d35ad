"""SDXL as one file, as the authors of models publish it, into a folder in diffusers' layout."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from . import families, published
from .checkpoint import Checkpoint, CheckpointError, Shape, listed, shape_differences
from .supir_folder import prior_part
from .whole import whole

REPOSITORY = "stabilityai/stable-diffusion-xl-base-1.0"
FETCH = (f"Where there is a network: hf download {REPOSITORY} --include '*.json' --include '*.txt' --local-dir "
         "sdxl-config, then --base-config sdxl-config (a few MB; no weights)")
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
CONFIGS = ("model_index.json", "scheduler/scheduler_config.json", *(f"{part}/config.json" for part in NETWORKS))
TOKENIZERS = ("tokenizer", "tokenizer_2")
WORDS = (("tokenizer.json",), ("vocab.json", "merges.txt"))      # either of these sets
OPEN_CLIP = {"text_model.embeddings.token_embedding.weight": "token_embedding.weight",
             "text_model.embeddings.position_embedding.weight": "positional_embedding",
             "text_projection.weight": "text_projection"}
OPEN_CLIP_PIECES = (("text_model.final_layer_norm.", "ln_final."), ("layer_norm1.", "ln_1."), ("layer_norm2.", "ln_2."),
                    ("text_model.encoder.layers.", "transformer.resblocks."), ("mlp.fc1.", "mlp.c_fc."),
                    ("mlp.fc2.", "mlp.c_proj."), ("self_attn.out_proj.", "attn.out_proj."))
# What SDXL's files hold beside the networks' weights: buffers, the logarithm of CLIP's temperature, averages.
DROPPED = ("conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
           "conditioner.embedders.1.model.logit_scale", "denoiser.", "model_ema.", "alphas_cumprod", "betas",
           "log_one_minus_alphas_cumprod", "sqrt_", "posterior_")


def lacking(folder: Path, weights: bool) -> list[str]:
    """What a folder in diffusers' layout lacks to be an SDXL."""
    lost = [name for name in CONFIGS if not (folder / name).is_file()]
    lost += [f"{part}/{' and '.join(WORDS[1])}" for part in TOKENIZERS
             if not any(all((folder / part / name).is_file() for name in names) for names in WORDS)]
    if weights:
        lost += [f"{part}/*.safetensors" for part in NETWORKS
                 if not any(file for kind in ("safetensors", "bin") for file in (folder / part).glob(f"*.{kind}"))]
    return lost


def refuse_incomplete(folder: Path) -> None:
    """Raises CheckpointError for a folder that is no SDXL, or that lacks weights, configurations or tokenizers."""
    if (folder / "unet" / "config.json").is_file():
        prior_part(folder, "unet")          # another family's folder says so, rather than what it lacks
    if lost := lacking(folder, weights=True):
        raise CheckpointError(f"{folder} is no whole SDXL in diffusers' layout: it lacks {listed(lost)}. "
                              f"hf download {REPOSITORY} gets all of it")


def config_folder(given: Path | None) -> Path:
    """SDXL's configurations and tokenizers: the given folder, or the hub's cache.

    Raises:
        CheckpointError: neither is there, or something is missing in it; says what to fetch.
    """
    if given is None:
        try:
            given = Path(snapshot_download(REPOSITORY, local_files_only=True))
        except LocalEntryNotFoundError:
            raise CheckpointError("SDXL as one file holds no configuration and no tokenizers, and the hub's cache here "
                                  f"has none of SDXL. {FETCH}") from None
    if lost := lacking(given, weights=False):
        raise CheckpointError(f"{given}, where SDXL's configuration should be, lacks {listed(lost)}. {FETCH}")
    return given


def network_shapes(config: Path) -> dict[str, Shape]:
    """Published names and shapes of SDXL's UNet and autoencoder."""
    with torch.device("meta"):
        unet, vae = (kind.from_config(kind.load_config(config / part)) for kind, part in
                     ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")))
    found = {}
    for model, prefix, modules in ((unet, "model.diffusion_model.", published.unet(prior_part(config, "unet"))),
                                   (vae, "first_stage_model.", published.vae(vae.config))):
        tensors = model.state_dict()
        for own, name in published.names(tensors, published.prefixed(modules, prefix)).items():
            found[name] = tuple(tensors[own].shape)
    return found


def text_shapes(config: Path) -> dict[str, Shape]:
    """Published names and shapes of SDXL's text encoders: one has transformers' names, the other OpenCLIP's."""
    with torch.device("meta"):
        first, second = (kind(CLIPTextConfig.from_pretrained(config / part)) for kind, part in
                         ((CLIPTextModel, "text_encoder"), (CLIPTextModelWithProjection, "text_encoder_2")))
    found: dict[str, Shape] = {}
    for own, tensor in first.state_dict().items():
        own = own if own.startswith("text_model.") else f"text_model.{own}"
        found[f"conditioner.embedders.0.transformer.{own}"] = tuple(tensor.shape)
    for own, tensor in second.state_dict().items():
        name, shape = open_clip_name(own), tuple(tensor.shape)
        if name == "text_projection":
            shape = shape[::-1]
        found[f"conditioner.embedders.1.model.{name}"] = (3 * shape[0], *shape[1:]) if "in_proj" in name else shape
    return {name: shape for name, shape in found.items() if not name.endswith("position_ids")}


def open_clip_name(own: str) -> str:
    if own in OPEN_CLIP:
        return OPEN_CLIP[own]
    for one, other in OPEN_CLIP_PIECES:
        own = own.replace(one, other)
    for letter in "qkv":
        own = own.replace(f"self_attn.{letter}_proj.", "attn.in_proj_")
    return own


def check(file: Path, config: Path | None = None) -> Path:
    """Accounts for every tensor of SDXL as one file, without reading one; returns the folder of its configuration.

    Raises:
        CheckpointError: another family, or tensors that are missing, unknown or of another shape.
    """
    source = Checkpoint(file)
    found, width = families.family(source.shapes), families.text_width(source.shapes)
    if found != families.SDXL:
        says = f"it is {found}'s" if found != families.UNRECOGNISED else f"its first tensors are {listed(source)}"
        says += f", with {width} numbers per token of text" if width else ""
        raise CheckpointError(f"--base {file} is no SDXL: {says}. SUPIR's prior is SDXL 1.0 base or a finetune of it")
    folder = config_folder(config)
    wanted = network_shapes(folder) | text_shapes(folder)
    kinds = {"missing": [name for name in wanted if name not in source],
             "not known": [name for name in source if name not in wanted and not name.startswith(DROPPED)],
             "of another shape": shape_differences(source, wanted)}
    if problems := [f"{len(names)} tensors are {what}: {listed(names)}" for what, names in kinds.items() if names]:
        raise CheckpointError(f"--base {file} is not the SDXL that {folder} describes. " + "; ".join(problems))
    return folder


def convert(file: Path, out: Path, config: Path | None = None, dtype: torch.dtype | None = None) -> None:
    """Writes SDXL as one file into a folder in diffusers' layout, with diffusers' own reading of such files.

    config: SDXL's folder without weights; without, from the hub's cache. dtype: without, that of the UNet in the file.

    Raises:
        CheckpointError: as `check`; or diffusers left a tensor out.
    """
    folder, source = check(file, config), Checkpoint(file)
    file = file.resolve()
    kinds = Counter(kind for name, kind in source.dtypes.items() if name.startswith(families.UNET))
    with whole(out) as made:
        pipeline = StableDiffusionXLPipeline.from_single_file(
            str(file), config=str(folder), local_files_only=True, torch_dtype=dtype or kinds.most_common(1)[0][0])
        for part in NETWORKS:
            if empty := [name for name, tensor in getattr(pipeline, part).state_dict().items() if tensor.is_meta]:
                raise CheckpointError(f"{file}: diffusers found no weights for {listed(empty)} of {part}")
        pipeline.save_pretrained(made)
        for part in TOKENIZERS:     # as they were: loading wrote its own options into them
            shutil.rmtree(made / part)
            shutil.copytree(folder / part, made / part)
        index = json.loads((made / "model_index.json").read_text(encoding="utf-8"))
        index.pop("_name_or_path", None)        # a place of this machine
        (made / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
