"""How much memory a restoration may take: what lies on the device, and in how large pieces it works."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from degrade.strict import ConfigError
from models.families import describe_folder
from models.supir_folder import index_of, prior_part

GIB = 2 ** 30


@dataclass(frozen=True)
class Memory:
    """A level of memory, on a device."""

    name: str
    device: torch.device
    dtype: torch.dtype
    keep: bool                  # all networks stay on the device; otherwise each comes when it is used
    halves_together: bool       # both prompts of guidance in one batch
    tile: int                   # pixels of a window of sampling
    windows: int                # windows in one batch
    vae_tile: int               # pixels of a tile of the autoencoder

    @classmethod
    def at(cls, name: str = "fast", device: str = "auto", dtype: torch.dtype | None = None) -> Memory:
        """`fast` keeps everything on the device, `balanced` brings each network when it is used, `low` also works in
        the smallest pieces.

        Raises:
            ConfigError: no such level, or no such device.
        """
        if name not in LEVELS:
            raise ConfigError(f"memory level {name!r}: there are {', '.join(LEVELS)}")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"device {device!r}: PyTorch sees no GPU here; use auto or cpu")
        if dtype is None:
            dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        return cls(name, torch.device(device), dtype, **LEVELS[name])

    def estimate(self, weights: dict[str, int], width: float, side: int) -> float:
        """GiB on the device at the peak for a square of `side` pixels: the networks that are there at once, and maps.

        weights: parameters of each network; width: of its maps, SDXL's is 1. Arithmetic and not measured: per latent
        pixel the skips of both encoders (about 6,000 channels' worth at full resolution) and a block's maps (8,000);
        per pixel of a tile of the autoencoder ten maps of 128 channels.
        """
        size = self.dtype.itemsize
        there = sum(weights.values()) if self.keep else max(weights["net"], weights["vae"] + weights["robust"])
        batch = (2 if self.halves_together else 1) * self.windows
        maps = max((min(side, self.tile) // 8) ** 2 * batch * 14_000, min(side, self.vae_tile) ** 2 * 1280)
        return (there + maps * width) * size / GIB


LEVELS: dict[str, dict[str, Any]] = {
    "low": {"keep": False, "halves_together": False, "tile": 1024, "windows": 1, "vae_tile": 512},
    "balanced": {"keep": False, "halves_together": True, "tile": 1536, "windows": 1, "vae_tile": 1024},
    "fast": {"keep": True, "halves_together": True, "tile": 2048, "windows": 1, "vae_tile": 2048},
}


class Placed:
    """Networks that are on the device when they are used."""

    def __init__(self, modules: dict[str, torch.nn.Module], memory: Memory) -> None:
        self.modules, self.memory = modules, memory
        if memory.keep:
            for module in modules.values():
                module.to(memory.device)

    @contextlib.contextmanager
    def on_device(self, *names: str) -> Iterator[tuple[torch.nn.Module, ...]]:
        """The named networks, there until the block ends.

        Raises:
            ConfigError: they do not fit, or what they do does not; says which level would.
        """
        modules = tuple(self.modules[name] for name in names)
        try:
            for module in modules:
                module.to(self.memory.device)
            yield modules
        except torch.OutOfMemoryError as error:
            lower = [name for name in LEVELS if list(LEVELS).index(name) < list(LEVELS).index(self.memory.name)]
            hint = f"use --memory {lower[-1]}" if lower else "use a smaller --tile, or a device with more memory"
            raise ConfigError(f"{self.memory.device} ran out of memory in {', '.join(names)} at --memory "
                              f"{self.memory.name}; {hint} ({str(error).splitlines()[0]})") from None
        finally:
            if not self.memory.keep and self.memory.device.type != "cpu":
                for module in modules:
                    module.to("cpu")
                torch.cuda.empty_cache()


def stored(folder: Path) -> tuple[dict[str, int], float]:
    """Parameters of each network of a SUPIR folder, from the heads of its files, and its width beside SDXL's.

    Raises:
        CheckpointError: it is no SUPIR folder, or its prior is gone.
    """
    prior = index_of(folder)["prior"]
    own, its = describe_folder(folder)["parts"], describe_folder(prior)["parts"]
    counts = {"net": its["unet"]["parameters"] + own["adaptor"]["parameters"], "vae": its["vae"]["parameters"],
              "robust": own["robust_encoder"]["parameters"],
              "text": sum(part["parameters"] for name, part in its.items() if name.startswith("text_encoder"))}
    return counts, prior_part(prior, "unet")["block_out_channels"][0] / 320


def peak_gib(device: torch.device) -> float:
    """GiB that this process took at its peak: on the device, or of the host if the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    import resource
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
