"""What a run says of itself: a line now and then, `metrics.jsonl`, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from degrade.strict import ConfigError
from pipeline.stages import duration

from .config import Wandb

METRICS = "metrics.jsonl"


class Meters:
    """Means since the last line. `images` of all ranks; seconds by this rank's clock."""

    def __init__(self, device: torch.device, operations: float, peak: float | None) -> None:
        self.device, self.operations, self.peak = device, operations, peak
        self.begin()

    def begin(self) -> None:
        self.sums: dict[str, float] = {}
        self.images = self.steps = 0
        self.waited, self.started = 0.0, time.perf_counter()

    def add(self, images: int, values: Mapping[str, float], waited: float) -> None:
        self.images, self.steps, self.waited = self.images + images, self.steps + 1, self.waited + waited
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def exclude(self, seconds: float) -> None:
        """Time that was not training: validation, for example."""
        self.started += seconds

    def line(self, ranks: int) -> dict[str, float]:
        """The means, the rates, and what was waited for; afterwards it begins anew."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        found = {name: total / self.steps for name, total in self.sums.items()}
        found |= {"images_per_s": self.images / seconds, "data_wait": min(1.0, self.waited / seconds),
                  "memory_gib": memory_gib(self.device)}
        done = self.operations * self.images / seconds / ranks
        found["tflops"] = done / 1e12
        if self.peak:
            found["mfu"] = done / (self.peak * 1e12)
        self.begin()
        return found


def memory_gib(device: torch.device) -> float:
    """The peak on a GPU since the last question; on a CPU what the process has."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2 ** 30
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return psutil.Process().memory_info().rss / 2 ** 30


class Log:
    """Where the lines go. Lines of steps that are done again, after a kill, are taken out."""

    def __init__(self, folder: Path, step: int, wandb: Wandb | None, config: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS
        keep_until(self.path, step)
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        from torch.utils.tensorboard import SummaryWriter
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.wandb = start_wandb(wandb, folder, config) if wandb else None

    def line(self, step: int, images: int, values: Mapping[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "images": images, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log({"images": images, **values}, step=step)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """(H, W, 3) uint8."""
        self.board.add_image(name, pixels, step, dataformats="HWC")
        if self.wandb is not None:
            import wandb
            self.wandb.log({name: wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def check_wandb(config: Wandb | None) -> None:
    """Raises ConfigError: it is configured, and not installed."""
    if config is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError("wandb is configured and not installed: pip install wandb, or leave the section out")


def start_wandb(config: Wandb, folder: Path, values: dict[str, Any]) -> Any:
    """The run of this folder there, whose id lies beside the log: a resumed run goes on with it."""
    import wandb
    known = folder / "wandb-id.txt"
    if not known.is_file():
        known.write_text(uuid.uuid4().hex, encoding="utf-8")
    return wandb.init(project=config.project, name=config.name, dir=str(folder), config=values, resume="allow",
                      id=known.read_text(encoding="utf-8"))


def keep_until(path: Path, step: int) -> None:
    """Takes out lines of later steps, and one that a kill cut short."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    partial.replace(path)


def told(step: int, steps: int, values: Mapping[str, float], batch: int) -> str:
    """One line for people."""
    rate = values["images_per_s"]
    left = duration((steps - step) * batch / rate) if rate else "?"
    losses = ", ".join(f"{name} {value:.4g}" for name, value in values.items()
                       if name not in ("images_per_s", "data_wait", "memory_gib", "tflops", "mfu", "rate"))
    mfu = f", MFU {values['mfu']:.0%}" if "mfu" in values and math.isfinite(values["mfu"]) else ""
    return (f"step {step:,} of {steps:,}: {losses}; {rate:.1f} images/s{mfu}, data wait {values['data_wait']:.1%}, "
            f"{values['memory_gib']:.1f} GiB, about {left} left")
