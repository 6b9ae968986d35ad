"""Cross-attention to a text that stays the same from step to step: its keys and values are projected once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional


class ConstantText:
    """A processor of diffusers' `Attention` that keeps the projections of the last text, known by the tensor itself."""

    def __init__(self) -> None:
        self.text: Tensor | None = None
        self.key = self.value = None

    def __call__(self, attention: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        """(B, N, C), attending to (B, T, D)."""
        if encoder_hidden_states is not self.text:
            self.key, self.value = (split(layer(encoder_hidden_states), attention.heads)
                                    for layer in (attention.to_k, attention.to_v))
            self.text = encoder_hidden_states
        query = split(attention.to_q(hidden_states), attention.heads)
        answer = functional.scaled_dot_product_attention(query, self.key, self.value, attn_mask=attention_mask)
        return attention.to_out[1](attention.to_out[0](answer.transpose(1, 2).flatten(2)))


def split(tokens: Tensor, heads: int) -> Tensor:
    """(B, N, C) to (B, heads, N, C / heads)."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


@contextlib.contextmanager
def constant_text(*networks: nn.Module) -> Iterator[int]:
    """Within the block, without gradients, every cross-attention to text keeps its projections; gives their number."""
    found = [module for network in networks for name, module in network.named_modules()
             if isinstance(module, Attention) and name.endswith("attn2")]
    before = [module.processor for module in found]
    for module in found:
        module.processor = ConstantText()
    try:
        with torch.no_grad():
            yield len(found)
    finally:
        for module, processor in zip(found, before, strict=True):
            module.processor = processor
