"""What the prior is told while it is trained: captions, their dropout, the words of negative samples, and sizes."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from caption.prompts import load_quality
from caption.tokens import Tokens
from degrade.strict import Strict
from sample.text import SIZES, encode, prompts

from ..named import Named
from ..objective import network

if TYPE_CHECKING:
    from ..batches import Batch


class Told(Strict):
    """How captions and sizes are told."""

    dropout: float = Field(0.1, ge=0, le=1, description="share of samples that are told nothing, for guidance; the "
                                                        "paper does not give its own")
    quality: str = Field("supir", description="preset of the quality words")
    negative_group: str = Field("negative", description="group whose samples are told the negative words instead of "
                                                        "their captions (SUPIR, section 3.3)")
    positive: float = Field(0.0, ge=0, le=1, description="share of other samples whose caption is followed by the "
                                                         "positive words, as at restoration")
    sizes: Literal["constant", "true"] = Field("constant", description="what is said of original size, crop and target:"
                                               " 1024, 0, 1024 as SUPIR says at restoration, or each sample's own")
    cache: int = Field(1024, ge=1, description="captions whose embeddings are kept; 0.3 MB each for SDXL")


class Text(nn.Module):
    """Both frozen text encoders of a prior, with the embeddings of the captions that were met last."""

    def __init__(self, prior: Path, told: Told, device: torch.device) -> None:
        super().__init__()
        self.told, self.quality = told, load_quality(told.quality)
        self.tokenizers = [CLIPTokenizer.from_pretrained(prior / name) for name in ("tokenizer", "tokenizer_2")]
        self.encoders = nn.ModuleList([network(CLIPTextModel, prior / "text_encoder", device),
                                       network(CLIPTextModelWithProjection, prior / "text_encoder_2", device)])
        self.tokens = Tokens(self.tokenizers[0])
        self.known: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    def prompts(self, batch: Batch, draws: Named) -> list[str]:
        """What each sample is told."""
        dropped = draws.chance("dropout", self.told.dropout)
        positive = draws.chance("positive", self.told.positive)
        return ["" if drop else self.prompt(group, text, words)
                for drop, group, text, words in zip(dropped, batch.groups, batch.texts, positive, strict=True)]

    def prompt(self, group: str, caption: str, positive: bool) -> str:
        if group == self.told.negative_group:
            return self.quality.negative
        return prompts(caption, self.quality, self.tokens)[0] if positive else caption

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """(B, 77, D) last hidden states but one of both encoders, (B, P) the pooled projection."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if new:
            made = encode(new, self.tokenizers, list(self.encoders))
            for number, text in enumerate(new):
                self.known[text] = made.context[number].clone(), made.pooled[number].clone()
        for text in texts:
            self.known.move_to_end(text)
        context, pooled = zip(*(self.known[text] for text in texts), strict=True)
        while len(self.known) > max(self.told.cache, len(texts)):
            self.known.popitem(last=False)
        return torch.stack(context), torch.stack(pooled)

    def inputs(self, batch: Batch, draws: Named) -> dict[str, Tensor]:
        """What SDXL takes beside a latent and a level."""
        context, pooled = self(self.prompts(batch, draws))
        sizes = batch.sizes if self.told.sizes == "true" else torch.tensor([SIZES] * len(batch.keys))
        return {"context": context, "pooled": pooled, "sizes": sizes.to(context.device, torch.float32)}
