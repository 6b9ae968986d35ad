"""`supir.encoder` and `supir.adaptor`: what SUPIR trains (arXiv 2401.13627, sections 3.1 to 3.3)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from pydantic import Field
from torch import Tensor, nn

from degrade.strict import ConfigError
from models import supir_folder
from models.fingerprint import fingerprint
from models.robust import RobustEncoder
from models.supir import SupirAdaptor, SupirUNet
from models.supir_index import INDEX, read_index
from sample.model import Recommended, resolved
from sample.presets import Preset, choose

from ..named import Named
from ..objective import GRID, Losses, Objective, network, per_sample, shown, signed
from .diffusion import Noising, encoded, epsilon_loss, noised
from .perceptual import Perceptual, perceptual
from .prior import PriorTask, save_as
from .text import Text, Told

if TYPE_CHECKING:
    from ..batches import Batch

ENCODER = "robust_encoder"
LICENCE = "that of whoever trained it, within what the prior's allows"


class Encoder(PriorTask):
    """The degradation-robust encoder, from the prior's plain one."""

    name: Literal["supir.encoder"]
    target: Literal["pixels", "decoded", "printed"] = Field(
        "pixels", description="what the decoded low-quality image should be: the true pixels; what the plain encoder "
        "makes of them; or, as printed in the paper, what the trained encoder makes of them, which a constant "
        "satisfies")
    pixel: float = Field(1.0, ge=0, description="weight of the squared error of decoded pixels")
    latent: float = Field(0.1, ge=0, description="weight of the absolute error of latents, to the plain encoder's of "
                                                 "the true image; not used where the target is as printed")
    perceptual: float = Field(0.0, ge=0, description="weight of LPIPS between decoded and true pixels; needs pyiqa")
    start: Path | None = Field(None, description="a robust encoder to go on from: its folder, or a SUPIR folder")

    def check(self) -> None:
        super().check()
        if self.start is not None:
            encoder_folder(self.start)
        if not self.pixel and not (self.latent and self.target != "printed") and not self.perceptual:
            raise ConfigError("task: every weight is 0, so there is nothing to learn; pixel: 1.0 is the default")

    def build(self, device: torch.device) -> EncoderObjective:
        return EncoderObjective(self, device)


class EncoderObjective(Objective):
    """Equation 1 of the paper with a target that stays where it is; see `Encoder.target` for the one as printed.

    As printed, ‖D(E(LQ)) − D(E(HQ))‖² with the trained E in both places is least, namely zero, for an E that does not
    look at its input.
    """

    def __init__(self, task: Encoder, device: torch.device) -> None:
        super().__init__()
        self.task = task
        self.vae = network(AutoencoderKL, task.prior / "vae", device)
        if task.start is not None:
            self.robust = network(RobustEncoder, encoder_folder(task.start), device, trained=True)
        else:
            with device if device.type == "meta" else torch.device("cpu"):
                self.robust = RobustEncoder.from_vae(self.vae).float().to(device)
        self.robust.requires_grad_(True)
        self.near = task.latent > 0 and task.target != "printed"
        self.lpips: Perceptual | None = perceptual(device) if task.perceptual else None

    def prepare(self, batch: Batch, draws: Named, level: int | None = None) -> dict[str, Tensor]:
        inputs = {"lq": signed(batch.lq), "truth": signed(batch.hq)}
        if self.near or self.task.target == "decoded":
            inputs["latent"] = self.vae.encode(inputs["truth"].to(self.vae.dtype)).latent_dist.mode().float()
        if self.task.target == "decoded":
            inputs["target"] = self.decoded(inputs["latent"].to(self.vae.dtype)).float()
        return inputs

    def forward(self, inputs: dict[str, Tensor]) -> Losses:
        task, latent = self.task, self.read(inputs["lq"])
        decoded = self.decoded(latent).float()
        target = inputs.get("target", inputs["truth"])
        if task.target == "printed":
            target = self.decoded(self.read(inputs["truth"])).float()
        losses = {"pixel": per_sample((decoded - target) ** 2)}
        loss = task.pixel * losses["pixel"]
        if self.near:
            losses["latent"] = per_sample((latent.float() - inputs["latent"]).abs()) * self.vae.config.scaling_factor
            loss = loss + task.latent * losses["latent"]
        if self.lpips is not None:
            losses["perceptual"] = self.lpips(decoded, inputs["truth"])
            loss = loss + task.perceptual * losses["perceptual"]
        with torch.no_grad():
            losses["mse"] = per_sample((decoded.clamp(-1, 1) - inputs["truth"]) ** 2) / 4
        return {"loss": loss, **losses}

    def read(self, image: Tensor) -> Tensor:
        """The mode of the robust encoder's posterior: what SUPIR gives to the control copy."""
        return self.robust(image, self.vae).mode()

    def decoded(self, latent: Tensor) -> Tensor:
        return self.vae.decoder(self.vae.post_quant_conv(latent))

    def preview(self, batch: Batch, draws: Named) -> dict[str, Tensor]:
        lq = signed(batch.lq)
        plain = self.vae.encode(lq.to(self.vae.dtype)).latent_dist.mode()
        return {"low quality": shown(lq), "plain encoder": shown(self.decoded(plain)),
                "robust encoder": shown(self.decoded(self.read(lq))), "truth": shown(signed(batch.hq))}

    def save(self, folder: Path, batch: Batch, dtype: torch.dtype) -> None:
        """`robust_encoder/`, which the task `supir.adaptor` takes."""
        save_as(self.robust, folder / ENCODER, dtype)

    def blocks(self) -> list[nn.Module]:
        return [self.robust.encoder, self.vae.encoder, self.vae.decoder]


class Adaptor(PriorTask):
    """The control copy and the connectors, beside a frozen prior and a frozen robust encoder."""

    name: Literal["supir.adaptor"]
    encoder: Path = Field(description="folder of the robust encoder, or a run or SUPIR folder that has one")
    depth: Literal["released", "paper"] | list[int] = Field(
        "released", description="transformer blocks of the control copy by level: all of the prior's, as the published "
        "weights; half of them, as the paper says; or one's own, such as [1, 2, 4]")
    connector: Literal["zero_sft", "zero_conv"] = Field("zero_sft", description="zero_conv: the paper's ablation")
    gated: bool = Field(False, description="connectors start as the identity, by a learned gate; not SUPIR's own")
    start: Path | None = Field(None, description="a SUPIR folder whose adaptor to go on from; its depth and connectors")
    told: Told = Told()
    noising: Noising = Noising()
    include_prior: bool = Field(False, description="copy the prior into the folder, so that it can be handed on")
    licence: str = Field(LICENCE, description="of the weights, as the folder states it")
    described: Recommended = Field(Recommended(), description="what the folder says of itself, and how to restore with "
                                                              "it where nothing else is said")
    preset: str = Field("fidelity", description="of the previews, where `described` recommends none")
    preview_steps: int = Field(20, ge=1, le=1000, description="of sampling of the previews")

    def check(self) -> None:
        super().check()
        encoder_folder(self.encoder)
        self.previewed()
        if self.start is not None:
            read_index(self.start)
        elif not isinstance(self.depth, str):
            levels = len(prior_unet(self.prior)["block_out_channels"])
            if len(self.depth) != levels:
                raise ConfigError(f"task.depth: {self.depth} names {len(self.depth)} levels; the prior has {levels}")

    def previewed(self) -> Preset:
        """How previews are sampled."""
        own = self.described.preset
        preset = resolved(own, "task.described") if own else choose(self.preset, where="task.preset")
        return choose(preset, {"steps": self.preview_steps}, "task.preview_steps")

    def made_from(self) -> dict[str, str]:
        return super().made_from() | {"encoder": fingerprint(encoder_folder(self.encoder))}

    def build(self, device: torch.device) -> AdaptorObjective:
        return AdaptorObjective(self, device)


class AdaptorObjective(Objective):
    """The noise in a latent, from its low-quality partner and the caption; the prior stays as it is."""

    levels = GRID

    def __init__(self, task: Adaptor, device: torch.device) -> None:
        super().__init__()
        self.task = task
        unet = network(UNet2DConditionModel, task.prior / "unet", device)
        self.net = SupirUNet(unet, self._adaptor(unet, device))
        self.vae = network(AutoencoderKL, task.prior / "vae", device)
        self.robust = network(RobustEncoder, encoder_folder(task.encoder), device)
        self.text = Text(task.prior, task.told, device)

    def _adaptor(self, unet: UNet2DConditionModel, device: torch.device) -> SupirAdaptor:
        if self.task.start is not None:
            return network(SupirAdaptor, self.task.start / "adaptor", device, trained=True)
        with torch.device("meta" if device.type == "meta" else "cpu"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)        # of the connectors' layers that are not zero
            adaptor = SupirAdaptor.from_unet(unet, self.task.depth, self.task.connector, self.task.gated)
        return adaptor.float().to(device).requires_grad_(True)

    def prepare(self, batch: Batch, draws: Named, level: int | None = None) -> dict[str, Tensor]:
        latent = encoded(self.vae, batch.hq, draws)
        z_lq = self.robust.latent(signed(batch.lq).to(self.robust.dtype), self.vae)
        return (noised(latent, self.task.noising, batch, draws, level) | self.text.inputs(batch, draws)
                | {"z_lq": z_lq.float()})

    def forward(self, inputs: dict[str, Tensor]) -> Losses:
        predicted = self.net(inputs["noisy"], inputs["level"], inputs["z_lq"], inputs["context"], inputs["pooled"],
                             inputs["sizes"])
        return epsilon_loss(predicted, inputs, self.task.noising)

    def preview(self, batch: Batch, draws: Named) -> dict[str, Tensor]:
        pipeline, preset = self._pipeline(batch.hq.device), self.task.previewed()
        restored, stage1 = [], []
        for number, image in enumerate(batch.lq.permute(0, 2, 3, 1).cpu().numpy()):
            made = pipeline(image, batch.texts[number], preset=preset, key=batch.keys[number], short=image.shape[0],
                            quality=self.task.told.quality)
            restored.append(torch.from_numpy(made.image.copy()))
            stage1.append(torch.from_numpy(made.stage1.copy()))
        self.net.train()
        return {"low quality": shown(signed(batch.lq)), "first stage": pictures(stage1), "restored": pictures(restored),
                "truth": shown(signed(batch.hq))}

    def _pipeline(self, device: torch.device) -> Any:
        from sample.memory import Memory
        from sample.supir import SupirPipeline
        return SupirPipeline(self.net, self.vae, self.robust, self.text.tokenizers, list(self.text.encoders),
                             Memory.at("fast", str(device), torch.float32))

    def save(self, folder: Path, batch: Batch, dtype: torch.dtype) -> None:
        """A SUPIR folder, with the prior or referring to where it lies."""
        save_as(self.net.adaptor, folder / "adaptor", dtype)
        save_as(self.robust, folder / ENCODER, dtype)
        prior = self.task.prior
        if self.task.include_prior:
            ignored = shutil.ignore_patterns("*.md", "trained.json")
            prior = shutil.copytree(prior, folder / "prior", ignore=ignored)
        supir_folder.write_index(folder, prior, self.task.licence, **self.task.described.model_dump(exclude_none=True))

    def blocks(self) -> list[nn.Module]:
        control, unet = self.net.adaptor.control, self.net.unet
        return [*control.down_blocks, control.mid_block, *self.net.adaptor.connectors.values(), *unet.down_blocks,
                unet.mid_block, self.vae.encoder, self.robust.encoder]


def pictures(images: list[Tensor]) -> Tensor:
    """(H, W, 3) uint8 pictures as (B, 3, H, W) in [0, 1]."""
    return torch.stack(images).permute(0, 3, 1, 2).float() / 255


def encoder_folder(place: Path) -> Path:
    """The folder of a robust encoder: itself, or inside a SUPIR folder or what a run made.

    Raises:
        ConfigError: there is none.
    """
    for folder in (place, place / ENCODER, place / "model" / ENCODER):
        if (folder / "config.json").is_file():
            return folder
    hint = f"; {INDEX} is there, so it is no complete SUPIR folder" if (place / INDEX).is_file() else ""
    raise ConfigError(f"{place} holds no robust encoder: neither config.json nor {ENCODER}/config.json{hint}. The task "
                      "supir.encoder makes one")


def prior_unet(prior: Path) -> dict[str, Any]:
    return supir_folder.prior_part(prior, "unet")


