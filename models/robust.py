"""The degradation-robust encoder: reads a low-quality image into SDXL's latent space (SUPIR, section 3.1)."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution, Encoder
from torch import Tensor

NAMES = ("in_channels", "latent_channels", "down_block_types", "block_out_channels", "layers_per_block", "act_fn",
         "norm_num_groups", "mid_block_add_attention", "scaling_factor")


class RobustEncoder(ModelMixin, ConfigMixin):
    """A copy of the autoencoder's encoder; the 1x1 convolution behind it and the decoder stay shared with `vae`.

    vae: the part of an AutoencoderKL's configuration that decides its shapes.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, vae: dict[str, Any]) -> None:
        super().__init__()
        self.encoder = Encoder(
            in_channels=vae["in_channels"], out_channels=vae["latent_channels"], act_fn=vae["act_fn"],
            down_block_types=vae["down_block_types"], block_out_channels=vae["block_out_channels"],
            layers_per_block=vae["layers_per_block"], norm_num_groups=vae["norm_num_groups"], double_z=True,
            mid_block_add_attention=vae["mid_block_add_attention"])

    @classmethod
    def from_vae(cls, vae: AutoencoderKL) -> RobustEncoder:
        """A fresh encoder with the weights of the plain one."""
        config = {name: list(value) if isinstance(value := vae.config[name], tuple) else value for name in NAMES}
        robust = cls(config)
        robust.encoder.load_state_dict(vae.encoder.state_dict())
        return robust if robust.dtype == vae.dtype else robust.to(vae.dtype)

    def forward(self, image: Tensor, vae: AutoencoderKL) -> DiagonalGaussianDistribution:
        """The posterior of (B, 3, H, W) images in [-1, 1]; latents are (B, C, H/8, W/8), not scaled."""
        return DiagonalGaussianDistribution(vae.quant_conv(self.encoder(image)))

    def latent(self, image: Tensor, vae: AutoencoderKL) -> Tensor:
        """z_LQ: the posterior's mode, scaled as the UNet wants it. (B, C, H/8, W/8)."""
        return self(image, vae).mode() * vae.config.scaling_factor
