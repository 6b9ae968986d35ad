"""The running mean of the weights, with a half-life in images; over several ranks each keeps a part of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from .config import Ema
from .parallel import local
from .ranks import Ranks


class RunningMean:
    """Means of the parameters that this rank owns. owners: the rank of each.

    Where weights are cut over the ranks (FSDP2), each keeps the mean of its own part; where every rank has all of them
    (DDP), each keeps the means of some, and `applied` gathers them.
    """

    def __init__(self, config: Ema, trained: Mapping[str, Tensor], owners: Mapping[str, int], ranks: Ranks,
                 cut: bool) -> None:
        self.config, self.trained, self.owners, self.ranks, self.cut = config, dict(trained), owners, ranks, cut
        self.means = {name: local(parameter.detach()).clone() for name, parameter in trained.items()
                      if cut or owners[name] == ranks.rank}

    @torch.no_grad()
    def update(self, batch: int, seen: int) -> None:
        """After a step of `batch` images, `seen` of them in all (EDM's half-life with its ramp)."""
        half_life = float(self.config.half_life)
        if self.config.ramp is not None:
            half_life = min(half_life, self.config.ramp * seen)
        if self.means:
            torch._foreach_lerp_(list(self.means.values()), [local(self.trained[name]) for name in self.means],
                                 1 - 0.5 ** (batch / max(half_life, 1e-8)))

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Within the block the parameters are their means."""
        # On the host: a device that is just large enough for training has no room for them twice.
        before = {name: local(parameter).to("cpu", copy=True) for name, parameter in self.trained.items()}
        try:
            for name, parameter in self.trained.items():
                part = local(parameter)
                if name in self.means:
                    part.copy_(self.means[name])
                if self.ranks.count > 1 and not self.cut:
                    dist.broadcast(part, self.owners[name])
            yield
        finally:
            for name, parameter in self.trained.items():
                local(parameter).copy_(before[name])
