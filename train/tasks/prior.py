"""`supir.autoencoder` and `supir.prior`: the two networks on which SUPIR stands, for those who train a small one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from pydantic import Field
from torch import Tensor, nn

from models.fingerprint import fingerprint
from models.supir_folder import prior_part

from ..named import Named
from ..objective import GRID, Losses, Objective, Task, network, per_sample, shown, signed
from .diffusion import Noising, encoded, epsilon_loss, noised
from .text import Text, Told

if TYPE_CHECKING:
    from ..batches import Batch


class PriorTask(Task):
    """A task that starts from a folder of SDXL in diffusers' layout."""

    prior: Path = Field(description="folder of SDXL in diffusers' layout, any size; `clearshard models new` makes one")

    def check(self) -> None:
        for part in ("unet", "vae"):
            prior_part(self.prior, part)

    def made_from(self) -> dict[str, str]:
        return {"prior": fingerprint(self.prior)}


class Autoencoder(PriorTask):
    """The autoencoder: pixels to latents and back."""

    name: Literal["supir.autoencoder"]
    error: Literal["absolute", "squared"] = Field("absolute", description="of pixels; squared learns PSNR faster")
    kl: float = Field(1e-4, ge=0, description="weight of the divergence from a standard normal, per latent number")
    gradient: float = Field(0.5, ge=0, description="weight of the error of neighbouring pixels' differences: edges")

    def build(self, device: torch.device) -> AutoencoderObjective:
        return AutoencoderObjective(self, network(AutoencoderKL, self.prior / "vae", device, trained=True))


class AutoencoderObjective(Objective):
    """Error of pixels and of their differences, and a little divergence (Rombach et al. 2022, appendix G).

    Without an adversary: it reads and writes pictures faithfully, and a little softly.
    """

    needs_lq = False

    def __init__(self, task: Autoencoder, vae: AutoencoderKL) -> None:
        super().__init__()
        self.task, self.vae = task, vae
        self.reduction = 2 ** (len(vae.config.block_out_channels) - 1)

    def prepare(self, batch: Batch, draws: Named, level: int | None = None) -> dict[str, Tensor]:
        side = batch.hq.shape[-1] // self.reduction
        noise = draws.normal("posterior", (self.vae.config.latent_channels, side, side))
        return {"image": signed(batch.hq), "noise": noise.to(batch.hq.device)}

    def forward(self, inputs: dict[str, Tensor]) -> Losses:
        image, vae = inputs["image"], self.vae
        mean, log_variance = vae.quant_conv(vae.encoder(image)).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        latent = mean + torch.exp(0.5 * log_variance) * inputs["noise"]
        decoded = vae.decoder(vae.post_quant_conv(latent)).float()
        edges, squared = edge_error(decoded, image), per_sample((decoded - image) ** 2)
        pixel = squared if self.task.error == "squared" else per_sample((decoded - image).abs())
        divergence = 0.5 * per_sample(mean ** 2 + log_variance.exp() - 1 - log_variance)
        return {"loss": pixel + self.task.gradient * edges + self.task.kl * divergence, "pixel": pixel, "edges": edges,
                "divergence": divergence, "mse": squared / 4}

    def preview(self, batch: Batch, draws: Named) -> dict[str, Tensor]:
        image = signed(batch.hq)
        return {"truth": shown(image), "decoded": shown(self.vae.decode(self.vae.encode(image).latent_dist.mode())[0])}

    def save(self, folder: Path, batch: Batch, dtype: torch.dtype) -> None:
        """A copy of the prior with this autoencoder, whose scaling factor gives latents a spread of 1."""
        spread = self.vae.encode(signed(batch.hq)).latent_dist.mean.float().std().item()
        self.vae.register_to_config(scaling_factor=round(1 / spread, 5))
        save_in(self.task.prior, folder, {"vae": self.vae}, dtype)

    def blocks(self) -> list[nn.Module]:
        return [self.vae.encoder, self.vae.decoder]


class Prior(PriorTask):
    """The prior itself: SDXL's objective on a corpus, every weight of the UNet."""

    name: Literal["supir.prior"]
    told: Told = Told()
    noising: Noising = Noising()

    def build(self, device: torch.device) -> PriorObjective:
        return PriorObjective(self, device)


class PriorObjective(Objective):
    """The noise in a latent, from the caption alone (Ho et al. 2020, equation 14)."""

    needs_lq, levels = False, GRID

    def __init__(self, task: Prior, device: torch.device) -> None:
        super().__init__()
        self.task = task
        self.unet = network(UNet2DConditionModel, task.prior / "unet", device, trained=True)
        self.vae = network(AutoencoderKL, task.prior / "vae", device)
        self.text = Text(task.prior, task.told, device)

    def prepare(self, batch: Batch, draws: Named, level: int | None = None) -> dict[str, Tensor]:
        latent = encoded(self.vae, batch.hq, draws)
        return noised(latent, self.task.noising, batch, draws, level) | self.text.inputs(batch, draws)

    def forward(self, inputs: dict[str, Tensor]) -> Losses:
        return epsilon_loss(self.predicted(inputs), inputs, self.task.noising)

    def predicted(self, inputs: dict[str, Tensor]) -> Tensor:
        told = {"text_embeds": inputs["pooled"], "time_ids": inputs["sizes"]}
        return self.unet(inputs["noisy"], inputs["level"], inputs["context"], added_cond_kwargs=told)[0]

    def preview(self, batch: Batch, draws: Named) -> dict[str, Tensor]:
        """Pictures painted from noise by 20 steps, as the captions say."""
        from sample import samplers, sigmas
        inputs = self.prepare(batch, draws)

        def predict(x: Tensor, index: int) -> Tensor:
            return self.predicted(inputs | {"noisy": x, "level": torch.tensor(index, device=x.device)})
        levels = sigmas.released(20)
        painted = samplers.euler(sigmas.denoiser(predict), samplers.start(inputs["noise"], levels), levels)
        decoded = self.vae.decode((painted / self.vae.config.scaling_factor).to(self.vae.dtype))[0]
        return {"truth": shown(signed(batch.hq)), "painted": shown(decoded)}

    def save(self, folder: Path, batch: Batch, dtype: torch.dtype) -> None:
        save_in(self.task.prior, folder, {"unet": self.unet}, dtype)

    def blocks(self) -> list[nn.Module]:
        return [*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks, self.vae.encoder]


def edge_error(image: Tensor, truth: Tensor) -> Tensor:
    """(B,): mean absolute error of the differences of neighbouring pixels, along both axes."""
    return sum(per_sample((image.diff(dim=axis) - truth.diff(dim=axis)).abs()) for axis in (2, 3))


def save_in(prior: Path, folder: Path, parts: dict[str, nn.Module], dtype: torch.dtype) -> None:
    """A copy of a prior's folder in which some parts are replaced."""
    for place in sorted(prior.iterdir()):
        if place.name in parts or place.suffix == ".md":
            continue
        (shutil.copytree if place.is_dir() else shutil.copy)(place, folder / place.name)
    for name, part in parts.items():
        save_as(part, folder / name, dtype)


def save_as(part: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Saves a network of diffusers in a dtype, and leaves it as it was.

    Its configuration goes without what diffusers notes of defaults: arguments given by position count as such there.
    """
    state = {name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
             for name, tensor in part.state_dict().items()}
    with torch.device("meta"):
        made = type(part).from_config({key: value for key, value in part.config.items() if key[0] != "_"})
    made.load_state_dict(state, assign=True)
    made.save_pretrained(folder)


