"""Weights in the published layouts, made from the tiny models and from the lists of full-size names."""

import gzip
import json
import resource
import struct
import sys
from pathlib import Path

import torch
import typer
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from models import commands, prior, published
from models.supir_folder import prior_part

GOLDEN = Path(__file__).parent.parent / "golden" / "supir"
SDXL = {"unet": {
    "_class_name": "UNet2DConditionModel", "sample_size": 128, "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816},
    "vae": {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
            "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
            "latent_channels": 4, "scaling_factor": 0.13025}}


def configured(folder: Path, **changes: object) -> Path:
    """SDXL's full-size configuration, without weights; changes are of its UNet."""
    for part, config in SDXL.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config | (changes if part == "unet" else {})))
    return folder


def full_size(*lists: str) -> dict[str, tuple[int, ...]]:
    """Published names and shapes: `v0`, `extra_in_v0Q`, `base`."""
    with gzip.open(GOLDEN / "official_keys_supir.json.gz", "rt") as file:
        known = json.load(file)
    return {name: tuple(shape) for one in lists for name, shape in known[one].items()}


def trimmed(shapes: dict, levels: dict[str, int]) -> dict:
    """Fewer transformer blocks in the parts of the control copy whose published prefix is named."""
    def stays(name):
        return not any(name.startswith(f"model.control_model.{part}") and ".transformer_blocks." in name
                       and int(name.split(".transformer_blocks.")[1].split(".")[0]) >= blocks
                       for part, blocks in levels.items())
    return {name: shape for name, shape in shapes.items() if stays(name)}


def sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A .safetensors in fp32 of any size whose numbers take no room on disk."""
    header, place = {}, 0
    for name, shape in shapes.items():
        end = place + 4 * torch.Size(shape).numel()
        header[name], place = {"dtype": "F32", "shape": list(shape), "data_offsets": [place, end]}, end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + place)
    return path


def sdxl_file(folder: Path) -> dict[str, torch.Tensor]:
    """A diffusers folder of SDXL as the tensors of one published file."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    found = {}
    for model, prefix, modules in (
            (pipeline.unet, "model.diffusion_model.", published.unet(prior_part(folder, "unet"))),
            (pipeline.vae, "first_stage_model.", published.vae(pipeline.vae.config))):
        own = model.state_dict()
        for name, other in published.names(own, published.prefixed(modules, prefix)).items():
            found[other] = own[name][..., None, None] if ".mid.attn_1." in other and own[name].ndim == 2 else own[name]
    for name, tensor in pipeline.text_encoder.state_dict().items():
        found[f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    own = pipeline.text_encoder_2.state_dict()
    for name, tensor in own.items():
        other = f"conditioner.embedders.1.model.{prior.open_clip_name(name)}"
        if ".in_proj_" in other:
            tensor = torch.cat([own[name.replace(name.split(".")[-2], f"{letter}_proj")] for letter in "qkv"])
        found[other] = tensor.T if name == "text_projection.weight" else tensor
    found["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6)      # real files have it
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor below a folder, by file's folder and name."""
    return {f"{path.parent.relative_to(folder)}/{name}": tensor for path in sorted(folder.rglob("*.safetensors"))
            for name, tensor in load_file(path).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are one, bit by bit."""
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items())


def in_process(arguments: list[str], said: str, largest_file: int | None) -> None:
    """A command of `clearshard models` in a process of its own that may not write larger files."""
    app = typer.Typer()
    commands.register(app)
    with open(said, "w") as sys.stderr:
        if largest_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        app(["models", *arguments])


__all__ = ["configured", "full_size", "in_process", "load_file", "same", "save_file", "sdxl_file", "sparse", "stored",
           "trimmed"]
