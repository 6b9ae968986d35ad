"""The mini: its shapes, its size, and that everything here takes a latent of a quarter of the picture's side."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from clearshard import app
from models import mini
from models.robust import RobustEncoder
from models.supir import SupirAdaptor, SupirUNet
from models.supir_folder import load, write
from sample.presets import choose
from sample.supir import SupirPipeline
from tests.conftest import photograph


def new(*arguments):
    return CliRunner().invoke(app, ["models", "new", *map(str, arguments)])


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    """What `clearshard models new` makes."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("mini") / "prior"
    result = new(folder)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def supir(prior):
    """The whole mini in half precision, the prior inside, as it is to be handed out."""
    folder = prior.parent / "supir"
    unet, vae = mini.unet(), mini.autoencoder()
    write(folder, SupirAdaptor.from_unet(unet).half(), RobustEncoder.from_vae(vae).half(), prior, include_prior=True)
    return folder


def test_the_whole_of_it_in_half_precision_stays_under_19_megabytes(supir):
    sizes = {path.relative_to(supir).parts[0]: 0 for path in supir.rglob("*")}
    for path in supir.rglob("*.safetensors"):
        share = 2 if "prior" in path.parts else 1           # the prior lies there in single precision
        sizes[path.relative_to(supir).parts[0]] += path.stat().st_size // share
    assert 5e6 < sizes["prior"] < sum(sizes.values()) < 19e6


def test_it_has_sdxls_layout(prior):
    unet, vae = (json.loads((prior / part / "config.json").read_text()) for part in ("unet", "vae"))
    assert (unet["in_channels"], unet["out_channels"], vae["latent_channels"]) == (4, 4, 4)
    assert unet["addition_embed_type"] == "text_time" and vae["scaling_factor"] == 1.0
    assert {path.name for path in prior.iterdir()} >= {"text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2",
                                                      "scheduler", "model_index.json", "MODEL_CARD.md"}


def test_the_networks_keep_shapes_and_a_fresh_latent_has_a_usable_spread(supir):
    net, vae, robust = load(supir, torch.float32)
    pixels = torch.from_numpy(np.asarray(photograph(0, 160, 128))).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latent = robust.latent(pixels, vae)
        assert latent.shape == (1, 4, 32, 40) and 1e-3 < latent.std() < 1e3
        assert vae.decode(latent).sample.shape == pixels.shape
        net = SupirUNet(net.unet, net.adaptor)
        noise = net(latent, torch.tensor(500), latent, torch.randn(1, 77, 80), torch.randn(1, 48), torch.ones(1, 6))
    assert noise.shape == latent.shape and noise.isfinite().all() and noise.std() > 1e-3


def test_a_picture_goes_through_the_pipeline_of_restoration(supir):
    pipeline = SupirPipeline.from_pretrained(supir, device="cpu")
    preset = choose("quality", {"steps": 2})
    restored = pipeline(photograph(1, 100, 90), "a cat", preset=preset, short=128, scale=1.5)
    assert restored.image.shape == (135, 150, 3)


def test_the_seed_decides_the_weights_and_only_force_replaces_them(prior, tmp_path):
    def first(folder):
        return (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()

    assert new(tmp_path / "one", "--seed", 1).exit_code == 0
    assert first(tmp_path / "one") != first(prior)
    assert "there already" in new(tmp_path / "one").output
    assert "--seed 1" in (tmp_path / "one" / "MODEL_CARD.md").read_text()
    assert new(tmp_path / "one", "--force").exit_code == 0
    assert first(tmp_path / "one") == first(prior)


def test_somebody_elses_folder_is_refused_even_a_tiny_models_one(tmp_path):
    (tmp_path / "MODEL_CARD.md").write_text("Made by `clearshard models tiny`")
    result = new(tmp_path, "--force")
    assert result.exit_code == 1 and "none of this command's models" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["MODEL_CARD.md"]
