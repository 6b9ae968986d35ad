"""The processes of a run and what they say to each other: one process alone, or many by torchrun, Slurm or Ray."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

PATIENCE = datetime.timedelta(minutes=30)       # a rank may compile, or write a checkpoint, while the others wait


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int
    count: int
    device: torch.device
    ours: bool = False              # whether the process group was made here

    @classmethod
    def start(cls, device: str = "auto") -> Ranks:
        """Joins the processes that torchrun's environment names (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR), if any.

        device: auto, cpu, cuda or cuda:N.
        """
        local = int(os.environ.get("LOCAL_RANK", 0))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":
            device = f"cuda:{local}"
        placed = torch.device(device)
        if placed.type == "cuda":
            torch.cuda.set_device(placed)
        made = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1
        if made:
            dist.init_process_group("nccl" if placed.type == "cuda" else "gloo", timeout=PATIENCE)
        if not dist.is_initialized():
            return cls(0, 1, placed)
        return cls(dist.get_rank(), dist.get_world_size(), placed, made)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def all(self, value: object) -> list:
        """What each rank says, in their order."""
        said: list = [None] * self.count
        if self.count > 1:
            dist.all_gather_object(said, value)
            return said
        return [value]

    def barrier(self) -> None:
        if self.count > 1:
            dist.barrier()

    def stop(self) -> None:
        if self.ours and dist.is_initialized():
            dist.destroy_process_group()
