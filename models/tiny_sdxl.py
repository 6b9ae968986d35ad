"""An SDXL of half a million random weights: every part in its place, pictures without a meaning."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .tiny_llava import one_thread

START, END = "<|startoftext|>", "<|endoftext|>"
# Words for the tokenizer; what they lack is spelt in bytes.
WORDS = """a photograph of the cat with green eyes on wooden table, an oil painting, cartoon, blurring, dirty, messy,
low quality, deformation, low resolution, oversmooth, style, picture in red cup and white rocket at dusk, high detail"""
WIDTHS = (32, 48)       # of the two text encoders; SDXL's are 768 and 1280
TIME_WIDTH = 8          # of each of the six size numbers that SDXL is told; its own is 256


def tokenizer(pad: str) -> CLIPTokenizer:
    """CLIP's kind of tokenizer with a small vocabulary: lower case, words that end in </w>, 77 tokens."""
    core = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    core.train_from_iterator([WORDS], trainers.BpeTrainer(
        vocab_size=400, end_of_word_suffix="</w>", show_progress=False, min_frequency=1))
    merges = [tuple(pair) for pair in json.loads(core.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*made, START, END]))}
    with tempfile.TemporaryDirectory() as folder:
        # Through files, because the constructor's arguments changed between transformers 4 and 5.
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary))
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (Path(folder) / "merges.txt").write_text("\n".join(lines) + "\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token=pad, bos_token=START,
                                             eos_token=END, unk_token=END)


def text_config(words: CLIPTokenizer, width: int, act: str) -> CLIPTextConfig:
    """Three layers, because SDXL reads the last but one."""
    return CLIPTextConfig(vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
                          num_attention_heads=4, projection_dim=WIDTHS[1], hidden_act=act,
                          max_position_embeddings=77, bos_token_id=words.bos_token_id,
                          eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)


def unet(channels: tuple[int, ...] = (8, 16, 32), heads: tuple[int, ...] = (1, 2, 4), latent_channels: int = 4,
         groups: int = 8) -> UNet2DConditionModel:
    """SDXL's three levels, attention in the lower two, told the pooled text and six size numbers.

    heads: of attention on each level; groups: of its normalisations, which must divide all channels.
    """
    return UNet2DConditionModel(
        sample_size=32, in_channels=latent_channels, out_channels=latent_channels, block_out_channels=channels,
        layers_per_block=1, norm_num_groups=groups,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2), attention_head_dim=heads, use_linear_projection=True,
        cross_attention_dim=sum(WIDTHS), addition_embed_type="text_time", addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_WIDTH + WIDTHS[1])


def autoencoder(channels: tuple[int, ...] = (8, 8, 16, 16), latent_channels: int = 4,
                scaling_factor: float = 0.13025) -> AutoencoderKL:
    """SDXL's autoencoder, narrow: with its four levels, a picture of 8n pixels is a latent of n."""
    levels = len(channels)
    return AutoencoderKL(
        block_out_channels=channels, layers_per_block=1, norm_num_groups=8, latent_channels=latent_channels,
        sample_size=256,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        scaling_factor=scaling_factor, force_upcast=True)


def scale(layer: torch.nn.Conv2d, output: torch.Tensor, std: float) -> None:
    """Makes the layer's output, per channel over (B, C, H, W), centred and of this deviation."""
    factor = std / output.std((0, 2, 3))
    layer.weight *= factor[:, None, None, None]
    layer.bias.copy_((layer.bias - output.mean((0, 2, 3))) * factor)


@torch.no_grad()
def calibrate(pipeline: StableDiffusionXLPipeline) -> None:
    """Random weights shrink a signal to grey; scale what comes out to the spread of the real model's."""
    vae, network = pipeline.vae, pipeline.unet
    half = vae.config.latent_channels
    noise = torch.nn.functional.interpolate(torch.randn(4, 3, 16, 16), scale_factor=8, mode="bicubic")
    features = vae.encoder(noise.clamp(-1, 1))
    # The posterior's mean gets the spread that scaling_factor undoes, and its logarithmic variance becomes -10.
    vae.quant_conv.weight[half:], vae.quant_conv.bias[half:] = 0, -10
    mean = vae.quant_conv(features)[:, :half]
    factor = (1 / vae.config.scaling_factor) / mean.std((0, 2, 3))
    vae.quant_conv.weight[:half] *= factor[:, None, None, None]
    vae.quant_conv.bias[:half] = (vae.quant_conv.bias[:half] - mean.mean((0, 2, 3))) * factor
    latent = torch.randn(4, half, 16, 16) / vae.config.scaling_factor
    scale(vae.decoder.conv_out, vae.decode(latent).sample, 0.5)
    added = {"text_embeds": torch.randn(4, WIDTHS[1]), "time_ids": torch.tensor([[256., 256, 0, 0, 256, 256]] * 4)}
    guess = network(torch.randn(4, half, 32, 32), torch.tensor([981, 661, 341, 21]), torch.randn(4, 77, sum(WIDTHS)),
                    added_cond_kwargs=added).sample
    scale(network.conv_out, guess, 1.0)


@torch.no_grad()
def assemble(seed: int = 0, make_unet: Callable[[], UNet2DConditionModel] = unet,
             make_vae: Callable[[], AutoencoderKL] = autoencoder, finish: Callable | None = calibrate
             ) -> StableDiffusionXLPipeline:
    """The pipeline, its weights drawn by the seed; the caller's random generator stays as it was."""
    # SDXL's first tokenizer pads with the end, its second with "!".
    words = tokenizer(END), tokenizer("!")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = CLIPTextModel(text_config(words[0], WIDTHS[0], "quick_gelu"))
        second = CLIPTextModelWithProjection(text_config(words[1], WIDTHS[1], "gelu"))
        for encoder in (first, second):
            for embedding in encoder.modules():
                if isinstance(embedding, torch.nn.Embedding):
                    embedding.weight.normal_()      # as drawn they are 0.02: all prompts alike
        pipeline = StableDiffusionXLPipeline(
            vae=make_vae(), unet=make_unet(), text_encoder=first, text_encoder_2=second, tokenizer=words[0],
            tokenizer_2=words[1], add_watermarker=False, scheduler=EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading",
                steps_offset=1, prediction_type="epsilon"))
        for part in (pipeline.vae, pipeline.unet, first, second):
            part.eval()
        if finish:
            finish(pipeline)
    return pipeline


def build(folder: str | os.PathLike, seed: int = 0) -> None:
    """Saves the pipeline in diffusers' layout."""
    with one_thread():
        assemble(seed).save_pretrained(folder)
