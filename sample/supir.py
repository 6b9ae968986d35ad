"""SUPIR's restoration, from pixels to pixels (SUPIR, section 3; steps and draws in the order of the released code)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from caption.prompts import load_quality
from caption.tokens import Tokens
from models.attention import constant_text
from models.robust import RobustEncoder
from models.supir import SupirUNet
from models.supir_folder import index_of, load
from models.supir_index import stored_variant

from . import colour, pixels, sigmas, tiles, vae_tiles
from .guidance import Denoise
from .memory import Memory, Placed
from .noise import KeyedNoise
from .presets import Preset, choose, guide, run
from .samplers import OnStep
from .text import Conditioning, encode, prompts

SIZE_RULES = {"keep_aspect": pixels.plan, "released": pixels.plan_released, "page": pixels.plan_page}


@dataclass
class Restored:
    """What came of one image: (H, W, 3) uint8 pictures of the promised size, and how they were made."""

    image: np.ndarray
    stage1: np.ndarray              # the degradation-robust encoder's reading of the input, decoded
    settings: dict[str, Any]


@dataclass
class Latents:
    """What sampling starts from, for a batch of images of one size."""

    z_lq: Tensor                    # (B, C, h, w) scaled; C is 4 for SDXL
    x_stage1: Tensor                # (B, 3, H, W) in about [-1, 1]: z_lq decoded, the reference of colours
    z_stage1: Tensor                # (B, C, h, w) scaled: drawn from the plain encoder's posterior of x_stage1


class SupirPipeline:
    """SUPIR with everything around it. `pipeline(image, prompt=…)` restores one picture, or several of any sizes."""

    def __init__(self, net: SupirUNet, vae: Any, robust: RobustEncoder, tokenizers: Sequence[Any] = (),
                 encoders: Sequence[Any] = (), memory: Memory | None = None, identity: str = "",
                 compile: bool = False) -> None:
        self.tokenizers, self.memory, self.identity = list(tokenizers), memory or Memory.at("fast"), identity
        self.parts = Placed({"net": net, "vae": vae, "robust": robust,
                             **{f"text_{i}": encoder for i, encoder in enumerate(encoders)}}, self.memory)
        self.net, self.vae, self.robust = net.eval(), vae.eval(), robust.eval()
        self.scaling = vae.config.scaling_factor
        self.reduction = 2 ** (len(vae.config.block_out_channels) - 1)      # pixels of a latent's side
        if compile and self.memory.device.type == "cuda":
            net.to(memory_format=torch.channels_last)
        self.compiled = torch.compile(net) if compile else None

    @classmethod
    def from_pretrained(cls, folder: str | Path, memory: Memory | str = "fast", device: str = "auto",
                        torch_dtype: torch.dtype | None = None, compile: bool = False) -> SupirPipeline:
        """Loads a folder that `clearshard models import-supir` or training made.

        compile: by torch.compile, which takes minutes for the first picture of each size.

        Raises:
            CheckpointError: it is no SUPIR folder, or its prior is gone.
        """
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
        from transformers.utils.logging import disable_progress_bar

        from models.fingerprint import fingerprint
        disable_progress_bar()
        memory = Memory.at(memory, device, torch_dtype) if isinstance(memory, str) else memory
        folder, prior = Path(folder), index_of(Path(folder))["prior"]
        net, vae, robust = load(folder, memory.dtype)
        kinds = ((CLIPTextModel, "text_encoder"), (CLIPTextModelWithProjection, "text_encoder_2"))
        tokenizers = [CLIPTokenizer.from_pretrained(prior / name) for name in ("tokenizer", "tokenizer_2")]
        encoders = [kind.from_pretrained(prior / name, dtype=memory.dtype, variant=stored_variant(prior / name))
                    for kind, name in kinds]
        return cls(net, vae, robust, tokenizers, encoders, memory, fingerprint(folder), compile)

    def __call__(self, image: np.ndarray | Image.Image, prompt: str = "", negative_prompt: str | None = None, *,
                 scale: float = 1.0, preset: str | Preset = "quality", seed: int = 0, key: str = "",
                 quality: str = "supir", colours: colour.Method = "wavelet", size_rule: str = "keep_aspect",
                 short: int = pixels.SHORT, tile: int | None = None, released_prompt: bool = False,
                 on_step: OnStep | None = None) -> Restored:
        """Restores (H, W, 3) uint8 RGB, or a picture of Pillow, to `scale` times its size.

        prompt: what is to be seen; the words of `quality` are added. key: names the image for its noise, with `seed`.
        short: smaller pictures are worked on with a shorter side of so many pixels. tile: pixels of a window of
        sampling, None for the memory level's. colours: from the first stage by wavelet, adain, or none.
        """
        preset = choose(preset) if isinstance(preset, str) else preset
        image = np.asarray(image.convert("RGB")) if isinstance(image, Image.Image) else image
        sizes, noise = SIZE_RULES[size_rule](image.shape[:2], scale, short=short), KeyedNoise(seed, [key])
        positive, negative = self.prompt(prompt, negative_prompt, quality, released_prompt)
        latents = self.latents(pixels.prepare(image, sizes), noise)
        told = self.told([negative]), self.told([positive])
        sampled = self.sample(latents, *told, preset, noise, tile or self.memory.tile, on_step)
        decoded = colour.match(self.decode(sampled), latents.x_stage1, colours)
        settings = {"model": self.identity, "prompt": positive, "negative_prompt": negative, "scale": scale,
                    "seed": seed, "key": key, "preset": preset.model_dump(mode="json"), "colours": colours,
                    "size_rule": size_rule, "short": short, "tile": tile or self.memory.tile,
                    "dtype": str(self.memory.dtype).removeprefix("torch."),
                    "working_size": list(sizes.working), "promised_size": list(sizes.promised)}
        return Restored(pixels.finish(decoded, sizes), pixels.finish(latents.x_stage1, sizes), settings)

    def prompt(self, caption: str, negative: str | None, quality: str, released: bool) -> tuple[str, str]:
        words = load_quality(quality)
        positive, default = prompts(caption, words, Tokens(self.tokenizers[0]), released=released)
        return positive, default if negative is None else negative

    def told(self, texts: list[str]) -> Conditioning:
        """Prompts through both text encoders; float32 on the host."""
        names = [name for name in self.parts.modules if name.startswith("text_")]
        with self.parts.on_device(*names) as encoders:
            return encode(texts, self.tokenizers, list(encoders)).to(torch.device("cpu"), torch.float32)

    @torch.no_grad()
    def latents(self, images: Tensor, noise: KeyedNoise, drawn: Tensor | None = None) -> Latents:
        """The first stage of (B, 3, H, W) images in [-1, 1]. `drawn`: noise of the posterior, instead of `noise`'s."""
        with self.parts.on_device("vae", "robust") as (vae, robust):
            z_lq = self._moments(vae, images, robust.encoder).chunk(2, dim=1)[0] * self.scaling
            x_stage1 = self._decoded(vae, z_lq)
            mean, log_variance = self._moments(vae, x_stage1, vae.encoder).chunk(2, dim=1)
        if drawn is None:
            drawn = noise.draw(0, "stage1", mean)
        z_stage1 = mean + drawn.to(mean) * torch.exp(0.5 * log_variance.clamp(-30, 20))
        return Latents(z_lq, x_stage1, z_stage1 * self.scaling)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) scaled to (B, 3, H, W) float32 on the host, in about [-1, 1]."""
        with self.parts.on_device("vae") as (vae,):
            return self._decoded(vae, latents)

    @torch.no_grad()
    def reconstructed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] through the plain encoder and the decoder: the autoencoder alone."""
        with self.parts.on_device("vae") as (vae,):
            return self._decoded(vae, self._moments(vae, images, vae.encoder).chunk(2, dim=1)[0] * self.scaling)

    def _moments(self, vae: Any, images: Tensor, encoder: Any) -> Tensor:
        placed = images.to(vae.device, vae.dtype)
        return vae_tiles.encode(vae, placed, encoder=encoder, tile=self.memory.vae_tile).float().cpu()

    def _decoded(self, vae: Any, latents: Tensor) -> Tensor:
        placed = (latents / self.scaling).to(vae.device, vae.dtype)
        return vae_tiles.decode(vae, placed, tile=self.memory.vae_tile).float().cpu()

    def sample(self, latents: Latents, negative: Conditioning, positive: Conditioning, preset: Preset, noise: Any,
               tile: int = 1 << 20, on_step: OnStep | None = None) -> Tensor:
        """(B, C, h, w) scaled latents. negative, positive: one prompt, or one for each image."""
        with self.parts.on_device("net") as (net,), constant_text(net):
            denoise = self.denoiser(net, latents.z_lq, negative, positive, preset, tile // self.reduction)
            return run(preset, denoise, noise, z_stage1=latents.z_stage1, z_lq=latents.z_lq, on_step=on_step)

    def denoiser(self, net: SupirUNet, z_lq: Tensor, negative: Conditioning, positive: Conditioning, preset: Preset,
                 tile: int) -> Denoise:
        """Guided, in windows where the latent is larger than one of `tile` latent pixels."""
        halves = Halves(net, negative, positive, self.memory, self.compiled)

        def over(lq: Tensor) -> Denoise:
            placed = lq.to(net.unet.device, net.unet.dtype)
            return guide(preset, partial(halves.both, placed), partial(halves.alone, placed))
        if max(z_lq.shape[-2:]) <= tile:
            return over(z_lq)
        return tiles.tiled(lambda x, sigma, some: over(tiles.cut(z_lq, some))(x, sigma), tile=tile, stride=tile // 2,
                           batch=self.memory.windows)


class Halves:
    """The network for both prompts: in one batch, or one after the other where memory is scarce.

    What is told is placed once for each size of batch, so that attention can keep its projections from step to step.
    """

    def __init__(self, net: SupirUNet, negative: Conditioning, positive: Conditioning, memory: Memory,
                 compiled: Any = None) -> None:
        self.net, self.memory, self.compiled = net, memory, compiled
        self.told = {"negative": negative, "positive": positive}
        self.placed: dict[tuple[str, int], Conditioning] = {}

    def alone(self, z_lq: Tensor, x: Tensor, sigma: float, scale: float) -> Tensor:
        return self._denoised(x, sigma, scale, z_lq, self._placed("positive", len(x)))

    def both(self, z_lq: Tensor, x: Tensor, sigma: float, scale: float) -> tuple[Tensor, Tensor]:
        if not self.memory.halves_together:
            return tuple(self._denoised(x, sigma, scale, z_lq, self._placed(name, len(x))) for name in self.told)
        twice, lq = torch.cat([x, x]), torch.cat([z_lq, z_lq])
        return self._denoised(twice, sigma, scale, lq, self._placed("both", len(x))).chunk(2)

    def _placed(self, name: str, count: int) -> Conditioning:
        """The prompts of a batch of so many images, on the device."""
        if (name, count) not in self.placed:
            parts = [self.told[one].repeated(count // len(self.told[one].context))
                     for one in (self.told if name == "both" else (name,))]
            whole = parts[0].joined(parts[1]) if name == "both" else parts[0]
            self.placed[name, count] = whole.to(self.net.unet.device, self.net.unet.dtype)
        return self.placed[name, count]

    def _denoised(self, x: Tensor, sigma: float, scale: float, z_lq: Tensor, told: Conditioning) -> Tensor:
        def network(given: Tensor, index: int) -> Tensor:
            call, strength = self.net, scale
            if self.compiled is not None:       # as a number, each new scale would be compiled anew
                call, strength = self.compiled, torch.full((len(x),), scale, device=z_lq.device, dtype=z_lq.dtype)
            noise = call(given.to(z_lq), torch.tensor(index, device=z_lq.device), z_lq, *told.parts(),
                         control_scale=strength)
            return noise.to(given.device, torch.float32)
        return sigmas.denoiser(network)(x, sigma)
