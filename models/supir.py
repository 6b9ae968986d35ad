"""SUPIR's networks on diffusers' modules: a control copy of SDXL's encoder, connectors, and the prior with both.

Written from the paper (arXiv 2401.13627, section 3) and measurements. The depth of the control copy is explicit,
because the paper trims half of its transformer blocks and the published weights do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import get_down_block, get_mid_block
from torch import Tensor, nn

from .connectors import Scale, ZeroConv, ZeroCrossAttention, ZeroSFT

Connectors = Literal["zero_sft", "zero_conv"]
Depth = Literal["released", "paper"] | Sequence[int]


class Site(NamedTuple):
    """Where a connector stands. `index` is its number in the published weights, which count from the last."""

    index: int
    kind: Literal["skip", "attention"]
    block: int                  # of the decoder; -1: after the middle
    layer: int                  # before this one; for attention: after it, before the upsampler
    control: int                # number of the control feature, 0 the input convolution's
    control_channels: int
    channels: int               # of the encoder's skip; for attention: of the decoder
    decoder_channels: int       # 0 at the middle


def conditioning(time_proj: nn.Module, time_embedding: nn.Module, add_time_proj: nn.Module, add_embedding: nn.Module,
                 sample: Tensor, timestep: Tensor, text_embeds: Tensor, time_ids: Tensor) -> Tensor:
    """(B, 4 C): the embedding of time, pooled text and sizes, as SDXL adds them."""
    timestep = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
    emb = time_embedding(time_proj(timestep).to(sample.dtype))
    sizes = add_time_proj(time_ids.flatten()).reshape(len(text_embeds), -1)
    return emb + add_embedding(torch.cat([text_embeds, sizes], dim=-1).to(emb.dtype))


class ControlEncoder(nn.Module):
    """A copy of SDXL's encoder and middle that also sees the latent of the low-quality image.

    `hint`, zero at the start, is added once after the first convolution.
    """

    def __init__(self, unet: dict[str, Any], depth: Sequence[int]) -> None:
        super().__init__()
        channels, heads = unet["block_out_channels"], per_level(unet["attention_head_dim"], unet)
        width, shared = 4 * channels[0], {
            "temb_channels": 4 * channels[0], "resnet_eps": unet["norm_eps"], "resnet_act_fn": unet["act_fn"],
            "resnet_groups": unet["norm_num_groups"], "cross_attention_dim": unet["cross_attention_dim"],
            "use_linear_projection": unet["use_linear_projection"]}
        self.conv_in = nn.Conv2d(unet["in_channels"], channels[0], 3, padding=1)
        self.hint = nn.Conv2d(unet["in_channels"], channels[0], 3, padding=1)
        nn.init.zeros_(self.hint.weight)
        nn.init.zeros_(self.hint.bias)
        self.time_proj = Timesteps(channels[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(channels[0], width)
        self.add_time_proj = Timesteps(unet["addition_time_embed_dim"], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.add_embedding = TimestepEmbedding(unet["projection_class_embeddings_input_dim"], width)
        self.down_blocks = nn.ModuleList(
            get_down_block(kind, num_layers=layers, in_channels=channels[max(0, i - 1)], out_channels=channels[i],
                           add_downsample=i < len(channels) - 1, transformer_layers_per_block=depth[i],
                           num_attention_heads=heads[i], attention_head_dim=heads[i],
                           downsample_padding=unet["downsample_padding"], **shared)
            for i, (kind, layers) in enumerate(zip(unet["down_block_types"], _layers(unet), strict=True)))
        self.mid_block = get_mid_block(
            unet["mid_block_type"], in_channels=channels[-1], transformer_layers_per_block=depth[-1],
            num_attention_heads=heads[-1], **shared)

    def forward(self, sample: Tensor, timestep: Tensor, lq_latent: Tensor, encoder_hidden_states: Tensor,
                text_embeds: Tensor, time_ids: Tensor) -> list[Tensor]:
        """Features from the input convolution's to the middle's: (B, C_i, H_i, W_i) each.

        sample: (B, C, H, W) scaled noisy latent; lq_latent: (B, C, H, W), scaled by the autoencoder's factor.
        """
        emb = conditioning(self.time_proj, self.time_embedding, self.add_time_proj, self.add_embedding, sample,
                           timestep, text_embeds, time_ids)
        hidden = self.conv_in(sample) + self.hint(lq_latent)
        return encoded(self.down_blocks, self.mid_block, hidden, emb, encoder_hidden_states)


def encoded(down_blocks: nn.ModuleList, mid_block: nn.Module, hidden: Tensor, emb: Tensor,
            context: Tensor) -> list[Tensor]:
    """The skips of an encoder, from the input's to the middle's output."""
    features = [hidden]
    for block in down_blocks:
        attends = {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}
        hidden, skips = block(hidden_states=hidden, temb=emb, **attends)
        features += skips
    return [*features, mid_block(hidden, emb, encoder_hidden_states=context)]


class SupirAdaptor(ModelMixin, ConfigMixin):
    """What SUPIR trains beside SDXL: the control copy and the connectors.

    unet: the prior's configuration (`prior_config`); depth: transformer blocks per level of the control copy, the
    middle as the last; connector: `zero_sft`, or `zero_conv` as the paper's ablation; gated: starts at the identity,
    see `ZeroSFT`.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, unet: dict[str, Any], depth: Sequence[int], connector: Connectors = "zero_sft",
                 gated: bool = False) -> None:
        super().__init__()
        if len(depth) != len(unet["block_out_channels"]):
            raise ValueError(f"depth {list(depth)} names {len(depth)} levels, and the prior has "
                             f"{len(unet['block_out_channels'])}")
        self.control = ControlEncoder(unet, depth)
        self.connectors = nn.ModuleDict({str(site.index): _connector(site, connector, unet["norm_num_groups"], gated)
                                         for site in sites(unet) if connector == "zero_sft" or site.kind == "skip"})

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel, depth: Depth = "released", connector: Connectors = "zero_sft",
                  gated: bool = False) -> SupirAdaptor:
        """A fresh adaptor whose control copy has the prior's weights; a trimmed one keeps each level's first blocks."""
        config = prior_config(unet)
        adaptor = cls(config, depths(config, depth), connector, gated)
        own, prior = adaptor.control.state_dict(), unet.state_dict()
        adaptor.control.load_state_dict({name: prior.get(name, tensor) for name, tensor in own.items()})
        return adaptor if unet.dtype == adaptor.dtype else adaptor.to(unet.dtype)


def prior_config(unet: UNet2DConditionModel) -> dict[str, Any]:
    """The part of a prior's configuration that decides the adaptor's shapes."""
    names = ("in_channels", "block_out_channels", "down_block_types", "mid_block_type", "layers_per_block",
             "transformer_layers_per_block", "attention_head_dim", "cross_attention_dim", "norm_num_groups", "norm_eps",
             "act_fn", "use_linear_projection", "downsample_padding", "addition_time_embed_dim",
             "projection_class_embeddings_input_dim")
    return {name: list(value) if isinstance(value := unet.config[name], tuple) else value for name in names}


def depths(unet: dict[str, Any], depth: Depth) -> list[int]:
    """Transformer blocks per level: `released` all of the prior's, `paper` half of them, or one's own numbers."""
    full = per_level(unet["transformer_layers_per_block"], unet)
    if isinstance(depth, str):
        if depth not in ("released", "paper"):
            raise ValueError(f"depth {depth!r}: 'released', 'paper', or a number per level such as {full}")
        return [max(1, blocks // 2) for blocks in full] if depth == "paper" else full
    return list(depth)


def sites(unet: dict[str, Any]) -> list[Site]:
    """Every connector's place, in the order in which the decoder meets them."""
    channels, layers = unet["block_out_channels"], _layers(unet)
    skips = [channels[0]]                       # channels of the control features
    for i, width in enumerate(channels):
        skips += [width] * layers[i] + ([width] if i < len(channels) - 1 else [])
    found = [Site(0, "skip", -1, 0, len(skips), channels[-1], channels[-1], 0)]
    left, decoder = len(skips), channels[-1]
    for block, width in enumerate(reversed(channels)):
        for layer in range(layers[-1 - block] + 1):
            left -= 1
            found.append(Site(0, "skip", block, layer, left, skips[left], skips[left], decoder))
            decoder = width
        if block < len(channels) - 1:
            found.append(Site(0, "attention", block, layer, left, skips[left], width, width))
    return [site._replace(index=len(found) - 1 - i) for i, site in enumerate(found)]


def _connector(site: Site, kind: Connectors, groups: int, gated: bool) -> nn.Module:
    if site.kind == "attention":
        return ZeroCrossAttention(site.control_channels, site.channels, groups=groups, gated=gated)
    if kind == "zero_conv":
        return ZeroConv(site.control_channels, site.channels)
    return ZeroSFT(site.control_channels, site.channels, site.decoder_channels, groups=groups, gated=gated)


def _layers(unet: dict[str, Any]) -> list[int]:
    return per_level(unet["layers_per_block"], unet)


def per_level(value: int | Sequence[int], unet: dict[str, Any]) -> list[int]:
    return [value] * len(unet["block_out_channels"]) if isinstance(value, int) else list(value)


class SupirUNet(nn.Module):
    """The frozen prior with an adaptor: predicts the noise of a latent, guided by the low-quality image.

    The prior's encoder runs without gradients; its decoder takes the connectors, so gradients pass through it to them.
    """

    def __init__(self, unet: UNet2DConditionModel, adaptor: SupirAdaptor) -> None:
        super().__init__()
        self.unet, self.adaptor = unet.requires_grad_(False), adaptor
        self.sites = sites(prior_config(unet))

    def forward(self, sample: Tensor, timestep: Tensor, lq_latent: Tensor, encoder_hidden_states: Tensor,
                text_embeds: Tensor, time_ids: Tensor, control_scale: Scale = 1.0,
                control: list[Tensor] | None = None) -> Tensor:
        """(B, C, H, W) noise.

        sample: (B, C, H, W) noisy latent times c_in; timestep: (B,) indices of the 1000; lq_latent: (B, C, H, W);
        encoder_hidden_states: (B, T, 2048); text_embeds: (B, 1280); time_ids: (B, 6); control_scale: a number or (B,),
        0 is plain SDXL; control: features of an earlier call.
        """
        unet = self.unet
        if control is None:
            control = self.adaptor.control(sample, timestep, lq_latent, encoder_hidden_states, text_embeds, time_ids)
        with torch.no_grad():
            emb = conditioning(unet.time_proj, unet.time_embedding, unet.add_time_proj, unet.add_embedding, sample,
                               timestep, text_embeds, time_ids)
            *skips, hidden = encoded(unet.down_blocks, unet.mid_block, unet.conv_in(sample), emb, encoder_hidden_states)
        hidden = self._decoded(hidden, skips, control, emb, encoder_hidden_states, control_scale)
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))

    def _decoded(self, hidden: Tensor, skips: list[Tensor], control: list[Tensor], emb: Tensor, context: Tensor,
                 scale: Scale) -> Tensor:
        for site, connector in self._connectors():
            feature = control[site.control]
            if site.block < 0:
                hidden = connector(feature, hidden, None, scale)
                continue
            block = self.unet.up_blocks[site.block]
            if site.kind == "attention":
                if connector is not None:
                    hidden = connector(feature, hidden, scale)
                size = skips[-1].shape[2:]          # of the next skip: an odd side is not simply doubled
                hidden = block.upsamplers[0](hidden, None if size == _doubled(hidden) else size)
                continue
            hidden = block.resnets[site.layer](connector(feature, skips.pop(), hidden, scale), emb)
            if getattr(block, "has_cross_attention", False):
                hidden = block.attentions[site.layer](hidden, encoder_hidden_states=context, return_dict=False)[0]
        return hidden

    def _connectors(self) -> Iterator[tuple[Site, nn.Module | None]]:
        modules = self.adaptor.connectors
        return ((site, modules[key] if (key := str(site.index)) in modules else None) for site in self.sites)


def _doubled(hidden: Tensor) -> tuple[int, int]:
    return 2 * hidden.shape[2], 2 * hidden.shape[3]
