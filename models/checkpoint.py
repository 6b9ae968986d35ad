"""Checkpoint files: names, shapes and tensors of .safetensors and .ckpt, without running what a pickle asks for."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

WRAPPERS = ("state_dict", "model", "module", "params_ema", "params")


class CheckpointError(ValueError):
    """A file that cannot be used; the message names it and says what would help."""


class Checkpoint(Mapping[str, torch.Tensor]):
    """Tensors by name; of a .safetensors file each is read when it is asked for, a .ckpt is mapped into memory.

    Raises:
        CheckpointError: not there, truncated, or no checkpoint at all; or a pickle that holds more than tensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"{path} is not there")
        self.file, self.tensors = None, {}
        if self.path.suffix == ".safetensors":
            self._open_safetensors()
        else:
            self.tensors = self._pickled()

    def _open_safetensors(self) -> None:
        try:
            self.file = safe_open(self.path, "pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path} is no whole .safetensors file ({error}); was the download cut short? "
                                  f"It has {self.path.stat().st_size} bytes") from None
        self.shapes = {name: tuple(self.file.get_slice(name).get_shape()) for name in self.file.keys()}  # noqa: SIM118

    def _pickled(self) -> dict[str, torch.Tensor]:
        try:
            loaded = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{self.path} holds more than tensors, and nothing of it was run: {str(error).splitlines()[0]} If you "
                "trust it, save its state_dict as .safetensors where it comes from") from None
        except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self.path} cannot be read as a checkpoint ({type(error).__name__}: "
                                  f"{str(error).splitlines()[0]}); was the download cut short?") from None
        while isinstance(loaded, dict) and (inner := next((loaded[name] for name in WRAPPERS if isinstance(
                loaded.get(name), dict)), None)):
            loaded = inner
        tensors = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)} \
            if isinstance(loaded, dict) else {}
        if not tensors:
            raise CheckpointError(f"{self.path} holds no tensors by name")
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self.file.get_tensor(name) if self.file is not None else self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
