"""The tensors of a run as pieces of a checkpoint: weights, their running mean, the optimizer's states."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import optimizer
from .ema import RunningMean
from .parallel import local, rows
from .pieces import Piece, Pieces
from .ranks import Ranks


class Tensors:
    """What this rank writes of them, and what it takes back.

    owners: which rank keeps and writes what, where every rank has everything; cut: each has a part of everything.
    """

    def __init__(self, trained: Mapping[str, Tensor], made: torch.optim.Optimizer, ema: RunningMean | None,
                 owners: Mapping[str, int], ranks: Ranks, cut: bool) -> None:
        self.trained, self.optimizer, self.ema = trained, made, ema
        self.owners, self.ranks, self.cut = owners, ranks, cut

    def pieces(self) -> dict[str, Piece]:
        """Copies on the host, which training does not change."""
        tensors = {f"model/{name}": parameter for name, parameter in self.trained.items()} | {
            f"optimizer/{name}": state for name, state in optimizer.states(self.optimizer, self.trained).items()}
        found = {name: Piece(on_host(local(tensor)), tuple(tensor.shape), rows(tensor, self.ranks)[0])
                 for name, tensor in tensors.items()
                 if (self.cut and tensor.ndim) or self.owners[parameter_of(name)] == self.ranks.rank}
        for name, mean in (self.ema.means if self.ema is not None else {}).items():
            whole = self.trained[name]
            found[f"ema/{name}"] = Piece(on_host(mean), tuple(whole.shape), rows(whole, self.ranks)[0])
        return found

    @torch.no_grad()
    def restore(self, pieces: Pieces) -> None:
        """Puts back what any number of ranks has written."""
        for name, parameter in self.trained.items():
            where = rows(parameter, self.ranks)
            local(parameter).copy_(pieces.read(f"model/{name}", *where))
            if self.ema is not None and name in self.ema.means:
                kind = "ema" if f"ema/{name}" in pieces.shapes else "model"     # a run may begin to keep means
                self.ema.means[name].copy_(pieces.read(f"{kind}/{name}", *where))
        stored = {}
        for name in pieces.shapes:
            if name.startswith("optimizer/"):
                of = self.trained[parameter_of(name)]
                like_it = pieces.shapes[name] == tuple(of.shape)
                stored[name.removeprefix("optimizer/")] = pieces.read(
                    name, *(rows(of, self.ranks) if like_it else ()))
        optimizer.restore(self.optimizer, self.trained, stored)


def shared_out(trained: Mapping[str, Tensor], ranks: int) -> dict[str, int]:
    """Which rank keeps and writes what, by size, where every rank has everything."""
    loads, owners = [0] * ranks, {}
    for name, parameter in sorted(trained.items(), key=lambda item: -item[1].numel()):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += parameter.numel()
    return owners


def parameter_of(name: str) -> str:
    """NAME of `model/NAME` and of `optimizer/NAME/STATE`."""
    kind, _, rest = name.partition("/")
    return rest.rpartition("/")[0] if kind == "optimizer" else rest


def on_host(tensor: Tensor) -> Tensor:
    """A copy that training does not change."""
    return tensor.detach().to("cpu", copy=True)
