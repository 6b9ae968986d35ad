"""SUPIR in the authors' files: into a folder of ours, and back. Every tensor is accounted for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from . import published
from .checkpoint import Checkpoint, CheckpointError
from .robust import RobustEncoder
from .supir import SupirAdaptor, depths, per_level
from .supir_folder import LICENCE, index_of, prior_part, write

DROPPED = {"model.control_model.mask_LQ": "a mask that nothing reads"}
ROBUST = "first_stage_model.denoise_encoder."


@dataclass
class Imported:
    """What became of every tensor of a checkpoint."""

    used: int
    dropped: dict[str, str] = field(default_factory=dict)       # name: why
    from_prior: list[str] = field(default_factory=list)         # parts that the checkpoint repeats and the prior has


def adaptor_modules(model: SupirAdaptor) -> list[published.Module]:
    return list(published.adaptor(model))


def robust_modules(model: RobustEncoder) -> Iterator[published.Module]:
    return ((one.replace("encoder.", ROBUST, 1), other, kind)
            for one, other, kind in published.vae_half(model.config.vae, "encoder"))


def import_supir(checkpoint: Path, prior: Path, out: Path, *, dtype: torch.dtype | None = None,
                 include_prior: bool = False, licence: str = LICENCE) -> Imported:
    """Writes the authors' weights as a folder of ours beside the prior, a folder in diffusers' layout.

    Raises:
        CheckpointError: the file is no SUPIR, a tensor is missing, unknown or of another shape, or `prior` is no SDXL.
    """
    source, unet, vae = Checkpoint(checkpoint), prior_part(prior, "unet"), prior_part(prior, "vae")
    refuse_other_families(source)
    with torch.device("meta"):
        adaptor = SupirAdaptor(unet, found_depth(source, unet))
        robust = RobustEncoder(vae)
    wanted = {name: (adaptor, own) for own, name in
              published.names(adaptor.state_dict(), adaptor_modules(adaptor)).items()}
    wanted |= {name: (robust, own) for own, name in
               published.names(robust.state_dict(), robust_modules(robust)).items()}
    report = account(source, wanted, unet)
    for model in (adaptor, robust):
        tensors = {own: source[name].reshape(model.state_dict()[own].shape).to(dtype or source[name].dtype)
                   for name, (owner, own) in wanted.items() if owner is model}
        model.load_state_dict(tensors, assign=True)
    write(out, adaptor, robust, prior, include_prior, licence)
    return report


def refuse_other_families(source: Checkpoint) -> None:
    if any(name.startswith("model.control_model.") for name in source):
        return
    kind = ("an SDXL or Stable Diffusion checkpoint, which is the prior (--base)"
            if any(name.startswith("model.diffusion_model.input_blocks.") for name in source) else
            "of a family that is not known here; its first tensors: " + ", ".join(list(source)[:3]))
    raise CheckpointError(f"{source.path} is no SUPIR: it has no tensor below model.control_model. It is {kind}")


def found_depth(source: Checkpoint, unet: dict[str, Any]) -> list[int]:
    """Transformer blocks per level of the control copy in a file, the middle as the last."""
    counts = [0] * len(unet["block_out_channels"])
    with torch.device("meta"):
        full = SupirAdaptor(unet, per_level(unet["transformer_layers_per_block"], unet))
    for one, own, _ in adaptor_modules(full):
        if own.startswith("control.") and own.split(".")[-2] == "attentions":
            level = -1 if ".mid_block." in own else int(own.split(".")[2])
            blocks = {int(name[len(one):].split(".")[2]) for name in source
                      if name.startswith(f"{one}.transformer_blocks.")}
            counts[level] = max(counts[level], len(blocks))
    return [max(1, count) for count in counts]


def account(source: Checkpoint, wanted: dict[str, Any], unet: dict[str, Any]) -> Imported:
    """Checks that every tensor is used, known and dropped, or the prior's.

    Raises:
        CheckpointError: lists those that are missing, unknown or of another shape.
    """
    shapes = {name: tuple(owner.state_dict()[own].shape) for name, (owner, own) in wanted.items()}
    missing = sorted(set(wanted) - set(source))
    rest = [name for name in source if name not in wanted and name not in DROPPED]
    prior = sorted({name.split(".")[0] + "." + name.split(".")[1] for name in rest if _is_prior(name)})
    unknown = sorted(name for name in rest if not _is_prior(name))
    wrong = [name for name in wanted if name in source and source.shapes[name] != shapes[name]
             and torch.Size(source.shapes[name]).numel() != torch.Size(shapes[name]).numel()]
    wrong = [f"{name} {source.shapes[name]}, not {shapes[name]}" for name in wrong]
    kinds = (("are missing", missing), ("are not known", unknown), ("have another shape", wrong))
    problems = [f"{len(names)} tensors {what}: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
                for what, names in kinds if names]
    if problems:
        raise CheckpointError(f"{source.path} does not fit this prior and the control depth that it seems to have. "
                              + "; ".join(problems) + f". Depths for this prior: released {depths(unet, 'released')}, "
                              f"paper {depths(unet, 'paper')}")
    return Imported(len(wanted), {name: why for name, why in DROPPED.items() if name in source}, prior)


def _is_prior(name: str) -> bool:
    return (name.startswith(("conditioner.", "first_stage_model."))
            or (name.startswith("model.diffusion_model.") and "project_modules" not in name))


def export_supir(folder: Path, out: Path, dtype: torch.dtype | None = None) -> int:
    """Writes adaptor and robust encoder under the authors' names into one .safetensors file; returns how many tensors.

    Raises:
        CheckpointError: an adaptor that the published layout cannot hold (gated, or zero convolutions).
    """
    index_of(folder)
    adaptor, robust = SupirAdaptor.from_pretrained(folder / "adaptor"), RobustEncoder.from_pretrained(
        folder / "robust_encoder")
    if adaptor.config.gated or adaptor.config.connector != "zero_sft":
        raise CheckpointError(f"{folder}: the authors' layout has no place for "
                              f"{'gates' if adaptor.config.gated else 'zero convolutions'}, so this adaptor stays ours")
    tensors = {}
    for model, modules in ((adaptor, adaptor_modules(adaptor)), (robust, list(robust_modules(robust)))):
        for own, name in published.names(model.state_dict(), modules).items():
            tensors[name] = published_shape(name, model.state_dict()[own]).to(dtype or model.dtype).contiguous()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".part")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.rename(out)
    return len(tensors)


def published_shape(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Projections of the autoencoder's attention are 1x1 convolutions in the published layout."""
    is_convolution = ".mid.attn_1." in name and tensor.ndim == 2
    return tensor[:, :, None, None] if is_convolution else tensor
