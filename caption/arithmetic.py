"""What captions and generated images cost at best: operations, bytes moved, memory; no model is loaded.

Ideal figures: matrix units at the rate that large multiplications reach, memory at its printed bandwidth, nothing
lost to norms, launches, padding or waiting. `forecast.EFFICIENCY` says what to plan with.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

from degrade.strict import ConfigError

from .cards import Card

USABLE = 0.9            # share of a card's memory for weights and cache, vLLM's default; the rest is activations
QUESTION_TOKENS = 60    # of a prompt like SUPIR's with the turns around it
BYTES_PER_WEIGHT = {"none": 2.0, "8bit": 1.0, "4bit": 0.55}     # 4bit: with the scales of its blocks


@dataclass(frozen=True)
class Vision:
    """The image tower: `tokens` patches per crop through `layers` blocks of a plain transformer."""

    layers: int
    hidden: int
    mlp: int
    tokens: int

    @property
    def parameters(self) -> float:
        return self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.mlp)

    @property
    def tflop(self) -> float:
        """Of one crop: 2 operations per weight and token, and attention over all pairs (4 n² d per layer)."""
        return (2 * self.parameters * self.tokens + 4 * self.layers * self.tokens**2 * self.hidden) / 1e12


@dataclass(frozen=True)
class Captioner:
    """A vision-language model as its published configuration has it; image tokens are those of a 1024-pixel tile."""

    name: str
    layers: int
    hidden: int
    mlp: int
    kv_width: int           # key (or value) numbers per token and layer; less than `hidden` with grouped queries
    vocabulary: int
    vision: Vision
    image_tokens: int
    crops: int = 1          # the tower sees the tile so many times

    @property
    def body(self) -> float:
        """Weights that every token passes: attention and the gated MLP, without the vocabulary's two tables."""
        return self.layers * (2 * self.hidden**2 + 2 * self.hidden * self.kv_width + 3 * self.hidden * self.mlp)

    @property
    def parameters(self) -> float:
        return self.body + 2 * self.vocabulary * self.hidden + self.vision.parameters

    @property
    def prompt_tokens(self) -> int:
        return self.image_tokens + QUESTION_TOKENS

    @property
    def kv_bytes(self) -> float:
        """Cache of one token: keys and values of every layer in two bytes each."""
        return 2 * 2 * self.layers * self.kv_width

    @property
    def prefill_tflop(self) -> float:
        """Reading the image and the question once; causal attention sees half of the pairs (2 n² d per layer)."""
        n = self.prompt_tokens
        language = 2 * self.body * n + 2 * self.layers * n**2 * self.hidden
        return language / 1e12 + self.crops * self.vision.tflop


CLIP_L = Vision(24, 1024, 4096, 577)
SIGLIP = Vision(27, 1152, 4304, 729)
CAPTIONERS = {each.name: each for each in (
    Captioner("llava-1.5-7b", 32, 4096, 11008, 4096, 32064, CLIP_L, 576),
    Captioner("llava-1.5-13b", 40, 5120, 13824, 5120, 32064, CLIP_L, 576),
    Captioner("llava-v1.6-vicuna-7b", 32, 4096, 11008, 4096, 32064, CLIP_L, 2929, 5),
    Captioner("llava-v1.6-vicuna-13b", 40, 5120, 13824, 5120, 32064, CLIP_L, 2929, 5),
    Captioner("llava-v1.6-mistral-7b", 32, 4096, 14336, 1024, 32064, CLIP_L, 2929, 5),
    Captioner("llava-onevision-qwen2-7b", 28, 3584, 18944, 512, 152064, SIGLIP, 7371, 10),
)}


def find_captioner(name: str) -> Captioner:
    """The captioner of that name.

    Raises:
        ConfigError: no such captioner; names the nearest and all of them.
    """
    if name in CAPTIONERS:
        return CAPTIONERS[name]
    near = difflib.get_close_matches(name.lower(), CAPTIONERS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"--caption-model {name!r} is not known; {hint}There are: {', '.join(CAPTIONERS)}")


@dataclass(frozen=True)
class Replica:
    """A captioner on as many cards as hold it: bytes of its weights, captions at a time, ideal captions a second."""

    gpus: int
    weights_gb: float
    batch: int
    captions_per_s: float

    @property
    def per_gpu(self) -> float:
        return self.captions_per_s / self.gpus


def replica(model: Captioner, tokens: int, card: Card, quantisation: str = "none") -> Replica:
    """The fewest cards whose memory holds the weights and the cache of at least one caption, and their ideal rate.

    tokens: length of a caption. Prefill is bound by operations. A decoding step reads all weights and the cache of
    every caption under way (bandwidth), or multiplies (operations), whichever takes longer; the batch is what fits.
    Several cards count as one of so many times the memory, bandwidth and operations.
    """
    weights = model.parameters * BYTES_PER_WEIGHT[quantisation]
    whole = model.kv_bytes * (model.prompt_tokens + tokens)
    gpus = math.ceil((weights + whole) / (USABLE * card.memory_gb * 1e9))
    batch = int((USABLE * card.memory_gb * 1e9 * gpus - weights) // whole)
    half_way = model.kv_bytes * (model.prompt_tokens + tokens / 2)      # the cache of a caption, on average
    bandwidth, operations = gpus * card.bandwidth_tb_s * 1e12, gpus * card.tflops * 1e12
    step = max((weights + batch * half_way) / bandwidth, 2 * model.body * batch / operations)
    seconds = model.prefill_tflop * 1e12 / operations + tokens * step / batch
    return Replica(gpus, weights / 1e9, batch, 1 / seconds)


# TFLOP of one forward pass at batch 1, counted at 512 and at 1024 pixels (2 per multiply-add).
UNET, VAE_ENCODE, VAE_DECODE = (1.589, 6.761), (1.117, 4.879), (2.515, 10.470)


def sdxl_tflop(mode: str, steps: int, strength: float = 0.5, size: int = 1024) -> float:
    """TFLOP of one SDXL image: two UNet passes a step (guidance), one VAE decode, for image_to_image one encode too.

    image_to_image does `int(steps * strength)` of the steps, as diffusers. Other sizes lie on the power of the
    size through the two that were counted.
    """
    from_image = mode == "image_to_image"
    done = max(1, int(steps * strength)) if from_image else steps
    return 2 * done * _at(UNET, size) + _at(VAE_DECODE, size) + from_image * _at(VAE_ENCODE, size)


def _at(counted: tuple[float, float], size: int) -> float:
    small, large = counted
    return large * (size / 1024) ** math.log2(large / small)
