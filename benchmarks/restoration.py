"""Restoration: what a step costs, beside a plain loop over the same networks.

    python benchmarks/restoration.py                     # on a CPU: calls and operations of a step, tiny networks
    python benchmarks/restoration.py --device cuda       # SUPIR's real shape with random weights, at 1024 pixels
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))

# TFLOP of a step with guidance at 1024 pixels, and around it, and what an H200 computes in bf16: specs of the project.
STEP, AROUND, IDEAL = 20.28, 30.7, 790.0


def networks(device: str, tiny: bool) -> tuple[Any, Any, Any]:
    """UNet with adaptor, autoencoder and robust encoder with random weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from models.robust import RobustEncoder
    from models.supir import SupirAdaptor, SupirUNet
    widths, depth, heads = (320, 640, 1280), (1, 2, 10), (5, 10, 20)
    if tiny:
        widths, depth, heads = (32, 64, 128), (1, 1, 2), (1, 2, 4)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)
    try:
        with torch.device(device):
            unet = UNet2DConditionModel(
                block_out_channels=widths, layers_per_block=2, sample_size=128, use_linear_projection=True,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2048,
                transformer_layers_per_block=depth, attention_head_dim=heads, addition_embed_type="text_time",
                addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)
            vae = AutoencoderKL(
                block_out_channels=(32, 64, 64, 64) if tiny else (128, 256, 512, 512), layers_per_block=2,
                latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=0.13025)
            return SupirUNet(unet, SupirAdaptor.from_unet(unet)), vae, RobustEncoder.from_vae(vae)
    finally:
        torch.set_default_dtype(before)


class Operations(TorchDispatchMode):
    """Counts operations that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not any(word in str(function) for word in ("view", "transpose", "t.default", "expand", "detach",
                                                                  "slice", "unsqueeze", "permute", "alias", "split"))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def plain(net: Any, z_lq: torch.Tensor, negative: Any, positive: Any, preset: Any, noise: Any,
          centre: torch.Tensor) -> torch.Tensor:
    """The loop as one would write it first: two calls a step, every projection anew."""
    from sample import sigmas
    from sample.guidance import guided
    from sample.samplers import edm, start

    def one(told: Any, x: torch.Tensor, sigma: float, scale: float) -> torch.Tensor:
        def network(given: torch.Tensor, index: int) -> torch.Tensor:
            return net(given.to(z_lq), torch.tensor(index, device=z_lq.device), z_lq, *told.parts(),
                       control_scale=scale).to(given)
        return sigmas.denoiser(network)(x, sigma)

    def both(x: torch.Tensor, sigma: float, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        return one(negative, x, sigma, scale), one(positive, x, sigma, scale)
    levels = preset.sigmas()
    denoise = guided(both, preset.guidance, preset.control, lambda raised: preset.churn.before(raised, preset.steps))
    return edm(denoise, start(noise.start(centre), levels), levels, churn=preset.churn, noise=noise)


def measure(options: argparse.Namespace) -> None:
    from sample.memory import Memory
    from sample.noise import KeyedNoise
    from sample.presets import choose
    from sample.supir import Latents, SupirPipeline
    from sample.text import Conditioning
    device, tiny = options.device, options.device == "cpu"
    net, vae, robust = networks(device, tiny)
    side = 16 if tiny else 128
    preset = choose("fidelity", {"steps": options.steps})
    pipeline = SupirPipeline(net, vae, robust, memory=Memory.at(options.memory, device))
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}, torch {torch.__version__}, {options.steps} "
          f"steps, latents of {side} x {side}, memory {options.memory}")
    for batch in options.batches:
        told = [Conditioning(torch.randn(batch, 77, 2048), torch.randn(batch, 1280), torch.full((batch, 6), 1024.0))
                for _ in range(2)]
        z = torch.randn(batch, 4, side, side)
        noise, latents = KeyedNoise(0, [str(i) for i in range(batch)]), Latents(z, torch.zeros(1), z)
        placed = [one.to(net.unet.device, net.unet.dtype) for one in told]
        ways = {"plain loop": lambda noise=noise, z=z, placed=placed: plain(
                    net, z.to(device, net.unet.dtype), *placed, preset, noise, z),
                "pipeline": lambda noise=noise, latents=latents, told=told: pipeline.sample(
                    latents, *told, preset, noise)}
        report(ways, net, batch, options, device)


def report(ways: dict[str, Any], net: Any, batch: int, options: argparse.Namespace, device: str) -> None:
    first = None
    for name, way in ways.items():
        calls: list[int] = []
        hook = net.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with Operations() as operations:
            way()
        hook.remove()
        seconds = []
        for _ in range(options.repeats):
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            started = time.perf_counter()
            way()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        taken = min(seconds) / batch
        first = first or taken
        more = ""
        if device == "cuda":
            ideal = (STEP * options.steps) / IDEAL
            more = (f", {ideal / taken:.2f} of the ideal {ideal:.2f} s, peak "
                    f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        print(f"  batch {batch}, {name:<10} {len(calls) / options.steps:4.1f} calls and "
              f"{operations.count / options.steps:7.0f} operations a step, {taken:8.3f} s an image, "
              f"{first / taken:5.2f} times as fast{more}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--memory", choices=["low", "balanced", "fast"], default="fast")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1 if options.device == "cpu" else torch.get_num_threads())
    measure(options)


if __name__ == "__main__":
    main()
