import pytest
import torch


@pytest.fixture(scope="module")
def sdxl(tiny_models):
    torch.set_num_threads(1)
    return tiny_models / "sdxl"
