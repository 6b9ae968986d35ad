"""Tiles of an autoencoder against the whole image."""

import pytest
import torch
from diffusers import AutoencoderKL

from sample.vae_tiles import decode, encode

from .golden import difference
from .watched import Largest

CLOSE = 1e-4
ALL, NONE = 1 << 40, 0                  # keep every map; compute everything again


def autoencoder(seed: int = 0, **changes: object) -> AutoencoderKL:
    """SDXL's layers, narrow; with random biases and norm weights, so that a forgotten one shows."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(**{
        "block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4} | changes)
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return vae.eval()


def gradient(height: int, width: int) -> torch.Tensor:
    """(1, 3, H, W): smooth, where a step at a border of tiles would be seen first."""
    ramp = torch.linspace(-1, 1, height)[:, None] * 0.5 + torch.linspace(-1, 1, width) * 0.5
    return torch.stack([ramp, -ramp, ramp * 0.3])[None]


def texture(height: int, width: int) -> torch.Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


@pytest.fixture(scope="module")
def vae():
    return autoencoder()


@torch.no_grad()
def whole(vae: AutoencoderKL, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Moments, a latent, and its decoding, without tiles."""
    moments = vae.encode(pixels).latent_dist.parameters
    return moments, moments[:, :4], vae.decode(moments[:, :4]).sample


@pytest.mark.parametrize("keep", [ALL, 20_000, NONE])
@pytest.mark.parametrize("picture", [gradient, texture])
def test_tiles_are_the_whole_image(vae, picture, keep):
    pixels = picture(64, 104)
    moments, latent, decoded = whole(vae, pixels)
    assert moments.std() > 0.1 and decoded.std() > 0.1
    assert difference(encode(vae, pixels, tile=40, keep=keep), moments) < CLOSE
    assert difference(decode(vae, latent, tile=40, keep=keep), decoded) < CLOSE


@pytest.mark.parametrize(("height", "width", "tile"), [(65, 71, 32), (8, 200, 24), (50, 46, 16)])
def test_odd_sizes_are_exact_too(vae, height, width, tile):
    pixels = texture(height, width)
    moments, latent, decoded = whole(vae, pixels)
    assert difference(encode(vae, pixels, tile=tile), moments) < CLOSE
    assert difference(decode(vae, latent, tile=tile), decoded) < CLOSE


@pytest.mark.parametrize("changes", [
    {"norm_num_groups": 8, "layers_per_block": 2, "block_out_channels": (8, 16)},
    {"mid_block_add_attention": False}, {"use_quant_conv": False, "use_post_quant_conv": False}], ids=str)
def test_other_depths_and_parts_are_exact(changes):
    kinds = len(changes.get("block_out_channels", range(4)))
    vae = autoencoder(1, down_block_types=("DownEncoderBlock2D",) * kinds,
                      up_block_types=("UpDecoderBlock2D",) * kinds, **changes)
    pixels = texture(48, 64)
    moments, latent, decoded = whole(vae, pixels)
    for keep in (ALL, NONE):
        assert difference(encode(vae, pixels, tile=32, keep=keep), moments) < CLOSE
        assert difference(decode(vae, latent, tile=32, keep=keep), decoded) < CLOSE


def test_images_of_a_batch_keep_their_own_statistics(vae):
    pixels = torch.cat([gradient(48, 64), texture(48, 64) * 0.1])
    together = encode(vae, pixels, tile=32)
    for image in range(2):
        assert difference(together[image:image + 1], whole(vae, pixels[image:image + 1])[0]) < CLOSE


def test_there_is_no_step_at_the_borders_of_tiles(vae):
    # The same picture with diffusers' tiles, each with statistics of its own, shows what the bound excludes.
    latent = whole(vae, gradient(64, 128))[1]
    decoded = vae.decode(latent).sample.detach()
    steps = (decode(vae, latent, tile=32) - decoded).diff(dim=3)[..., 31::32].abs().max()
    own = autoencoder()
    own.enable_tiling()
    own.tile_latent_min_size, own.tile_sample_min_size, own.tile_overlap_factor = 4, 32, 0.25
    assert steps < CLOSE < 1e-2 < difference(own.decode(latent).sample.detach(), decoded)


def test_another_encoder_takes_the_place_of_the_autoencoders(vae):
    other, pixels = autoencoder(2), texture(40, 40)
    with torch.no_grad():
        expected = vae.quant_conv(other.encoder(pixels))
    for tile in (24, 512):
        assert difference(encode(vae, pixels, encoder=other.encoder, tile=tile), expected) < CLOSE


@pytest.mark.slow
def test_memory_is_that_of_a_tile_whatever_the_image(vae):
    held = {}
    for side in (192, 256):
        pixels, latent = texture(side, side), torch.zeros(1, 4, side // 8, side // 8)
        for keep in (ALL, NONE):
            with Largest() as seen:
                encode(vae, pixels, tile=32, keep=keep)
                decode(vae, latent, tile=32, keep=keep)
            held[side, keep] = seen.numbers
    with Largest() as seen:
        whole(vae, pixels)
    # Already the smaller image has tiles with borders on all sides; more tiles need no more. Without kept maps, borders
    # are those of all layers together, here wider than the tile.
    assert held[256, ALL] == held[192, ALL] < seen.numbers / 40
    assert held[256, NONE] == held[192, NONE] < seen.numbers / 3


def test_bfloat16_differs_from_the_whole_image_by_rounding(vae):
    half, latent = autoencoder().bfloat16(), whole(vae, texture(64, 64))[1]
    exact = vae.decode(latent).sample.detach()
    rounding = difference(half.decode(latent.bfloat16()).sample.detach(), exact)
    assert difference(decode(half, latent, tile=32), exact) < 2 * rounding < 0.3


def test_an_autoencoder_of_another_kind_is_refused(vae):
    strange = autoencoder()
    strange.decoder.mid_block.attentions[0].residual_connection = False
    with pytest.raises(ValueError, match="residual_connection of a Attention is False"):
        decode(strange, torch.zeros(1, 4, 8, 8), tile=32)
