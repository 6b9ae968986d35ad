"""SUPIR in the authors' files: into a folder of ours, and back. Every tensor is accounted for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors.torch import save_file

from . import families, prior, published
from .checkpoint import Checkpoint, CheckpointError, Shape, listed, shape_differences
from .robust import RobustEncoder
from .supir import Depth, SupirAdaptor, depths, per_level
from .supir_folder import prior_part, write
from .supir_index import INDEX, LICENCE, UNKNOWN, read_index, stored_variant, weight_files
from .whole import whole

ROBUST = "first_stage_model.denoise_encoder."
DROPPED = {"model.control_model.mask_LQ": "a mask that nothing reads"}
DROPPED_BELOW = {"first_stage_model.denoise_encoder_s1.": "a second copy of the robust encoder, for previews"}
PRESETS = ("released", "paper")


@dataclass
class Imported:
    """What became of every tensor of a checkpoint."""

    used: int
    depth: list[int]                                            # transformer blocks per level of the control copy
    preset: str | None                                          # the name of that depth, if it has one
    dropped: dict[str, str] = field(default_factory=dict)       # name: why
    from_prior: list[str] = field(default_factory=list)         # names that the checkpoint repeats and the prior has


@dataclass
class Plan:
    """The networks that a checkpoint fits, on the meta device, and where each of its tensors goes."""

    adaptor: SupirAdaptor
    robust: RobustEncoder
    wanted: dict[str, tuple[ModelMixin, str]]                   # published name: network, name in it
    report: Imported


def adaptor_modules(model: SupirAdaptor) -> list[published.Module]:
    return list(published.adaptor(model))


def robust_modules(model: RobustEncoder) -> Iterator[published.Module]:
    return ((one.replace("encoder.", ROBUST, 1), other, kind)
            for one, other, kind in published.vae_half(model.config.vae, "encoder"))


def named(adaptor: SupirAdaptor, robust: RobustEncoder) -> dict[str, tuple[ModelMixin, str]]:
    """Network and own name by published name."""
    return {name: (model, own)
            for model, modules in ((adaptor, adaptor_modules(adaptor)), (robust, robust_modules(robust)))
            for own, name in published.names(model.state_dict(), modules).items()}


def import_supir(checkpoint: Path, base: Path, out: Path, *, base_config: Path | None = None,
                 depth: Depth | None = None, dtype: torch.dtype | None = None, include_prior: bool = False,
                 licence: str | None = None, force: bool = False) -> Imported:
    """Writes the authors' weights as a folder of ours, which appears only when it is complete.

    base: SDXL in diffusers' layout, or as one file, which becomes `out/prior` (see `prior.convert`); depth: what the
    control copy must have, without: what it has; licence: without, what the checkpoint says, or that of the authors.

    Raises:
        CheckpointError: the file is no SUPIR, a tensor is missing, unknown or of another shape, `base` is no SDXL or
            lacks something, or `out` may not be replaced.
    """
    refuse_places(checkpoint, base, out, force)
    source, config = Checkpoint(checkpoint), base
    refuse_other_families(source)
    if base.is_dir():
        prior.refuse_incomplete(base)
    else:
        config = prior.check(base, base_config)
    plan = planned(source, config, depth)
    licence = licence or source.metadata.get("licence") or LICENCE
    with whole(out) as made:
        if not base.is_dir():
            prior.convert(base, made / "prior", base_config, dtype)
        fill(plan, source, dtype)
        write(made, plan.adaptor, plan.robust, base if base.is_dir() else made / "prior",
              include_prior and base.is_dir(), licence)
    return plan.report


def refuse_places(checkpoint: Path, base: Path, out: Path, force: bool) -> None:
    """Raises CheckpointError before anything could be lost."""
    for what, place in (("--checkpoint", checkpoint), ("--base", base)):
        if not place.exists():
            raise CheckpointError(f"{what} {place} is not there")
        if out.resolve() == place.resolve() or out.resolve() in place.resolve().parents:
            raise CheckpointError(f"{what} {place} lies in {out}, which the import would replace; choose another --out")
    if base.is_dir() and base.resolve() in out.resolve().parents:
        raise CheckpointError(f"--out {out} lies in the prior's folder {base}; choose a place outside it")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out.is_dir() and (out / INDEX).is_file()):
        raise CheckpointError(f"{out} exists and is no SUPIR folder; it stays as it is. Choose another --out")
    if not force:
        raise CheckpointError(f"{out} holds a SUPIR already; --force replaces it")


def fill(plan: Plan, source: Checkpoint, dtype: torch.dtype | None) -> None:
    """Gives the networks their tensors; those of a .safetensors stay on disk until they are written."""
    for model in (plan.adaptor, plan.robust):
        shapes = {own: tensor.shape for own, tensor in model.state_dict().items()}
        model.load_state_dict({own: source[name].reshape(shapes[own]).to(dtype or source.dtypes[name])
                               for name, (owner, own) in plan.wanted.items() if owner is model}, assign=True)


def planned(source: Checkpoint, config: Path, depth: Depth | None = None) -> Plan:
    """Where every tensor of a checkpoint goes, without reading one.

    config: folder of SDXL in diffusers' layout, perhaps without weights.

    Raises:
        CheckpointError: lists the tensors that are missing, unknown or of another shape; names the depth that is there.
    """
    unet, vae = prior_part(config, "unet"), prior_part(config, "vae")
    found = found_depth(source, unet)
    refuse_other_depth(source, unet, found, depth)
    with torch.device("meta"):
        adaptor, robust = SupirAdaptor(unet, found), RobustEncoder(vae)
    wanted = named(adaptor, robust)
    shapes = {name: published_shape(name, tuple(model.get_parameter(own).shape))
              for name, (model, own) in wanted.items()}
    of_prior = set(prior.network_shapes(config))
    rest = [name for name in source if name not in wanted]
    dropped = {name: reason for name in rest if (reason := reason_to_drop(name))}
    dropped |= dict.fromkeys(source.others, "no tensor")
    repeated = [name for name in rest if name in of_prior or name.startswith("conditioner.")]
    unknown = [name for name in rest if name not in dropped and name not in set(repeated)]
    refuse_differences(source, unet, found, [name for name in wanted if name not in source], unknown,
                       shape_differences(source, shapes))
    return Plan(adaptor, robust, wanted, Imported(len(wanted), found, preset_of(unet, found), dropped, repeated))


def reason_to_drop(name: str) -> str | None:
    return DROPPED.get(name) or next((why for prefix, why in DROPPED_BELOW.items() if name.startswith(prefix)), None)


def refuse_other_families(source: Checkpoint) -> None:
    if (found := families.family(source.shapes)) != families.SUPIR:
        kind = (f"of a family that is not known here; its first tensors: {listed(source)}"
                if found == families.UNRECOGNISED else f"{found}'s" + (
                    ", which is the prior (--base)" if found == families.SDXL else ""))
        raise CheckpointError(f"{source.path} is no SUPIR: it has no tensor below model.control_model. It is {kind}")


def attending(unet: Mapping[str, Any]) -> list[bool]:
    """Levels that have transformer blocks; the others' depth means nothing."""
    return ["CrossAttn" in kind for kind in unet["down_block_types"]]


def found_depth(source: Iterable[str], unet: dict[str, Any]) -> list[int]:
    """Transformer blocks per level of the control copy in a file, the middle with the last level."""
    full = per_level(unet["transformer_layers_per_block"], unet)
    blocks: dict[str, set[str]] = {}
    for name in source:
        prefix, inside, rest = name.partition(".transformer_blocks.")
        if inside:
            blocks.setdefault(prefix, set()).add(rest.split(".")[0])
    counts = [0] * len(full)
    for one, own, _ in published.prefixed(published.unet_encoder(unet), "model.control_model."):
        if ".attentions." in own:
            level = -1 if own.startswith("mid_block.") else int(own.split(".")[1])
            counts[level] = max(counts[level], len(blocks.get(one, ())))
    return [max(1, count) if attends else whole_level
            for count, attends, whole_level in zip(counts, attending(unet), full, strict=True)]


def preset_of(unet: dict[str, Any], depth: list[int]) -> str | None:
    return next((name for name in PRESETS if same_depth(unet, depths(unet, name), depth)), None)


def same_depth(unet: dict[str, Any], one: list[int], other: list[int]) -> bool:
    return len(one) == len(other) and all(
        a == b for a, b, attends in zip(one, other, attending(unet), strict=True) if attends)


def shown(depth: Iterable[int]) -> str:
    return ",".join(map(str, depth))


def refuse_other_depth(source: Checkpoint, unet: dict[str, Any], found: list[int], depth: Depth | None) -> None:
    if depth is None or same_depth(unet, asked := depths(unet, depth), found):
        return
    fits = preset_of(unet, found) or shown(found)
    raise CheckpointError(f"{source.path} holds a control copy with {shown(found)} transformer blocks per level, not "
                          f"{shown(asked)} as --depth asks. --depth {fits} would fit, or no --depth: then the file "
                          "decides")


def refuse_differences(source: Checkpoint, unet: dict[str, Any], found: list[int], missing: list[str],
                       unknown: list[str], wrong: list[str]) -> None:
    kinds = (("missing", missing), ("not known", unknown), ("of another shape", wrong))
    problems = [f"{len(names)} tensors are {what}: {listed(sorted(names))}" for what, names in kinds if names]
    if not problems:
        return
    presets = ", ".join(f"{name} is {shown(depths(unet, name))}" for name in PRESETS)
    depth = (f"Its control copy has at most {shown(found)} transformer blocks per level, which is "
             f"{preset_of(unet, found) or 'no preset'} ({presets})")
    advice = ("No depth would help: that changes how many blocks there are, and these have other widths than this "
              "--base" if wrong else
              "Blocks are missing in some places that have them in others, so no depth fits: is the file whole?"
              if any(".transformer_blocks." in name for name in missing) else "The depth fits; the rest does not")
    raise CheckpointError(f"{source.path} does not fit. " + "; ".join(problems) + f". {depth}. {advice}")


def export_supir(folder: Path, out: Path, dtype: torch.dtype | None = None, *, variant: str | None = None,
                 force: bool = False) -> int:
    """Writes adaptor and robust encoder under the authors' names into one .safetensors file; returns how many tensors.

    dtype: without, each tensor keeps its own, so that importing the export gives the same folder again.

    Raises:
        CheckpointError: an adaptor that the published layout cannot hold (gated, or zero convolutions), no complete
            folder, or `out` exists.
    """
    if out.suffix != ".safetensors":
        raise CheckpointError(f"{out}: only .safetensors are written; name it {out.with_suffix('.safetensors').name}")
    if out.is_dir() or (out.exists() and not force):
        raise CheckpointError(f"{out} exists; " + ("it is a folder" if out.is_dir() else "--force replaces it"))
    index = read_index(folder)
    with torch.device("meta"):
        adaptor, robust = (kind.from_config(kind.load_config(folder / part)) for kind, part in
                           ((SupirAdaptor, "adaptor"), (RobustEncoder, "robust_encoder")))
    if adaptor.config.gated or adaptor.config.connector != "zero_sft":
        raise CheckpointError(f"{folder}: the authors' layout has no place for "
                              f"{'gates' if adaptor.config.gated else 'zero convolutions'}, so this adaptor stays ours")
    stored = {id(adaptor): tensors_of(folder / "adaptor", variant),
              id(robust): tensors_of(folder / "robust_encoder", variant)}
    tensors = {}
    for name, (model, own) in named(adaptor, robust).items():
        tensor = stored[id(model)][own][own]
        tensors[name] = tensor.reshape(published_shape(name, tuple(tensor.shape))).to(dtype or tensor.dtype)
    save(tensors, out, index.get("licence", UNKNOWN))
    return len(tensors)


def tensors_of(part: Path, variant: str | None = None) -> dict[str, Checkpoint]:
    """The file of each tensor of a part that save_pretrained wrote, in shards or not.

    Raises:
        CheckpointError: no weights, or a shard is missing.
    """
    files = weight_files(part).get(stored_variant(part, variant) or "", [])
    if not files:
        raise CheckpointError(f"{part} has no .safetensors")
    expected = int(files[0].stem.split("-of-")[1]) if "-of-" in files[0].stem else 1
    if len(files) != expected:
        raise CheckpointError(f"{part} has {len(files)} of its {expected} files of weights: "
                              + listed(file.name for file in files))
    opened = [Checkpoint(file) for file in files]
    return {name: source for source in opened for name in source}


def save(tensors: dict[str, torch.Tensor], out: Path, licence: str) -> None:
    """One file that appears only when it is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.part")
    try:
        # One entry: several are written in a random order, and equal exports would have unequal hashes.
        save_file(tensors, partial, metadata={"licence": licence})
        partial.chmod(0o644)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def published_shape(name: str, shape: Shape) -> Shape:
    """Projections of the autoencoder's attention are 1x1 convolutions in the published layout."""
    is_convolution = ".mid.attn_1." in name and len(shape) == 2
    return (*shape, 1, 1) if is_convolution else shape
