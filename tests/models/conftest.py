"""The tiny SDXL and the tiny SUPIR over it, in folders and in the published layouts."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from models import supir_files, tiny_sdxl, tiny_supir
from tests.models.weights import save_file, sdxl_file


@pytest.fixture(scope="session")
def here(tmp_path_factory) -> SimpleNamespace:
    """`sdxl` and `supir` are folders, `sdxl_file` and `supir_file` the same as one .safetensors each."""
    torch.set_num_threads(1)
    folder: Path = tmp_path_factory.mktemp("weights")
    tiny_sdxl.build(folder / "sdxl")
    tiny_supir.build(folder / "supir", folder / "sdxl")
    save_file(sdxl_file(folder / "sdxl"), folder / "sdxl.safetensors")
    supir_files.export_supir(folder / "supir", folder / "supir.safetensors")
    return SimpleNamespace(folder=folder, sdxl=folder / "sdxl", supir=folder / "supir",
                           sdxl_file=folder / "sdxl.safetensors", supir_file=folder / "supir.safetensors")
