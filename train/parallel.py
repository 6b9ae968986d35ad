"""An objective made ready for a run: activation checkpointing, compilation, and DDP or FSDP2 over the ranks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from .objective import Losses, Objective
from .ranks import Ranks


class Parallel:
    """One way to call an objective on every rank, and to average its gradients over them."""

    def __init__(self, objective: Objective, ranks: Ranks, *, kind: str = "ddp", bf16: bool = False,
                 compiled: bool = False, checkpointing: bool = False) -> None:
        self.objective, self.ranks = objective, ranks
        self.autocast = functools.partial(torch.autocast, ranks.device.type, torch.bfloat16, enabled=bf16)
        if checkpointing:
            for layer in objective.layers():
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        if compiled:
            for block in objective.blocks():
                block.compile()
        self.sharded = kind == "fsdp" and ranks.count > 1
        if self.sharded:
            shard(objective, ranks, bf16)
        self.call: nn.Module = objective
        if ranks.count > 1 and not self.sharded:
            frozen = [name for name, tensor in [*objective.named_parameters(), *objective.named_buffers()]
                      if not tensor.requires_grad]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, frozen)
            self.call = DistributedDataParallel(objective, gradient_as_bucket_view=True)
        self.trained = {name: parameter for name, parameter in objective.named_parameters() if parameter.requires_grad}

    def __call__(self, inputs: dict[str, Tensor], last: bool = True) -> Losses:
        """The losses of a micro-batch; the gradients of the `last` one of a step are averaged over the ranks."""
        if self.sharded:
            self.objective.set_requires_gradient_sync(last)
        waits = isinstance(self.call, DistributedDataParallel) and not last
        with self.call.no_sync() if waits else contextlib.nullcontext(), self.autocast():
            return self.call(inputs)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Within the block the weights are whole on every rank, for calls that go past the objective's own."""
        parts = [module for module in self.objective.modules() if isinstance(module, FSDPModule)]
        blocks = [part for part in parts if part is not self.objective]
        for part in parts:
            part.unshard()
        for block in blocks:                    # otherwise each call of a block would cut it again
            block.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for block in blocks:
                block.set_reshard_after_forward(True, recurse=False)
            for part in parts:
                part.reshard()


def shard(objective: Objective, ranks: Ranks, bf16: bool) -> None:
    """Cuts what is trained over the ranks, block by block; what is frozen stays whole on each."""
    mesh = init_device_mesh(ranks.device.type, (ranks.count,))
    frozen = {parameter for parameter in objective.parameters() if not parameter.requires_grad}
    options = {"mesh": mesh, "ignored_params": frozen,
               "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32,
                                                 cast_forward_inputs=False) if bf16 else MixedPrecisionPolicy()}
    for block in objective.blocks():
        if any(parameter.requires_grad for parameter in block.parameters()):
            fully_shard(block, **options)
    fully_shard(objective, **options)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """All of it, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, part: Tensor) -> Tensor:
    """This rank's part of a tensor, cut as another one is."""
    if not isinstance(tensor, DTensor):
        return part
    return DTensor.from_local(part, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride())


def rows(tensor: Tensor, ranks: Ranks) -> tuple[int, int]:
    """Where this rank's part of a tensor begins and ends along the first axis; FSDP2 cuts as torch.chunk."""
    length = tensor.shape[0] if tensor.ndim else 1
    if not isinstance(tensor, DTensor):
        return 0, length
    size = -(-length // ranks.count)
    return min(ranks.rank * size, length), min((ranks.rank + 1) * size, length)
