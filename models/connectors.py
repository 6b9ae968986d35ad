"""Connectors: how features of the control branch enter the frozen decoder of SDXL.

SUPIR (section 3.2, figure 3) calls them ZeroSFT; the released networks add two cross-attentions. `ZeroConv` is the
paper's ablation: ControlNet's addition to the skip.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

EPS = 1e-5
HEAD = 64           # channels of one head of cross-attention; narrower networks have one head
Scale = float | Tensor


class ZeroSFT(nn.Module):
    """Scale and shift of decoder and skip by the control feature, blended with their plain concatenation.

    With control feature c, skip h and decoder state d: z = [d; h + Conv1x1(c)], a = SiLU(Conv3x3(c)), and
    out = s (GN(z) (1 + Conv3x3(a)) + Conv3x3(a)) + (1 - s) [d; h]. At scale s = 0 that is what SDXL has there.

    Freshly made it is not the identity, since the normalisation stays: `gated` multiplies s by a learned number that
    starts at zero.
    """

    def __init__(self, control_channels: int, skip_channels: int, decoder_channels: int, *, hidden: int = 128,
                 groups: int = 32, gated: bool = False) -> None:
        super().__init__()
        total = skip_channels + decoder_channels
        self.norm = nn.GroupNorm(groups, total, eps=EPS)
        self.shared = nn.Conv2d(control_channels, hidden, 3, padding=1)
        self.scale = zeroed(nn.Conv2d(hidden, total, 3, padding=1))
        self.shift = zeroed(nn.Conv2d(hidden, total, 3, padding=1))
        self.skip = zeroed(nn.Conv2d(control_channels, skip_channels, 1))
        self.gate = nn.Parameter(torch.zeros(1)) if gated else None

    def forward(self, control: Tensor, skip: Tensor, decoder: Tensor | None = None, scale: Scale = 1.0) -> Tensor:
        """(B, skip + decoder, H, W): what the next block of the decoder takes. `decoder`: None at the middle."""
        plain = joined(decoder, skip)
        if is_zero(scale):
            return plain
        hidden = functional.silu(self.shared(control))
        normed = self.norm(joined(decoder, skip + self.skip(control)))
        modulated = normed * (1 + self.scale(hidden)) + self.shift(hidden)
        return blend(plain, modulated, scale, self.gate)


class ZeroCrossAttention(nn.Module):
    """x + s Attention(GN(x), GN(control)) over places; heads of 64 channels. Not zero at the start unless `gated`."""

    def __init__(self, control_channels: int, channels: int, *, groups: int = 32, gated: bool = False) -> None:
        super().__init__()
        self.head = min(HEAD, channels)
        if channels % self.head:
            raise ValueError(f"{channels} channels do not divide into heads of {HEAD}")
        self.norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.control_norm = nn.GroupNorm(groups, control_channels, eps=EPS)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(control_channels, channels, bias=False)
        self.to_v = nn.Linear(control_channels, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)
        self.gate = nn.Parameter(torch.zeros(1)) if gated else None

    def forward(self, control: Tensor, x: Tensor, scale: Scale = 1.0) -> Tensor:
        """(B, channels, H, W)."""
        if is_zero(scale):
            return x
        context = places(self.control_norm(control))
        query, key, value = (layer(tokens).unflatten(-1, (-1, self.head)).transpose(1, 2) for layer, tokens in (
            (self.to_q, places(self.norm(x))), (self.to_k, context), (self.to_v, context)))
        answer = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        update = self.to_out(answer).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + per_image(scale) * (update if self.gate is None else self.gate * update)


class ZeroConv(nn.Module):
    """[d; h + s Conv1x1(c)], with the convolution zero at the start: the identity."""

    def __init__(self, control_channels: int, skip_channels: int) -> None:
        super().__init__()
        self.skip = zeroed(nn.Conv2d(control_channels, skip_channels, 1))

    def forward(self, control: Tensor, skip: Tensor, decoder: Tensor | None = None, scale: Scale = 1.0) -> Tensor:
        """(B, skip + decoder, H, W)."""
        return joined(decoder, skip if is_zero(scale) else skip + per_image(scale) * self.skip(control))


def zeroed(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def joined(decoder: Tensor | None, skip: Tensor) -> Tensor:
    """Decoder first, as SDXL concatenates."""
    return skip if decoder is None else torch.cat([decoder, skip], dim=1)


def places(image: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H W, C)."""
    return image.flatten(2).transpose(1, 2)


def is_zero(scale: Scale) -> bool:
    return isinstance(scale, (int, float)) and scale == 0


def per_image(scale: Scale) -> Scale:
    """One number, or (B,) as (B, 1, 1, 1)."""
    return scale.reshape(-1, 1, 1, 1) if isinstance(scale, Tensor) else scale


def blend(plain: Tensor, modulated: Tensor, scale: Scale, gate: Tensor | None) -> Tensor:
    weight = per_image(scale) if gate is None else per_image(scale) * gate
    return weight * modulated + (1 - weight) * plain
