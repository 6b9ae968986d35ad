"""Negatives: SDXL's real shape with random weights, seconds an image beside the ideal of an H200.

    python benchmarks/painting.py --device cuda          # 1024 pixels, 30 steps, text-to-image and image-to-image
    python benchmarks/painting.py --toy                  # a toy's shape on a CPU, to try the script itself
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

# TFLOP at 1024 pixels: UNet (twice a step), decoder, encoder; and TFLOP/s of an H200 in bf16 (docs/planning.md).
UNET, DECODER, ENCODER, IDEAL = 6.761, 10.470, 4.879, 790.0


def pipelines(device: str, toy: bool) -> dict[str, Any]:
    """Both pipelines over the same networks; what is told comes as tensors, so no text encoder is there."""
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionXLImg2ImgPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    try:
        with torch.device(device):
            unet = UNet2DConditionModel(
                block_out_channels=(32, 64, 128) if toy else (320, 640, 1280), layers_per_block=2, sample_size=128,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2048,
                transformer_layers_per_block=(1, 1, 1) if toy else (1, 2, 10), use_linear_projection=True,
                attention_head_dim=(1, 2, 4) if toy else (5, 10, 20), addition_embed_type="text_time",
                addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816).eval()
            vae = AutoencoderKL(
                block_out_channels=(32,) * 4 if toy else (128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                scaling_factor=0.13025, force_upcast=False).eval()
    finally:
        torch.set_default_dtype(before)
    shared = {"vae": vae, "unet": unet, "text_encoder": None, "text_encoder_2": None, "tokenizer": None,
              "tokenizer_2": None, "add_watermarker": False, "scheduler": EulerDiscreteScheduler(
                  beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading",
                  steps_offset=1)}
    made = {"text-to-image": StableDiffusionXLPipeline(**shared),
            "image-to-image": StableDiffusionXLImg2ImgPipeline(**shared)}
    for pipeline in made.values():
        pipeline.set_progress_bar_config(disable=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--toy", action="store_true", help="a toy's shape")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {options.size} pixels, {options.steps} steps, strength 0.5")
    area = (options.size / 1024) ** 2
    for kind, pipeline in pipelines(options.device, options.toy).items():
        done = options.steps if kind == "text-to-image" else options.steps // 2
        ideal = area * (2 * UNET * done + DECODER + (ENCODER if kind == "image-to-image" else 0)) / IDEAL
        for batch in options.batches:
            seconds, peak = timed(pipeline, kind, batch, options)
            print(f"  {kind:<15} batch {batch:2d}: {seconds:7.3f} s an image, {ideal / seconds:6.3f} of an H200's "
                  f"ideal ({ideal:.2f} s){peak}")


def timed(pipeline: Any, kind: str, batch: int, options: argparse.Namespace) -> tuple[float, str]:
    """Seconds an image, the better of two, and the peak of memory."""
    device, dtype = options.device, pipeline.unet.dtype
    told = {f"{sign}{what}": torch.randn(batch, *shape, device=device, dtype=dtype) for sign in ("", "negative_")
            for what, shape in (("prompt_embeds", (77, 2048)), ("pooled_prompt_embeds", (1280,)))}
    where = {"height": options.size, "width": options.size}
    if kind == "image-to-image":
        where = {"image": torch.rand(batch, 3, options.size, options.size), "strength": 0.5}
    best = float("inf")
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        started = time.perf_counter()
        pipeline(num_inference_steps=options.steps, guidance_scale=5.0, output_type="np",
                 generator=[torch.Generator().manual_seed(i) for i in range(batch)], **told, **where)
        best = min(best, (time.perf_counter() - started) / batch)
    return best, f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device == "cuda" else ""


if __name__ == "__main__":
    main()
