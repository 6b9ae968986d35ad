"""The configuration of a run: one YAML file, checked whole before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from degrade.strict import ConfigError, OnceLoader, Strict, check

from .batches import Data
from .tasks import AnyTask

Images = int        # everything is counted in images: a figure means the same for every batch size


class Optimizer(Strict):
    """How weights move."""

    kind: Literal["adamw", "adamw8bit"] = Field("adamw", description="adamw8bit: states in 8 bits, by bitsandbytes")
    rate: float = Field(1e-5, gt=0, description="learning rate; SUPIR's is 1e-5")
    schedule: Literal["constant", "cosine"] = Field("constant", description="after the warm-up; cosine falls to `floor`"
                                                                            " at the end of the run")
    warmup: Images = Field(0, ge=0, description="images over which the rate rises from 0")
    floor: float = Field(0.0, ge=0, le=1, description="share of the rate at which cosine ends")
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    decay: float = Field(0.01, ge=0, description="weight decay, of matrices and kernels only")
    clip: float | None = Field(1.0, gt=0, description="largest norm of the gradient; null: not clipped")


class Ema(Strict):
    """The running mean of the weights, which is what a run saves for use (Karras et al. 2022, table F.1)."""

    half_life: Images = Field(500_000, gt=0, description="images after which a step counts half")
    ramp: float | None = Field(0.05, gt=0, description="half_life is at most this share of the images seen; null: not")


class Checkpoints(Strict):
    """What is kept of a run, so that it can go on."""

    every: Images = Field(100_000, gt=0, description="images between two checkpoints")
    keep: int = Field(3, ge=1, description="how many of the last are kept")
    milestone: Images | None = Field(None, gt=0, description="of which multiples every checkpoint is kept")


class Validation(Strict):
    """Fixed images at fixed noise levels, by the running mean of the weights."""

    every: Images = Field(100_000, gt=0, description="images between two validations")
    corpus: list[str] | None = Field(None, description="workspaces of images that are not trained on; by default the "
                                                       "first samples of the corpus itself")
    images: int = Field(16, ge=1)
    previews: int = Field(4, ge=0, description="of these images, how many are shown, in previews/ and TensorBoard")


class Wandb(Strict):
    """Weights & Biases, where it is installed."""

    project: str
    name: str | None = None


class Training(Strict):
    """A run. What is not given has the default that a user should have."""

    task: AnyTask
    data: Data
    out: Path = Field(description="folder of the run: checkpoints, logs, previews, and at the end `model/`")
    images: Images = Field(gt=0, description="images until the end")
    batch: int = Field(256, ge=1, description="of all devices together")
    micro_batch: int | None = Field(None, ge=1, description="on one device at once; by default its part of the batch")
    seed: int = Field(0, description="of order, crops, degradation, noise and dropout")
    optimizer: Optimizer = Optimizer()
    ema: Ema | None = Ema()
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: bf16 on CUDA")
    parallel: Literal["ddp", "fsdp"] = Field("ddp", description="fsdp: weights, gradients and states cut over the "
                                             "devices; for SUPIR not needed on cards of 80 GB")
    compile: bool = Field(False, description="blocks by torch.compile; minutes at the start")
    checkpointing: bool = Field(False, description="maps are computed again in the backward pass: less memory, a third "
                                                   "more arithmetic")
    deterministic: bool = Field(True, description="operations that repeat bit by bit, on CUDA too")
    checkpoints: Checkpoints = Checkpoints()
    validation: Validation = Validation()
    log_every: int = Field(50, ge=1, description="steps between two lines of the log")
    wandb: Wandb | None = None
    save_dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="of the weights in `model/`")

    @model_validator(mode="after")
    def fits(self) -> Training:
        if self.task.name != "supir.autoencoder" and self.data.crop % 64:
            raise ValueError(f"data.crop: {self.data.crop} is no multiple of 64, the least picture that the middle of "
                             "the prior divides evenly")
        if self.parallel == "fsdp" and self.optimizer.kind == "adamw8bit":
            raise ValueError("parallel: fsdp cuts tensors, which bitsandbytes does not take; choose adamw or ddp")
        if self.images < self.batch:
            raise ValueError(f"images: {self.images} are less than one batch of {self.batch}")
        return self

    @property
    def steps(self) -> int:
        return self.images // self.batch

    def micro(self, ranks: int) -> int:
        """Samples on one device at once; whether the batch divides by them, the loader sees."""
        return self.micro_batch or max(1, self.batch // ranks)


# What may change between stopping and going on, because samples and weights do not depend on it (but for rounding).
FREE = ("out", "micro_batch", "precision", "parallel", "compile", "checkpointing", "deterministic", "checkpoints",
        "validation", "log_every", "wandb", "save_dtype", "data.workers", "data.prefetch", "data.degrade_on",
        "data.corpus", "data.reading", "task.prior", "task.encoder", "task.start", "task.preset", "task.preview_steps",
        "task.told.cache", "task.include_prior", "task.licence",
        "task.described")


def load(path: str | Path, settings: list[str] | None = None) -> Training:
    """A configuration from YAML, with some keys set: `task.depth=paper`, `batch=64`.

    Relative paths in it are relative to the folder in which the program runs.

    Raises:
        ConfigError: names the file, the key, the value and the remedy.
    """
    path = Path(path)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), OnceLoader) or {}
    except FileNotFoundError:
        raise ConfigError(f"{path} is not there; configs/ has examples") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    for setting in settings or []:
        put(values, setting)
    return check(Training, values, str(path))


def put(values: dict[str, Any], setting: str) -> None:
    """Sets one key by its path; the value is YAML."""
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {setting}: write it as KEY=VALUE, such as task.depth=paper or batch=64")
    *path, last = key.split(".")
    for step in path:
        values = values.setdefault(step, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {setting}: {step} is a value and not a section")
    values[last] = yaml.load(text, OnceLoader)


def flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return found


def identity(config: Training) -> dict[str, Any]:
    """The part of a configuration that decides what is learnt, as a checkpoint keeps it."""
    values = flat(config.model_dump(mode="json"))
    return {key: value for key, value in values.items()
            if not any(key == free or key.startswith(f"{free}.") for free in FREE)}


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In words, what of a configuration differs from the one of a checkpoint; a longer constant run is the same run."""
    same = {"images"} if before.get("optimizer.schedule") == now.get("optimizer.schedule") == "constant" else set()
    return [f"{key} was {before.get(key, 'not set')} and is {now.get(key, 'not set')}"
            for key in sorted(before.keys() | now.keys()) if key not in same and before.get(key) != now.get(key)]

