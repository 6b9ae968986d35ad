"""Names of tensors in the published layouts of SDXL and SUPIR, and in ours (diffusers').

A network is listed as modules: (published prefix, our prefix, kind). Names of tensors follow from our state dict, so
the translation goes both ways and accounts for every tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from .supir import SupirAdaptor, per_level

Module = tuple[str, str, str]       # published prefix, our prefix, kind

LEAVES = {
    "plain": {},
    "resnet": {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
               "conv2": "out_layers.3", "conv_shortcut": "skip_connection"},
    "vae_resnet": {"conv_shortcut": "nin_shortcut"},
    "vae_attention": {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"},
    "zero_sft": {"norm": "param_free_norm", "shared": "mlp_shared.0", "scale": "zero_mul", "shift": "zero_add",
                 "skip": "zero_conv"},
    "zero_attention": {"norm": "norm1", "control_norm": "norm2", "to_q": "attn.to_q", "to_k": "attn.to_k",
                       "to_v": "attn.to_v", "to_out": "attn.to_out.0"},
}


def embeddings() -> Iterator[Module]:
    for ours, published in (("time_embedding", "time_embed"), ("add_embedding", "label_emb.0")):
        yield f"{published}.0", f"{ours}.linear_1", "plain"
        yield f"{published}.2", f"{ours}.linear_2", "plain"


def unet_encoder(unet: dict[str, Any]) -> Iterator[Module]:
    """Embeddings, encoder and middle of SDXL's UNet, or of a control copy of it."""
    yield from embeddings()
    yield "input_blocks.0.0", "conv_in", "plain"
    number, kinds = 1, unet["down_block_types"]
    for level, (kind, layers) in enumerate(zip(kinds, per_level(unet["layers_per_block"], unet), strict=True)):
        for layer in range(layers):
            yield f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{layer}", "resnet"
            if "CrossAttn" in kind:
                yield f"input_blocks.{number}.1", f"down_blocks.{level}.attentions.{layer}", "plain"
            number += 1
        if level < len(kinds) - 1:
            yield f"input_blocks.{number}.0.op", f"down_blocks.{level}.downsamplers.0.conv", "plain"
            number += 1
    yield "middle_block.0", "mid_block.resnets.0", "resnet"
    yield "middle_block.1", "mid_block.attentions.0", "plain"
    yield "middle_block.2", "mid_block.resnets.1", "resnet"


def unet(config: dict[str, Any]) -> Iterator[Module]:
    """The whole of SDXL's UNet."""
    yield from unet_encoder(config)
    number, kinds = 0, list(reversed(config["down_block_types"]))
    for block, (kind, layers) in enumerate(
            zip(kinds, reversed(per_level(config["layers_per_block"], config)), strict=True)):
        attends = "CrossAttn" in kind
        for layer in range(layers + 1):
            yield f"output_blocks.{number}.0", f"up_blocks.{block}.resnets.{layer}", "resnet"
            if attends:
                yield f"output_blocks.{number}.1", f"up_blocks.{block}.attentions.{layer}", "plain"
            number += 1
        if block < len(kinds) - 1:
            yield f"output_blocks.{number - 1}.{1 + attends}.conv", f"up_blocks.{block}.upsamplers.0.conv", "plain"
    yield "out.0", "conv_norm_out", "plain"
    yield "out.2", "conv_out", "plain"


def vae_half(config: dict[str, Any], half: str) -> Iterator[Module]:
    """The encoder or the decoder of SDXL's autoencoder."""
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    encoder = half == "encoder"
    yield f"{half}.conv_in", f"{half}.conv_in", "plain"
    for block in range(levels):
        published = f"{half}.down.{block}" if encoder else f"{half}.up.{levels - 1 - block}"
        ours, way = (f"{half}.down_blocks.{block}", "down") if encoder else (f"{half}.up_blocks.{block}", "up")
        for layer in range(layers if encoder else layers + 1):
            yield f"{published}.block.{layer}", f"{ours}.resnets.{layer}", "vae_resnet"
        if block < levels - 1:
            yield f"{published}.{way}sample.conv", f"{ours}.{way}samplers.0.conv", "plain"
    yield f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", "vae_resnet"
    yield f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", "vae_attention"
    yield f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", "vae_resnet"
    yield f"{half}.norm_out", f"{half}.conv_norm_out", "plain"
    yield f"{half}.conv_out", f"{half}.conv_out", "plain"


def vae(config: dict[str, Any]) -> Iterator[Module]:
    """The whole of SDXL's autoencoder."""
    yield from vae_half(config, "encoder")
    yield from vae_half(config, "decoder")
    yield "quant_conv", "quant_conv", "plain"
    yield "post_quant_conv", "post_quant_conv", "plain"


def prefixed(modules: Iterable[Module], published: str, ours: str = "") -> Iterator[Module]:
    return ((published + one, ours + other, kind) for one, other, kind in modules)


def adaptor(model: SupirAdaptor) -> Iterator[Module]:
    """Control copy and connectors, as the published checkpoints name them."""
    yield from prefixed(unet_encoder(model.config.unet), "model.control_model.", "control.")
    yield "model.control_model.input_hint_block.0", "control.hint", "plain"
    for index, connector in model.connectors.items():
        kind = "zero_attention" if hasattr(connector, "control_norm") else "zero_sft"
        yield f"model.diffusion_model.project_modules.{index}", f"connectors.{index}", kind


def names(ours: Iterable[str], modules: Iterable[Module]) -> dict[str, str]:
    """Published name of each of our tensors.

    Raises:
        KeyError: a tensor that no module covers, such as a gate, which the published layout does not know.
    """
    table = {own: (published, LEAVES[kind]) for published, own, kind in modules}
    return {name: _published(name, table) for name in ours}


def _published(name: str, table: dict[str, tuple[str, dict[str, str]]]) -> str:
    pieces = name.split(".")
    for length in range(len(pieces) - 1, 0, -1):
        prefix = ".".join(pieces[:length])
        if prefix in table:
            published, leaves = table[prefix]
            rest, end = ".".join(pieces[length:-1]), pieces[-1]
            return ".".join(filter(None, (published, leaves.get(rest, rest), end)))
    raise KeyError(f"{name} has no name in the published layout")
