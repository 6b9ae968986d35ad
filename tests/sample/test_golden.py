"""Sampling, tiles, colour and pixels against outputs of the authors' released code."""

import numpy as np
import pytest
import torch

from sample import colour, pixels, sigmas
from sample.guidance import Churn, Control, Guidance, Restore, guided
from sample.samplers import dpmpp_2m_sde, edm, start
from sample.tiles import cut, tiled, weights, windows

from .golden import Golden, difference

GOLDEN = Golden("supir_samplers")
CASES = GOLDEN.side["config"]["cases"]
COLOUR, PIXELS = Golden("supir_color"), Golden("supir_pixels")
CLOSE = 1e-4


def inputs(case: dict) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """The tensors of a case, and its noise by step."""
    prefix = "tiled." if case.get("tiled") else ""
    named = {name: GOLDEN.input(prefix + name)[:case.get("batch")] for name in ("x", "x_center", "control")}
    if not prefix:
        named |= {name: GOLDEN.input(name)[:case.get("batch")] for name in ("crossattn", "crossattn_uncond")}
    return named, [GOLDEN.input(f"{prefix}noise.{step}")[:case.get("batch")] for step in range(case["noise"])]


def analytic(kind: str, x: torch.Tensor, s: float, text: torch.Tensor, control: torch.Tensor,
             scale: float) -> torch.Tensor:
    """The reference's denoisers, which need no network."""
    if kind == "D_gauss":
        return x / (1 + s ** 2)
    if kind == "D_full":
        return (x + s ** 2 * (0.3 * text + scale * 0.5 * control)) / (1 + s ** 2)
    return (x + s ** 2 * scale * control) / (1 + s ** 2) + 0.1 * x.mean((2, 3), keepdim=True) / (1 + s)


def sampled(name: str) -> tuple[torch.Tensor, list[float], list[float]]:
    """Our result of a golden case, the sigmas that the denoiser received, and the control scales."""
    case, (named, noises) = CASES[name], inputs(CASES[name])
    call, init, seen = case["call"], case["init"], ([], [])
    guidance = Guidance(low=case["cfg_scale_min"], high=case["cfg_scale"])
    low = call.get("control_scale", 1.0)
    control = Control(low=low, high=call.get("control_scale_start", low))
    churn = Churn(amount=init.get("s_churn", 0), noise=init["s_noise"])

    def parts(x, sigma, scale, hint, text, text_uncond):
        seen[0].append(sigma)
        seen[1].append(scale)
        return tuple(analytic(case["denoiser"], x, sigma, words, hint, scale) for words in (text_uncond, text))

    def window_denoise(x, sigma, layout):
        hint = cut(named["control"], layout)
        return guided(lambda x, s, scale: parts(x, s, scale, hint, hint, hint), guidance, control)(x, sigma)

    if case.get("tiled"):
        denoise = tiled(window_denoise, tile=init["tile_size"], stride=init["tile_stride"], batch=2, released=True)
    else:
        denoise = guided(lambda x, s, scale: parts(x, s, scale, *(
            named[part] for part in ("control", "crossattn", "crossattn_uncond"))), guidance, control)
    # "x is cast before the run, the denoiser computes in float32": ours computes everything in float32.
    x = named["x"].bfloat16() if case.get("x_dtype") else named["x"]
    if "eta" in init:
        levels = sigmas.karras(case["num_steps"])
        out = dpmpp_2m_sde(denoise, start(x, levels), levels, eta=init["eta"], s_noise=init["s_noise"], released=True,
                           noise=lambda step, x: noises[step - 1])
    else:
        levels = sigmas.released(case["num_steps"])
        restore = Restore(named["x_center"], init["restore_cfg"]) if init["restore_cfg"] > 0 else None
        out = edm(denoise, start(x, levels), levels, churn=churn, restore=restore, noise=lambda step, x: noises[step])
    return out, *seen


@pytest.mark.parametrize("name", CASES)
def test_samplers_end_where_the_released_ones_do(name):
    out, seen, scales = sampled(name)
    bf16 = name == "edm_bf16_x"         # theirs rounds the sigmas too, 14.6146 to 14.625; ours does not
    assert difference(out, GOLDEN[f"{name}.out"]) < (5e-2 if bf16 else CLOSE)
    if f"{name}.sigma_seen" in GOLDEN.outputs and not bf16:
        assert difference(torch.tensor(seen), GOLDEN[f"{name}.sigma_seen"]) < CLOSE
        assert difference(torch.tensor(scales), GOLDEN[f"{name}.control_scale_seen"]) < CLOSE


@pytest.mark.parametrize("steps", GOLDEN.side["schedules"])
def test_the_released_spacing_is_the_released_one(steps):
    assert difference(sigmas.released(steps), GOLDEN[f"schedule.{steps}"]) < CLOSE


def test_the_table_and_the_karras_spacing_are_the_released_ones():
    assert difference(sigmas.table(), GOLDEN["sigma_table"]) < CLOSE
    assert difference(sigmas.karras(100), GOLDEN["karras.100"]) < CLOSE


def test_the_guidance_weight_is_the_released_one():
    side = GOLDEN.side["linear_cfg"]
    guidance = Guidance(low=side["scale_min"], high=side["scale"])
    for image, sigma in enumerate(side["sigma"]):
        pair = GOLDEN.input("cfg_x_uncond")[image], GOLDEN.input("cfg_x_cond")[image]
        denoise = guided(lambda x, sigma, scale, pair=pair: pair, guidance, Control(low=1, high=1))
        assert difference(denoise(None, sigma), GOLDEN["linear_cfg"][image]) < CLOSE


@pytest.mark.parametrize("size", GOLDEN.side["gaussian_weights"])
def test_released_tile_weights_are_the_released_ones(size):
    ours = weights(size, size, released=True)
    if size >= 32:
        ours = torch.stack([ours[size // 3], ours[:, size // 3]])
    assert difference(ours, GOLDEN[f"gaussian_weights.{size}"]) < 1e-12


@pytest.mark.parametrize("layout", GOLDEN.side["windows"], ids=str)
def test_windows_are_the_released_ones(layout):
    theirs = GOLDEN["windows." + "_".join(map(str, layout))]
    assert [list(window) for window in windows(*layout)] == theirs.tolist()


def test_colour_correction_is_the_released_one():
    content, style = COLOUR.input("content"), COLOUR.input("style")
    low = torch.stack([colour.low_band(plane) for plane in content[0]])[None]
    assert difference(low, COLOUR["wavelet.low"]) < 1e-5
    assert difference(content - low, COLOUR["wavelet.high"]) < 1e-5
    for method in ("wavelet", "adain"):
        assert difference(colour.match(content, style, method), COLOUR[method]) < 1e-5
    for radius in (1, 16):
        blurred = torch.stack([colour.blur(plane, radius) for plane in content[0]])[None]
        assert difference(blurred[:, :, ::8], COLOUR[f"blur.{radius}"]) < 1e-5


@pytest.mark.parametrize("described", PIXELS.side["config"]["images"], ids=lambda image: image["name"])
def test_pixels_take_the_released_ways(described):
    image, number = PIXELS.input(described["name"]).numpy(), described["name"][-1]
    source, short = image.shape[:2], described["min_size"]
    plan = pixels.plan_released(source, described["upscale"], short=short, fixed=described["fix_resize"] or None)
    tensor = pixels.prepare(image, plan)
    resized = PIXELS[f"resized.{number}"].permute(2, 0, 1)[None]
    assert difference(tensor, resized.float() / 255 * 2 - 1) == 0
    assert list(plan.promised) == PIXELS[f"size.{number}"].tolist()
    assert difference(torch.from_numpy(pixels.finish(tensor, plan)), PIXELS[f"saved.{number}"]) <= 1
    for name, page in (("unit32", pixels.plan_page(source, described["upscale"], short=short)),
                       ("fix64", pixels.plan_page(source, fixed=64))):
        if f"{name}.{number}" in PIXELS.outputs:
            ours = np.rint((pixels.prepare(image, page)[0].permute(1, 2, 0).numpy() + 1) * 127.5)
            assert difference(torch.from_numpy(ours), PIXELS[f"{name}.{number}"]) <= 1
