"""The golden files of SUPIR's sampling, colour and pixels: inputs that are functions of their names, stored outputs."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parent.parent / "golden" / "supir"
MAPS = {"normal": lambda n: n,
        "unit": lambda n: (0.5 + 0.2 * n).clamp(0, 1),
        "signed": lambda n: (0.5 * n).clamp(-1, 1),
        "uint8": lambda n: (128 + 50 * n).clamp(0, 255).floor().to(torch.uint8)}


@functools.cache
def _fill() -> Any:
    spec = importlib.util.spec_from_file_location("fill", FOLDER / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Golden:
    """One pair of files: `golden.side`, `golden["output"]` and `golden.input("x")`."""

    def __init__(self, name: str) -> None:
        self.side = json.loads((FOLDER / f"{name}.json").read_text())
        self.outputs = load_file(FOLDER / f"{name}.safetensors")

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.outputs[name]

    def input(self, name: str) -> torch.Tensor:
        described = self.side["inputs"][name]
        return MAPS[described["map"]](_fill().inputs(name, tuple(described["shape"]), self.side["salt"]))


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest absolute difference between tensors of one shape."""
    assert ours.shape == theirs.shape
    return (ours.double() - theirs.double()).abs().max().item()
