"""The whole restoration against the released one at a tiny width, and `clearshard restore` with a tiny SUPIR."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from typer.testing import CliRunner

import models.supir
from caption.prompts import load_quality
from caption.tokens import LIMIT, Tokens
from clearshard import app
from degrade.strict import ConfigError
from models import published
from models.attention import constant_text
from models.robust import RobustEncoder
from models.supir import SupirAdaptor, SupirUNet, prior_config
from sample import colour
from sample.guidance import Churn, Control, Guidance
from sample.memory import Memory, Placed
from sample.noise import KeyedNoise
from sample.presets import Preset, choose
from sample.samplers import Cancelled
from sample.supir import SupirPipeline
from sample.text import ROOM, Conditioning, prompts
from tests.conftest import REPOSITORY, photograph
from tests.models.test_supir import Golden, prior

SMALL = ("--steps", 3, "--short", 64, "--scale", 2)


@pytest.fixture(scope="module")
def released():
    """The golden networks as a pipeline, with the golden file."""
    torch.set_num_threads(1)
    golden, unet = Golden("supir_end_to_end"), prior()
    adaptor = SupirAdaptor.from_unet(unet)
    golden.fill(adaptor, list(published.adaptor(adaptor)))
    golden.fill(unet, list(published.prefixed(published.unet(prior_config(unet)), "model.diffusion_model.")))
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 128, 128), layers_per_block=2, norm_num_groups=32, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=0.13025)
    robust = RobustEncoder.from_vae(vae)
    golden.fill(vae, list(published.prefixed(published.vae(vae.config), "first_stage_model.")))
    golden.fill(robust, [(one.replace(".encoder", ".denoise_encoder"), other, kind) for one, other, kind in
                         published.prefixed(published.vae_half(vae.config, "encoder"), "first_stage_model.")])
    golden.pipeline = SupirPipeline(SupirUNet(unet, adaptor), vae, robust, memory=Memory.at("fast", "cpu"))
    return golden


class Given:
    """The golden file's noise."""

    def __init__(self, golden):
        self.golden = golden

    def start(self, like):
        return self.golden.input("initial_noise")

    def __call__(self, step, x):
        return self.golden.input(f"churn_noise.{step}")


@pytest.fixture
def whole_vector(monkeypatch):
    """The golden file gives pooled text and embedded sizes as one vector."""
    def conditioning(time_proj, time_embedding, _, add_embedding, sample, timestep, text_embeds, time_ids):
        timestep = torch.as_tensor(timestep).expand(len(sample))
        return time_embedding(time_proj(timestep).to(sample.dtype)) + add_embedding(text_embeds)
    monkeypatch.setattr(models.supir, "conditioning", conditioning)


@pytest.mark.parametrize("level", ["fast", "low"])
def test_a_restoration_is_the_released_one(released, whole_vector, monkeypatch, level):
    pipeline, arguments = released.pipeline, released.side["args"]
    monkeypatch.setattr(pipeline, "memory", Memory.at(level, "cpu"))
    latents = pipeline.latents(released.input("image"), None, released.input("z_stage1_noise"))
    for name in ("z_lq", "x_stage1", "z_stage1"):
        released.check(name, getattr(latents, name))
    negative, positive = (Conditioning(released.input(f"context{half}"), released.input(f"vector{half}"),
                                       torch.zeros(1, 6)) for half in ("_uncond", ""))
    for churn in released.side["churns"]:
        preset = Preset(
            name="golden", steps=arguments["num_steps"], tau=arguments["restoration_scale"],
            guidance=Guidance(low=arguments["cfg_scale"], high=arguments["cfg_scale_start"]),
            control=Control(low=arguments["control_scale"], high=arguments["control_scale_start"]),
            churn=Churn(amount=churn, noise=arguments["s_noise"]))
        decoded = pipeline.decode(pipeline.sample(latents, negative, positive, preset, Given(released)))
        for method in ("none", "wavelet", "adain"):
            if f"out.churn{churn}.{method}" in released.want:
                released.check(f"out.churn{churn}.{method}", colour.match(decoded, latents.x_stage1, method))


def told(count, seed=3):
    torch.manual_seed(seed)
    return [Conditioning(torch.randn(count, 7, 40), torch.randn(count, 48), torch.rand(count, 6) * 1000)
            for _ in range(2)]


def sampled(pipeline, images, keys, conditions, tile=1 << 20, **changes):
    noise = KeyedNoise(7, keys)
    preset = choose("quality", {"steps": 3, "tau": 4.0} | changes)
    return pipeline.sample(pipeline.latents(images, noise), *conditions, preset, noise, tile)


def test_a_batch_is_its_images_one_by_one(released):
    images, conditions = torch.rand(3, 3, 64, 64) * 2 - 1, told(1)
    together = sampled(released.pipeline, images, "abc", conditions)
    alone = [sampled(released.pipeline, images[i:i + 1], key, conditions) for i, key in enumerate("abc")]
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)
    assert not torch.allclose(together[:1], sampled(released.pipeline, images[:1], "z", conditions), atol=1e-2)


def test_both_prompts_in_one_batch_or_one_after_the_other_is_the_same(released, monkeypatch):
    images, conditions = torch.rand(1, 3, 64, 64) * 2 - 1, told(1)
    together = sampled(released.pipeline, images, "a", conditions)
    monkeypatch.setattr(released.pipeline, "memory", Memory.at("low", "cpu"))
    assert torch.allclose(together, sampled(released.pipeline, images, "a", conditions), atol=1e-4)


def test_windows_of_a_large_image_leave_no_seam_that_the_network_does_not_make(released):
    ramp = torch.linspace(-0.8, 0.8, 256).expand(1, 3, 64, 256).contiguous()
    conditions = told(1)
    whole = sampled(released.pipeline, ramp, "a", conditions)
    tiled = sampled(released.pipeline, ramp, "a", conditions, tile=128)
    assert tiled.shape == whole.shape and torch.isfinite(tiled).all()
    steps = (tiled[..., 1:] - tiled[..., :-1]).abs().mean((0, 1, 2))
    borders = list(range(7, 31, 8))
    inside = torch.tensor([i for i in range(31) if i not in borders])
    assert steps[borders].mean() < 1.6 * steps[inside].mean()


def test_projections_of_a_constant_text_are_made_once_and_change_nothing(released):
    net, (condition, other) = released.pipeline.net, told(2)
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([500, 3]), torch.randn(2, 4, 8, 8))
    with torch.no_grad():
        plain = [net(*inputs, *one.parts()) for one in (condition, other)]
    calls = []
    layers = [module.to_k for name, module in net.named_modules() if name.endswith("attn2")]
    hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in layers]
    with constant_text(net) as count:
        kept = [net(*inputs, *condition.parts()) for _ in range(3)][-1]
        assert count == len(layers) == len(calls)
        again = net(*inputs, *other.parts())        # another text is projected anew
    for hook in hooks:
        hook.remove()
    assert torch.allclose(kept, plain[0], atol=1e-5) and torch.allclose(again, plain[1], atol=1e-5)
    assert len(calls) == 2 * len(layers)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_networks_give_the_same_latents(released):
    pipeline, images, conditions = released.pipeline, torch.rand(1, 3, 64, 64) * 2 - 1, told(1)
    compiled = SupirPipeline(pipeline.net, pipeline.vae, pipeline.robust, memory=Memory.at("fast", "cpu"), compile=True)
    plain = sampled(pipeline, images, "a", conditions)
    assert torch.allclose(sampled(compiled, images, "a", conditions), plain, atol=1e-4)


def test_the_caption_keeps_room_and_the_quality_words_are_not_pushed_out(tiny_models):
    tokens, quality = Tokens.load(tiny_models / "sdxl" / "tokenizer"), load_quality("supir_brief")
    long = "A cat sleeps on a red cup of coffee. " * 12
    positive, negative = prompts(long, quality, tokens)
    assert positive.startswith("A cat sleeps") and positive.endswith(quality.positive)
    assert tokens.count(positive) <= LIMIT and negative == quality.negative
    assert prompts("a cat.", quality, tokens, released=True)[0] == "a cat." + quality.positive
    wordy = prompts("A cat.", load_quality("supir"), tokens)[0]     # more words than a tokenizer of bytes has room for
    assert wordy.startswith("A") and tokens.count(wordy) <= LIMIT and ROOM < LIMIT


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "inner").mkdir()
    photograph(1, 60, 44).save(folder / "a.jpg", quality=92)
    photograph(2, 33, 80).convert("L").save(folder / "inner" / "b.png")
    (folder / "a.txt").write_text("A wave\nof colours.")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    return folder


def restore(*arguments, check=True):
    """`clearshard restore` in this process, which has loaded the libraries."""
    torch.set_num_threads(1)
    result = CliRunner().invoke(app, ["restore", *map(str, arguments)])
    assert not check or result.exit_code == 0, result.output
    return result


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def done(tmp_path_factory, pictures, tiny_models):
    out = tmp_path_factory.mktemp("restored")
    result = restore(pictures, "--model", tiny_models / "supir", "--out", out, "--caption", "file", *SMALL, check=False)
    return out, result


def test_files_and_folders_are_restored_and_one_bad_file_is_named(done):
    out, result = done
    assert result.exit_code == 1 and "broken.jpg: " in result.stderr and "Traceback" not in result.stderr
    assert pixels(out / "a.jpg.png").shape == (88, 120, 3) and pixels(out / "inner" / "b.png.png").shape == (160, 66, 3)
    assert (out / "a.jpg.stage1.jpg").is_file() and not list(out.glob("broken*"))
    made = json.loads((out / "a.jpg.json").read_text())
    assert made["asked"]["prompt"] == "A wave of colours." and made["made"]["prompt"].startswith("A wave of colours.")
    page = (out / "restored.html").read_text()
    assert page.count("<figure>") == 2 and "a.jpg" in page


def test_a_second_run_does_nothing_and_a_changed_setting_does(done, pictures, tiny_models):
    out, _ = done
    before = (out / "a.jpg.png").stat().st_mtime_ns
    again = restore(pictures / "a.jpg", "--model", tiny_models / "supir", "--out", out, "--caption", "file", *SMALL)
    assert "0 to restore" in again.stdout and (out / "a.jpg.png").stat().st_mtime_ns == before
    other = restore(pictures / "a.jpg", "--model", tiny_models / "supir", "--out", out, "--caption", "file", *SMALL,
                    "--seed", 4, "--dry-run")
    assert "1 to restore" in other.stdout


def test_a_result_is_repeated_from_its_picture_or_its_settings(done, pictures, tiny_models, tmp_path):
    out, _ = done
    for like in ("a.jpg.png", "a.jpg.json"):
        restore(pictures / "a.jpg", "--model", tiny_models / "supir", "--out", tmp_path / like, "--like", out / like)
        assert np.array_equal(pixels(tmp_path / like / "a.jpg.png"), pixels(out / "a.jpg.png"))


def test_a_captioner_describes_what_the_first_stage_shows(pictures, tiny_models, tmp_path):
    arguments = (pictures / "a.jpg", "--model", tiny_models / "supir", "--out", tmp_path, *SMALL, "--caption", "auto")
    refused = restore(*arguments, check=False)
    assert refused.exit_code == 2 and "--captioner" in refused.stderr
    restore(*arguments, "--captioner", tiny_models / "llava")
    caption = (tmp_path / "a.jpg.caption.txt").read_text().strip()
    assert caption and json.loads((tmp_path / "a.jpg.json").read_text())["asked"]["prompt"] == caption


@pytest.mark.slow
def test_a_killed_run_goes_on(pictures, tiny_models, tmp_path):
    many = tmp_path / "many"
    many.mkdir()
    for seed in range(8):
        photograph(seed, 48, 48).save(many / f"{seed:02d}.png")
    command = [sys.executable, str(REPOSITORY / "clearshard.py"), "restore", many, "--model", tiny_models / "supir",
               "--out", tmp_path / "out", "--steps", "20", "--short", "128", "--scale", "1"]
    process = subprocess.Popen([*map(str, command)], env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while len(list((tmp_path / "out").glob("*.png.png"))) < 2:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    there = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png.png")}
    assert len(there) < 8
    restore(*command[3:])
    assert len(list((tmp_path / "out").glob("*.png.png"))) == 8
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == when for name, when in there.items())


@pytest.mark.parametrize(("arguments", "words"), [
    (("--model", "/nowhere"), "no SUPIR folder"), (("--preset", "qualty"), "did you mean 'quality'"),
    (("--device", "cuda"), "sees no GPU"), (("--like", "/nowhere.json"), "holds no settings")])
def test_a_mistake_is_one_clear_error(pictures, tiny_models, tmp_path, arguments, words):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    options = {"--model": str(tiny_models / "supir"), "--out": str(tmp_path)} | dict([arguments])
    result = restore(pictures / "a.jpg", *(word for pair in options.items() for word in pair), *SMALL, check=False)
    assert result.exit_code == 2 and words in " ".join(result.stderr.split()) and "Traceback" not in result.stderr


def test_an_output_folder_that_cannot_be_written_is_a_clear_error(pictures, tiny_models, tmp_path):
    (tmp_path / "file").write_text("")
    result = restore(pictures / "a.jpg", "--model", tiny_models / "supir", "--out", tmp_path / "file", *SMALL,
                     check=False)
    assert result.exit_code == 1 and "cannot write" in result.stderr and "Traceback" not in result.stderr


def test_cancelling_ends_a_restoration_between_two_steps(tiny_models):
    pipeline, steps = SupirPipeline.from_pretrained(tiny_models / "supir", device="cpu"), []

    def stop(progress):
        steps.append(progress.step)
        if progress.step == 2:
            raise Cancelled
    with pytest.raises(Cancelled):
        pipeline(photograph(1, 40, 40), preset=choose("quality", {"steps": 9}), short=64, on_step=stop)
    assert steps == [1, 2]


def test_no_memory_names_the_level_that_needs_less():
    class Full(torch.nn.Linear):
        def to(self, *_):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    placed = Placed({"net": Full(1, 1)}, Memory.at("balanced", "cpu"))
    with pytest.raises(ConfigError, match="--memory low"), placed.on_device("net"):
        pass
    with pytest.raises(ConfigError, match="smaller --tile"), \
            Placed({"net": Full(1, 1)}, Memory.at("low", "cpu")).on_device("net"):
        pass
