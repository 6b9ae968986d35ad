"""A diffusers autoencoder as a list of layers, each of which can compute any window of its output.

A window of a convolution's output depends on a slightly larger window of its input; where that would reach over the
edge of the whole map, and only there, zeros are filled in. A window computed so is the same part of the whole result,
whatever the windows. Two layers look at the whole map: group norms, which get their statistics from outside, and
attention, which `vae_tiles` runs on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from .tiles import Window

Size = tuple[int, int]


class Statistics:
    """Mean and variance per image and group of a map that comes in parts."""

    def __init__(self, groups: int) -> None:
        self.groups, self._parts = groups, []

    def add(self, part: torch.Tensor) -> None:
        """(B, C, h, w): another part, not yet seen."""
        grouped = part.reshape(len(part), self.groups, -1)
        variance, mean = torch.var_mean(grouped.float(), dim=2, correction=0)
        self._parts.append((grouped.shape[2], mean.cpu().double(), variance.cpu().double()))

    def scale_and_shift(self, norm: nn.GroupNorm) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, 1, 1) float32 each, on the norm's device: the norm as `scale x + shift`."""
        total = sum(count for count, _, _ in self._parts)
        mean = sum(count * mean for count, mean, _ in self._parts) / total
        variance = sum(count * (variance + (part - mean) ** 2) for count, part, variance in self._parts) / total
        channels = norm.num_channels // norm.num_groups
        inverse, mean = (value.repeat_interleave(channels, 1) for value in ((variance + norm.eps).rsqrt(), mean))
        scale = norm.weight.cpu().double() * inverse
        shift = norm.bias.cpu().double() - mean * scale
        return tuple(value.float().to(norm.weight.device)[..., None, None] for value in (scale, shift))


@dataclass(frozen=True)
class Pointwise:
    """An activation."""

    module: nn.Module

    def size(self, before: Size) -> Size:
        return before

    def needs(self, window: Window, before: Size) -> Window:
        return window

    def __call__(self, x: torch.Tensor, window: Window, before: Size) -> torch.Tensor:
        return self.module(x)


@dataclass(frozen=True)
class Norm(Pointwise):
    """A group norm; what it multiplies by and adds is found from the whole map, before it is applied to any window."""

    module: nn.GroupNorm

    @staticmethod
    def normalised(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(shift, x.float(), scale).to(x.dtype)


@dataclass(frozen=True)
class Add(Pointwise):
    """The end of a residual block: adds the input of layer number `of`, by way of `module` if the widths differ."""

    module: nn.Module
    of: int
    divisor: float

    def added(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return (self.module(residual) + x) / self.divisor


@dataclass(frozen=True)
class Attention(Pointwise):
    """Attention of every place to every other, residual included; the layer before it is its norm."""


@dataclass(frozen=True)
class Convolution:
    """A convolution, with `before` zeros at the top and left of the map and `after` at the bottom and right."""

    module: nn.Conv2d
    before: int
    after: int

    def size(self, before: Size) -> Size:
        kernel, stride = self.module.kernel_size[0], self.module.stride[0]
        return tuple((side + self.before + self.after - kernel) // stride + 1 for side in before)

    def _reach(self, first: int, end: int) -> tuple[int, int]:
        kernel, stride = self.module.kernel_size[0], self.module.stride[0]
        return first * stride - self.before, (end - 1) * stride - self.before + kernel

    def needs(self, window: Window, before: Size) -> Window:
        (top, bottom), (left, right) = self._reach(*window[:2]), self._reach(*window[2:])
        return Window(max(top, 0), min(bottom, before[0]), max(left, 0), min(right, before[1]))

    def __call__(self, x: torch.Tensor, window: Window, before: Size) -> torch.Tensor:
        (top, bottom), (left, right) = self._reach(*window[:2]), self._reach(*window[2:])
        missing = max(-left, 0), max(right - before[1], 0), max(-top, 0), max(bottom - before[0], 0)
        if any(missing):
            x = functional.pad(x, missing)
        return functional.conv2d(x, self.module.weight, self.module.bias, self.module.stride)


@dataclass(frozen=True)
class Double:
    """Every pixel four times."""

    def size(self, before: Size) -> Size:
        return 2 * before[0], 2 * before[1]

    def needs(self, window: Window, before: Size) -> Window:
        return Window(window.top // 2, -(-window.bottom // 2), window.left // 2, -(-window.right // 2))

    def __call__(self, x: torch.Tensor, window: Window, before: Size) -> torch.Tensor:
        x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        top, left = window.top % 2, window.left % 2
        return x[..., top:top + window.bottom - window.top, left:left + window.right - window.left]


Layer = Pointwise | Convolution | Double


def encoder_layers(encoder: nn.Module, quant_conv: nn.Conv2d | None) -> list[Layer]:
    """The layers from pixels to the posterior's moments."""
    layers: list[Layer] = [_convolution(encoder.conv_in)]
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            _resnet(layers, resnet)
        for downsampler in block.downsamplers or ():
            _expect(downsampler, norm=None, use_conv=True)
            after = 1 if downsampler.padding == 0 else downsampler.padding      # diffusers pads right and bottom
            layers.append(Convolution(downsampler.conv, downsampler.padding, after))
    _middle(layers, encoder.mid_block)
    return [*layers, *_last(encoder), *([_convolution(quant_conv)] if quant_conv else [])]


def decoder_layers(decoder: nn.Module, post_quant_conv: nn.Conv2d | None) -> list[Layer]:
    """The layers from latents to pixels."""
    layers: list[Layer] = [_convolution(post_quant_conv)] if post_quant_conv else []
    layers.append(_convolution(decoder.conv_in))
    _middle(layers, decoder.mid_block)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            _resnet(layers, resnet)
        for upsampler in block.upsamplers or ():
            _expect(upsampler, norm=None, use_conv=True, use_conv_transpose=False, interpolate=True)
            layers += [Double(), _convolution(upsampler.conv)]
    return [*layers, *_last(decoder)]


def sizes(layers: Sequence[Layer], first: Size) -> list[Size]:
    """Height and width before each layer, and after the last."""
    found = [first]
    for layer in layers:
        found.append(layer.size(found[-1]))
    return found


def _convolution(module: nn.Conv2d) -> Convolution:
    return Convolution(module, module.padding[0], module.padding[0])


def _last(network: nn.Module) -> list[Layer]:
    return [Norm(network.conv_norm_out), Pointwise(network.conv_act), _convolution(network.conv_out)]


def _middle(layers: list[Layer], block: nn.Module) -> None:
    _resnet(layers, block.resnets[0])
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            _expect(attention, spatial_norm=None, norm_q=None, norm_k=None, residual_connection=True)
            layers += [Norm(attention.group_norm), Attention(attention)]
        _resnet(layers, resnet)


def _resnet(layers: list[Layer], block: nn.Module) -> None:
    _expect(block, time_emb_proj=None, upsample=None, downsample=None)
    start = len(layers)
    layers += [Norm(block.norm1), Pointwise(block.nonlinearity), _convolution(block.conv1), Norm(block.norm2),
               Pointwise(block.nonlinearity), _convolution(block.conv2),
               Add(block.conv_shortcut or nn.Identity(), start, block.output_scale_factor)]


def _expect(module: nn.Module, **settings: object) -> None:
    """Refuses what would silently be computed wrong."""
    for name, value in settings.items():
        found = getattr(module, name, value)
        if found is not value and found != value:
            raise ValueError(f"tiles know autoencoders like SDXL's; in this one, {name} of a {type(module).__name__} "
                             f"is {found!r} and not {value!r}. Run it whole.")
