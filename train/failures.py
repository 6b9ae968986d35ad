"""What stops a run: numbers that are none, and memory that is not there; each named with what mends it."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.storage import WorkspaceError

from .batches import Batch
from .config import Training
from .parallel import local
from .pieces import replace

if TYPE_CHECKING:
    from .loop import Trainer


class NotFinite(WorkspaceError):
    """A loss or a gradient is NaN or infinite; the weights are those of before."""


class OutOfMemory(WorkspaceError):
    """The batch does not fit into the device's memory."""


def as_json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def explain(trainer: Trainer, taken: list[tuple[Batch, Tensor]], norm: Tensor) -> None:
    """Writes down which samples gave numbers that are none, each computed again alone, and stops.

    Raises:
        NotFinite: always.
    """
    guilty = [sample for batch, losses in taken for sample in _examined(trainer, batch, losses)]
    said = [sample for one in trainer.ranks.all(guilty) for sample in one]
    path = trainer.config.out / f"not-finite-step-{trainer.step + 1:09d}.json"
    if trainer.ranks.first:
        replace(path, as_json({"step": trainer.step + 1, "gradient_norm": str(norm.item()), "samples": said,
                               "batch": [key for batch, _ in taken for key in batch.keys]}))
    names = ", ".join(sample["key"] for sample in said[:5]) or "no sample by itself"
    raise NotFinite(f"step {trainer.step + 1}: a loss or gradient is not finite, from {names}; {path} lists them. The "
                    f"weights are those of step {trainer.step}, and the last checkpoint stands. Look at these samples; "
                    "if they are good, lower optimizer.rate or optimizer.clip, or set precision: fp32")


def _examined(trainer: Trainer, batch: Batch, losses: Tensor) -> list[dict[str, Any]]:
    found = []
    for position, key, loss in zip(batch.positions, batch.keys, losses.tolist(), strict=True):
        trainer.optimizer.zero_grad(set_to_none=True)
        alone = trainer.losses(trainer.loader.at([position]), last=False)["loss"]
        alone.sum().backward()
        wrong = [name for name, parameter in trainer.trained.items()
                 if parameter.grad is not None and not torch.isfinite(local(parameter.grad)).all()]
        if wrong or not math.isfinite(alone.item()):
            found.append({"key": key, "position": position, "loss": str(loss), "loss_alone": str(alone.item()),
                          "gradients": wrong[:20]})
    trainer.optimizer.zero_grad(set_to_none=True)
    return found


@contextlib.contextmanager
def memory_named(config: Training, micro: int) -> Iterator[None]:
    """Within the block, an allocation that fails says what the batch was and what makes it smaller."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError) and \
                "can't allocate memory" not in str(error):
            raise
        smaller = f"micro_batch: {micro // 2}" if micro > 1 else f"data.crop below {config.data.crop}"
        raise OutOfMemory(
            f"out of memory with micro-batches of {micro} crops of {config.data.crop} pixels ({str(error)[:200]}). Set "
            f"{smaller}" + ("" if config.checkpointing else ", checkpointing: true")
            + ("" if config.optimizer.kind == "adamw8bit" else ", optimizer.kind: adamw8bit")
            + ("" if config.parallel == "fsdp" else ", or parallel: fsdp over several cards")
            + "; the batch of all stays as it is, so do the results") from error
