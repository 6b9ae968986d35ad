"""What a task gives to the loop: networks with a loss per sample, and nothing about steps, ranks or files of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from degrade.strict import ConfigError, Strict

from .named import Named

if TYPE_CHECKING:
    from .batches import Batch

Losses = dict[str, Tensor]          # (B,) float32 each; "loss" is what is minimised, the others are told
GRID = (50, 250, 500, 750, 950)     # noise levels at which validation measures


class Objective(nn.Module, ABC):
    """Networks of which some are trained, as one module: the loop wraps it, calls it and saves what requires gradients.

    `prepare` is what needs no gradients (frozen encoders, noise, text), `forward` the rest.
    """

    needs_lq: ClassVar[bool] = True
    levels: ClassVar[tuple[int, ...]] = ()      # noise levels that `prepare` may be given; () for a task without

    @abstractmethod
    def prepare(self, batch: Batch, draws: Named, level: int | None = None) -> dict[str, Tensor]:
        """The inputs of `forward`. level: the noise level of all samples, instead of a drawn one for each."""

    @abstractmethod
    def forward(self, inputs: dict[str, Tensor]) -> Losses:
        """The losses of each sample."""

    @abstractmethod
    def preview(self, batch: Batch, draws: Named) -> dict[str, Tensor]:
        """Named pictures of a batch, (B, 3, H, W) in [0, 1] each, to be laid side by side."""

    @abstractmethod
    def save(self, folder: Path, batch: Batch, dtype: torch.dtype) -> None:
        """Writes what was trained, with all that is needed to use it. batch: a few samples, for what is measured."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The modules that are sharded and compiled one by one, frozen ones included."""

    def layers(self) -> list[nn.Module]:
        """The modules whose maps are computed again in the backward pass, with activation checkpointing."""
        kinds = ("ResnetBlock2D", "BasicTransformerBlock", "ZeroSFT", "ZeroCrossAttention")
        return [module for module in self.modules() if type(module).__name__ in kinds]


class Task(Strict):
    """The configuration of a task."""

    name: str

    def check(self) -> None:
        """Refuses what can be refused without loading anything.

        Raises:
            ConfigError: a folder that is missing or of another kind.
        """

    def build(self, device: torch.device) -> Objective:
        """The networks, with their weights; on the meta device without."""
        raise NotImplementedError

    def made_from(self) -> dict[str, str]:
        """Fingerprints of the models that it starts from, for checkpoints."""
        return {}


def signed(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def shown(image: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], clamped."""
    return ((image.float() + 1) / 2).clamp(0, 1)


def per_sample(values: Tensor) -> Tensor:
    """Means over all but the batch, float32."""
    return values.float().flatten(1).mean(1)


def network(kind: Any, folder: Path, device: torch.device, trained: bool = False) -> Any:
    """A network of diffusers or transformers from its folder; float32 if trained, else bfloat16 on CUDA.

    Raises:
        ConfigError: no such folder, or weights that do not fit.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json: it is no folder of a {kind.__name__}")
    dtype = torch.bfloat16 if device.type == "cuda" and not trained else torch.float32
    if device.type == "meta":
        made = on_meta(kind, folder)
    elif hasattr(kind, "load_config"):
        made = kind.from_pretrained(folder, torch_dtype=dtype, variant=variant_of(folder))
    else:
        made = kind.from_pretrained(folder, dtype=dtype, variant=variant_of(folder))
    return made.requires_grad_(trained).to(device)


def variant_of(folder: Path) -> str | None:
    from models.supir_index import stored_variant
    return stored_variant(folder)


def on_meta(kind: Any, folder: Path) -> nn.Module:
    """The network's shapes, from its configuration alone."""
    with torch.device("meta"):
        if hasattr(kind, "load_config"):
            return kind.from_config(kind.load_config(folder))
        return kind(kind.config_class.from_pretrained(folder))
