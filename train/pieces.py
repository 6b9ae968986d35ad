"""Named tensors on disk in pieces: every rank writes what it has, and any number of ranks reads what it needs.

A file `rank-3.safetensors` holds runs of rows; `rank-3.json` says of each tensor its whole shape and its first row.
Nothing here is ever unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Some rows of a tensor, on the host."""

    rows: Tensor
    shape: tuple[int, ...]          # of the whole tensor
    start: int = 0                  # its first row here


class Damaged(RuntimeError):
    """Files that are not what was written."""


def write(folder: Path, rank: int, pieces: Mapping[str, Piece]) -> None:
    """Writes the pieces of one rank; complete once `rank-N.json` is there."""
    path = folder / f"rank-{rank}.safetensors"
    save_file({name: piece.rows.contiguous() for name, piece in pieces.items()}, path)
    flush(path)
    about = {name: {"shape": piece.shape, "start": piece.start} for name, piece in pieces.items()}
    replace(folder / f"rank-{rank}.json", json.dumps({"bytes": path.stat().st_size, "tensors": about}))


class Pieces:
    """The tensors of a folder.

    Raises:
        Damaged: a file is missing, or has another size than was written.
    """

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder = folder
        self.places: dict[str, list[tuple[int, Path]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for rank in range(ranks):
            path = folder / f"rank-{rank}.safetensors"
            try:
                about = json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8"))
                size = path.stat().st_size
            except (OSError, ValueError) as error:
                raise Damaged(f"{folder}: what rank {rank} wrote cannot be read ({error})") from None
            if size != about["bytes"]:
                raise Damaged(f"{path} has {size:,} bytes and had {about['bytes']:,}")
            for name, place in about["tensors"].items():
                self.shapes[name] = tuple(place["shape"])
                self.places.setdefault(name, []).append((place["start"], path))

    def read(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """Rows `start` … `end` of a tensor, from whichever files hold them.

        Raises:
            KeyError: no such tensor.
            Damaged: rows are missing, or a file cannot be read.
        """
        shape, places = self.shapes[name], sorted(self.places[name])
        if not shape:
            return self._open(places[0][1], name)[0]
        end = shape[0] if end is None else end
        found, at = [], start
        for first, path in places:
            rows = self._open(path, name)[1]
            last = first + rows.get_shape()[0]
            if first <= at < min(last, end):
                found.append(rows[at - first:min(last, end) - first])
                at = min(last, end)
        if at < end:
            raise Damaged(f"{self.folder}: rows {at} to {end} of {name} are in no file")
        if not found:
            return self._open(places[0][1], name)[1][0:0]
        return torch.cat(found) if len(found) > 1 else found[0]

    def _open(self, path: Path, name: str) -> tuple:
        try:
            with safe_open(path, framework="pt") as file:
                if not self.shapes[name]:
                    return file.get_tensor(name), None
                return None, file.get_slice(name)
        except (OSError, SafetensorError) as error:
            raise Damaged(f"{path} cannot be read: {error}") from None


def replace(path: Path, text: str) -> None:
    """Writes a text file in one moment."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    flush(partial)
    os.replace(partial, path)


def flush(path: Path) -> None:
    """Waits until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
