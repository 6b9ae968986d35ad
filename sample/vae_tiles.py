"""Encoding and decoding of large images with the memory of one tile, and the result of the whole image.

What couples distant pixels in an autoencoder are its group norms and its attention. Tiles with statistics of their
own differ in colour and contrast; so all tiles are brought to a norm first, their statistics joined, and then all go
on from there. Between norms every tile computes the border that its convolutions look over, so nothing is blended.
Attention, on the smallest map, is computed in blocks with a running softmax (Milakov and Gimelshein 2018; the idea of
FlashAttention), also exact.

On the device: one tile. In memory of the host: maps between two norms, at most three at a time, as long as one takes no
more than `keep` bytes. A larger one is not kept; the tiles are computed again from the last that is. With `keep=0`
only the smallest map is ever stored, in the middle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import nn

from .tiles import Window
from .vae_layers import Add, Attention, Layer, Norm, Size, Statistics, decoder_layers, encoder_layers, sizes

TILE = 512                  # pixels of the image along each side
KEEP = 4 << 30              # bytes: all of SDXL's maps up to 2048 x 2048 pixels in float32


@torch.no_grad()
def encode(vae: nn.Module, pixels: torch.Tensor, *, encoder: nn.Module | None = None, tile: int = TILE,
           keep: int = KEEP, store: str | torch.device = "cpu") -> torch.Tensor:
    """The posterior's moments, as `vae.encode(pixels)` computes them from the whole image.

    Args:
        vae: a diffusers AutoencoderKL.
        pixels: (B, 3, H, W) in [-1, 1], any sides.
        encoder: another encoder than that of the autoencoder, such as a degradation-robust copy.
        tile: pixels along a side of a tile.
        keep: bytes of a map that may wait on `store`; less memory, more time.
        store: where maps wait.

    Returns:
        (B, 2C, H / 8, W / 8): mean and logarithmic variance, not scaled.

    Raises:
        ValueError: an autoencoder of another kind.
    """
    encoder = encoder or vae.encoder
    if max(pixels.shape[-2:]) <= tile:
        moments = encoder(pixels)
        return vae.quant_conv(moments) if vae.quant_conv else moments
    layers = encoder_layers(encoder, vae.quant_conv)
    return _Run(layers, pixels, tuple(pixels.shape[-2:]), tile, keep, store).result()


@torch.no_grad()
def decode(vae: nn.Module, latents: torch.Tensor, *, tile: int = TILE, keep: int = KEEP,
           store: str | torch.device = "cpu") -> torch.Tensor:
    """Pixels, as `vae.decode(latents).sample` computes them from the whole latent.

    Args and errors are those of `encode`, with latents (B, C, h, w) not scaled: divided by `scaling_factor`.

    Returns:
        (B, 3, 8 h, 8 w) around [-1, 1], not clamped.
    """
    layers = decoder_layers(vae.decoder, vae.post_quant_conv)
    full = sizes(layers, tuple(latents.shape[-2:]))[-1]
    if max(full) <= tile:
        return vae.decoder(vae.post_quant_conv(latents) if vae.post_quant_conv else latents)
    return _Run(layers, latents, full, tile, keep, store).result()


class _Run:
    """One image on its way through the layers.

    `maps[n]` is the whole input of layer number n. Of these, there are the latest one and those that a residual
    block under way adds at its end. `norms[n]` is what norm number n multiplies by and adds.
    """

    def __init__(self, layers: Sequence[Layer], first: torch.Tensor, full: Size, tile: int, keep: int,
                 store: str | torch.device) -> None:
        self.layers, self.sizes = layers, sizes(layers, tuple(first.shape[-2:]))
        self.full, self.tile, self.keep, self.store = full, tile, keep, store
        weight = next(parameter for layer in layers if hasattr(layer, "module")
                      for parameter in layer.module.parameters())
        self.device, self.back_to = weight.device, first.device
        self.maps, self.norms = {0: first.to(weight.dtype)}, {}
        self.added_at = {layer.of: end for end, layer in enumerate(layers) if isinstance(layer, Add)}

    def result(self) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            if isinstance(layer, Norm):
                self._measure(number, layer)
            elif isinstance(layer, Attention):
                self._keep(number + 1, self._attend(number))
        return self._computed(len(self.layers), write=True).to(self.back_to)

    @property
    def latest(self) -> int:
        return max(self.maps)

    def _keep(self, number: int, whole: torch.Tensor) -> None:
        self.maps[number] = whole
        for other in list(self.maps):
            if other < number and self.added_at.get(other, 0) < number:
                del self.maps[other]

    def _measure(self, number: int, norm: Norm) -> None:
        """Finds the statistics of a norm's input, and keeps that input if it may."""
        statistics = Statistics(norm.module.num_groups)
        height, width = self.sizes[number]
        size = len(self.maps[self.latest]) * norm.module.num_channels * height * width * norm.module.weight.itemsize
        # Inside a block its beginning is needed too.
        begun = all(start in self.maps for start, end in self.added_at.items() if start < number <= end)
        before_attention = isinstance(self.layers[number + 1], Attention)
        write = number != self.latest and (before_attention or (begun and size <= self.keep))
        whole = self._computed(number, write, statistics)
        self.norms[number] = statistics.scale_and_shift(norm.module)
        if write:
            self._keep(number, whole)

    def _computed(self, number: int, write: bool, statistics: Statistics | None = None) -> torch.Tensor | None:
        """The input of layer `number`, tile by tile: measured, or returned as a whole, or both."""
        whole = None
        for window in self._tiles(number):
            part = self._window(number, window)
            if statistics:
                statistics.add(part)
            if write:
                if whole is None:
                    whole = torch.empty(*part.shape[:2], *self.sizes[number], dtype=part.dtype, device=self.store)
                whole[window.slices] = part.to(self.store)
        return whole

    def _tiles(self, number: int) -> Iterator[Window]:
        """Windows that divide the input of a layer: the same parts of the picture at every resolution."""
        edges = []
        for side, full in zip(self.sizes[number], self.full, strict=True):
            count = -(-full // self.tile)
            edges.append([side * part // count for part in range(count + 1)])
        for top, bottom in pairwise(edges[0]):
            for left, right in pairwise(edges[1]):
                if top < bottom and left < right:
                    yield Window(top, bottom, left, right)

    def _window(self, number: int, window: Window) -> torch.Tensor:
        """A window of the input of layer `number`, computed from the latest map."""
        wanted = [window]               # after the last layer, before it, …
        for at in reversed(range(self.latest, number)):
            wanted.append(self.layers[at].needs(wanted[-1], self.sizes[at]))
        here, held = wanted.pop(), {}
        x = self.maps[self.latest][here.slices].to(self.device)
        for at in range(self.latest, number):
            layer, before, here = self.layers[at], here, wanted.pop()
            if self.added_at.get(at, number) < number:
                held[at] = x, before
            if isinstance(layer, Norm):
                x = layer.normalised(x, *self.norms[at])
            elif isinstance(layer, Add):
                x = layer.added(x, self._residual(layer.of, held, here))
            else:
                x = layer(x, here, self.sizes[at])
        return x

    def _residual(self, start: int, held: dict[int, tuple[torch.Tensor, Window]], window: Window) -> torch.Tensor:
        """A window of a block's beginning, from this tile's way or from its map."""
        if start not in held:
            return self.maps[start][window.slices].to(self.device)
        x, had = held.pop(start)
        return x[..., window.top - had.top:window.bottom - had.top, window.left - had.left:window.right - had.left]

    def _attend(self, number: int) -> torch.Tensor:
        """The whole output of attention, from its norm's stored input."""
        norm, attention = self.layers[number - 1], self.layers[number].module
        source = self.maps[number - 1]
        tokens, result = source.flatten(2), torch.empty_like(source, device=self.store)
        parts = [side * self.tile // full for side, full in zip(self.sizes[number], self.full, strict=True)]
        block = max(parts[0] * parts[1], 64)

        def normalised(first: int) -> tuple[torch.Tensor, torch.Tensor]:
            raw = tokens[..., first:first + block].to(self.device)
            return raw, norm.normalised(raw[..., None], *self.norms[number - 1])[..., 0].transpose(1, 2)

        starts = range(0, tokens.shape[2], block)
        for first in starts:
            raw, queries = normalised(first)
            mixed = attended(attention, queries, (normalised(other)[1] for other in starts))
            whole = (attention.to_out[0](mixed).transpose(1, 2) + raw) / attention.rescale_output_factor
            result.flatten(2)[..., first:first + block] = whole.to(self.store)
        return result


def attended(attention: nn.Module, queries: torch.Tensor, blocks: Iterator[torch.Tensor]) -> torch.Tensor:
    """Attention of tokens (B, n, C) to all tokens, which come in blocks (B, m, C); before the projection out."""
    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (attention.heads, -1)).transpose(1, 2)

    q = heads(attention.to_q(queries))
    highest = torch.full_like(q[..., :1], -torch.inf, dtype=torch.float32)
    total, mixed = torch.zeros_like(highest), torch.zeros_like(q, dtype=torch.float32)
    for block in blocks:
        k, v = heads(attention.to_k(block)), heads(attention.to_v(block))
        scores = (q @ k.transpose(2, 3)).float() * q.shape[-1] ** -0.5
        higher = torch.maximum(highest, scores.amax(-1, keepdim=True))
        factor, shares = (highest - higher).exp(), (scores - higher).exp_()
        total = total * factor + shares.sum(-1, keepdim=True)
        mixed = mixed * factor + (shares.to(v.dtype) @ v).float()
        highest = higher
    return (mixed / total).to(queries.dtype).transpose(1, 2).flatten(2)
