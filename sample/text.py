"""What SDXL is told: tokens, both text encoders, and the sizes beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from caption.prompts import Quality
from caption.tokens import LIMIT, Tokens, fit

SIZES = (1024, 1024, 0, 0, 1024, 1024)      # original, crop, target: what SUPIR says whatever the image
ROOM = 12                                   # tokens that quality words leave to a caption, whatever their length


@dataclass(frozen=True)
class Conditioning:
    """Of a batch of prompts: `context` (B, T, C), `pooled` (B, P), `sizes` (B, 6)."""

    context: Tensor
    pooled: Tensor
    sizes: Tensor

    def repeated(self, times: int) -> Conditioning:
        """The whole batch so many times."""
        return Conditioning(*(part.repeat(times, *[1] * (part.dim() - 1)) for part in self.parts()))

    def joined(self, other: Conditioning) -> Conditioning:
        """This batch, then the other."""
        return Conditioning(*(torch.cat(both) for both in zip(self.parts(), other.parts(), strict=True)))

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.context, self.pooled, self.sizes

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditioning:
        return Conditioning(self.context.to(device, dtype), self.pooled.to(device, dtype), self.sizes.to(device))


def prompts(caption: str, quality: Quality, tokens: Tokens, *, released: bool = False) -> tuple[str, str]:
    """The positive and the negative prompt of an image.

    The caption is cut so that the quality words fit CLIP's 77 tokens behind it. `released`: plain concatenation without
    a space, as the released code does, whose text encoders then cut the end, quality words first.
    """
    if released:
        return caption + quality.positive, quality.negative
    words, quality_words = " ".join(caption.split()), fit(quality.positive, tokens, LIMIT - ROOM)
    return (fit(words, tokens, LIMIT, keep=quality_words) if words else quality_words), quality.negative


@torch.no_grad()
def encode(texts: list[str], tokenizers: list[Any], encoders: list[Any],
           sizes: tuple[int, ...] = SIZES) -> Conditioning:
    """The last hidden states but one of both encoders side by side, and the second one's pooled projection."""
    states, pooled = [], None
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        ids = tokenizer(texts, padding="max_length", max_length=LIMIT, truncation=True, return_tensors="pt").input_ids
        output = encoder(ids.to(encoder.device), output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled = output[0]
    numbers = torch.tensor([sizes] * len(texts), dtype=torch.float32, device=pooled.device)
    return Conditioning(torch.cat(states, dim=-1), pooled, numbers)
