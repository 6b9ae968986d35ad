"""Checkpoint files: names, shapes and tensors of .safetensors and .ckpt, without running what a pickle asks for."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

WRAPPERS = ("state_dict", "model", "module", "params_ema", "params")
PREFIXES = ("state_dict.", "module.")       # a wrapper that became part of every name
SHOWN = 6                                   # names in an error
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
          "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
Shape = tuple[int, ...]


class CheckpointError(ValueError):
    """A file that cannot be used; the message names it and says what would help."""


class Checkpoint(Mapping[str, torch.Tensor]):
    """Tensors by name; of a .safetensors file each is read when it is asked for, a .ckpt is mapped into memory.

    What a file is, its first bytes say and not its name. `shapes`, `dtypes` and `metadata` cost no reading of tensors;
    `others` are entries of a pickle that are no tensors, such as a step count.

    Raises:
        CheckpointError: not there, truncated, or no checkpoint at all; or a pickle that holds more than tensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"{path} is {'a folder, not a file' if self.path.is_dir() else 'not there'}")
        with self.path.open("rb") as file:
            head = file.read(64)
        self.others: list[str] = []
        self.metadata: dict[str, str] = {}
        self.stored: dict[str, str] = {}        # name: the name in the file
        if head[8:9] == b"{":
            self._open_safetensors()
        else:
            refuse_by_content(self.path, head)
            self._open_pickle(zipped=head[:2] == b"PK")
        for prefix in PREFIXES:
            if all(name.startswith(prefix) for name in self.stored):
                self._strip(prefix)

    def _open_safetensors(self) -> None:
        try:
            file = safe_open(self.path, "pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path} is no whole .safetensors file ({error}); was the download cut short? "
                                  f"It has {self.path.stat().st_size} bytes") from None
        slices = {name: file.get_slice(name) for name in file.keys()}      # noqa: SIM118
        if not slices:
            raise CheckpointError(f"{self.path} holds no tensors")
        self.shapes: dict[str, Shape] = {name: tuple(one.get_shape()) for name, one in slices.items()}
        self.dtypes = {name: DTYPES.get(one.get_dtype()) for name, one in slices.items()}
        if unknown := sorted({one.get_dtype() for one in slices.values()} - set(DTYPES)):
            raise CheckpointError(f"{self.path} holds numbers of a kind that is not known here: {', '.join(unknown)}")
        self.metadata, self._read = file.metadata() or {}, file.get_tensor
        self.stored = {name: name for name in slices}

    def _open_pickle(self, zipped: bool) -> None:
        loaded, self.others = unpickled(self.path, zipped), []
        while inner := next((loaded[name] for name in WRAPPERS if isinstance(loaded.get(name), dict)), None):
            self.others += [str(name) for name, value in loaded.items() if value is not inner]
            loaded = inner
        tensors = {str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
        self.others += [str(name) for name in loaded if str(name) not in tensors]
        if not tensors:
            raise CheckpointError(f"{self.path} holds no tensors by name")
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        self._read, self.stored = tensors.__getitem__, {name: name for name in tensors}

    def _strip(self, prefix: str) -> None:
        self.stored = {name.removeprefix(prefix): stored for name, stored in self.stored.items()}
        self.shapes = {name.removeprefix(prefix): shape for name, shape in self.shapes.items()}
        self.dtypes = {name.removeprefix(prefix): dtype for name, dtype in self.dtypes.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._read(self.stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def refuse_by_content(path: Path, head: bytes) -> None:
    """Raises CheckpointError for what downloads leave in place of weights."""
    found = ("empty" if not head else
             "a Git LFS pointer, not the weights; fetch them with `git lfs pull` or `hf download`"
             if head.startswith(b"version https://git-lfs") else
             "a web page, not weights; the address may want a login, or `hf download`"
             if head.lstrip()[:5].lower() in (b"<!doc", b"<html") else None)
    if found:
        raise CheckpointError(f"{path} is {found}")


def unpickled(path: Path, zipped: bool) -> dict[Any, Any]:
    """What a .ckpt holds; only tensors and plain containers are ever made."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # of pickle protocols; an error says all
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked is None:
            raise CheckpointError(f"{path} is no checkpoint: neither .safetensors nor what torch.save writes") from None
        raise CheckpointError(f"{path} holds more than tensors: it asks for {asked[1]}. Nothing of it was run. If you "
                              "trust it, save its state_dict as .safetensors where it comes from") from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        said = (str(error).splitlines() or [""])[0].split(". ")[0]
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({type(error).__name__}: {said}); was the "
                              f"download cut short? It has {path.stat().st_size} bytes") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds no tensors by name, but a {type(loaded).__name__}")
    return loaded


def listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def same_shape(one: Shape, other: Shape) -> bool:
    """Whether two shapes are one, apart from the trailing ones that make a linear layer a 1x1 convolution."""
    return _bare(one) == _bare(other)


def _bare(shape: Shape) -> Shape:
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def shape_differences(source: Checkpoint, wanted: Mapping[str, Shape]) -> list[str]:
    """What to say of tensors that have another shape than wanted."""
    return [f"{name} is {source.shapes[name]}, not {shape}" for name, shape in wanted.items()
            if name in source and not same_shape(source.shapes[name], shape)]
