"""What each task learns, what it leaves alone, and what it saves."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from degrade.strict import ConfigError
from models import supir_folder
from models.robust import RobustEncoder
from tests.train.runs import metrics, trained, trainer
from train.named import Named
from train.objective import signed
from train.tasks.text import Told


def losses(values: dict, name: str = "loss") -> list[float]:
    return [line[name] for line in metrics(values) if name in line]


TASKS = ["supir.autoencoder", "supir.prior", "supir.encoder"]


@pytest.fixture(scope="session")
def encoder(tmp_path_factory, prior) -> Path:
    """A robust encoder as the task of that name saves it."""
    from diffusers import AutoencoderKL
    folder = tmp_path_factory.mktemp("encoder") / "robust_encoder"
    RobustEncoder.from_vae(AutoencoderKL.from_pretrained(prior / "vae")).save_pretrained(folder)
    return folder.parent


def of(task: str, encoder: Path) -> dict:
    return {"encoder": str(encoder), "preview_steps": 2} if task == "supir.adaptor" else {}


@pytest.mark.parametrize("task", [*TASKS, "supir.adaptor"])
def test_every_task_learns_what_it_is_shown(configured, encoder, task):
    # 22 pictures, again and again: the loss over the same samples falls.
    values = configured(task, task=of(task, encoder), images=240, log_every=3, optimizer={"rate": 4e-3},
                        ema={"half_life": 40})
    run = trained(values)
    first, last = np.mean(losses(values)[:4]), np.mean(losses(values)[-4:])
    assert last < first * (0.97 if task in ("supir.adaptor", "supir.prior") else 0.9), (first, last)
    assert all(parameter.grad is None for name, parameter in run.objective.named_parameters()
               if name not in run.trained)


def test_what_is_frozen_stays_as_it_was(configured, encoder):
    run = trainer(configured("supir.adaptor", task=of("supir.adaptor", encoder)))
    before = {name: tensor.clone() for name, tensor in run.objective.state_dict().items() if name not in run.trained}
    run.fit()
    assert any(name.startswith("net.unet.") for name in before)
    assert all(name.startswith("net.adaptor.") for name in run.trained)
    after = run.objective.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# The encoder's loss.

def spread(run, count: int = 8) -> float:
    """How much the decoded images of different inputs differ, as a share of how much the true ones do."""
    batch = run.loader.at(range(count))
    with torch.no_grad(), run.means():
        decoded = run.objective.decoded(run.objective.read(signed(batch.lq)))
    return (decoded.std(0).mean() / signed(batch.hq).std(0).mean()).item()


@pytest.mark.slow
def test_the_printed_loss_collapses_and_the_default_does_not(configured, tmp_path):
    # As printed both sides of the difference come from the trained encoder: an encoder that says the same of every
    # image has a loss of zero, and descent finds it. With a target that stays, it does not pay.
    found = {}
    for target in ("printed", "pixels"):
        values = configured(task={"target": target, "latent": 0.0}, images=560, log_every=14, batch=4,
                            optimizer={"rate": 3e-3}, ema={"half_life": 40}) | {"out": str(tmp_path / target)}
        run = trained(values)
        found[target] = spread(run), losses(values)[-1] / losses(values)[0], losses(values, "mse")[-1]
    assert found["printed"][1] < 0.1 and found["printed"][0] < 0.3         # a loss of nearly nothing, for nothing
    assert found["pixels"][0] > 2 * found["printed"][0] and found["pixels"][2] < found["printed"][2]


def test_weights_of_zero_are_refused(configured):
    with pytest.raises(ConfigError, match="every weight is 0"):
        trainer(configured(task={"pixel": 0.0, "latent": 0.0}))


def test_previews_are_sampled_as_the_folder_will_recommend_and_a_typo_in_that_is_refused(configured, encoder):
    def asked(**keys):
        task = {"encoder": str(encoder), "preview_steps": 3, **keys}
        return trainer(configured("supir.adaptor", task=task)).config.task
    task = asked(described={"preset": {"name": "paper", "tau": 2.0}}, preset="fidelity")
    assert (task.previewed().centre, task.previewed().tau, task.previewed().steps) == ("lq", 2.0, 3)
    assert asked(preset="quality").previewed().control.high == 0.93
    with pytest.raises(ConfigError, match=r"task\.described: preset.*tua"):
        asked(described={"preset": {"name": "paper", "tua": 2.0}})
    with pytest.raises(ConfigError, match=r"task\.preset: .*did you mean 'quality'"):
        asked(preset="qualty")


# What the prior is told.

def test_negative_samples_are_told_the_negative_words_and_dropout_takes_its_share(configured, encoder):
    from caption.prompts import load_quality
    told = {"dropout": 0.25, "positive": 0.5}
    run = trainer(configured("supir.adaptor", task={**of("supir.adaptor", encoder), "told": told}))
    batch = run.loader.at(range(400))
    text, draws = run.objective.text, Named(0, batch.keys, range(400))
    said, quality = text.prompts(batch, draws), load_quality("supir")
    assert np.mean([prompt == "" for prompt in said]) == pytest.approx(0.25, abs=0.06)
    kept = [(group, caption, prompt) for group, caption, prompt in zip(batch.groups, batch.texts, said, strict=True)
            if prompt]
    assert {prompt for group, _, prompt in kept if group == "negative"} == {quality.negative}
    others = [(caption, prompt) for group, caption, prompt in kept if group != "negative"]
    assert all(prompt.startswith(caption[:5]) for caption, prompt in others)
    assert np.mean([prompt != caption for caption, prompt in others]) == pytest.approx(0.5, abs=0.1)


def test_embeddings_are_computed_once_for_each_caption_and_forgotten_in_order(configured, encoder):
    run = trainer(configured("supir.adaptor", task={**of("supir.adaptor", encoder), "told": {"cache": 2}}))
    text, calls = run.objective.text, []
    text.encoders[0].register_forward_hook(lambda module, inputs, output: calls.append(len(output[0])))
    one, _ = text(["a", "b", "a"])
    assert calls == [2] and torch.equal(one[0], one[2]) and not torch.equal(one[0], one[1])
    text(["b", "a"])
    assert calls == [2]
    text(["c"])                         # b was met before a, and goes
    text(["a"])
    assert calls == [2, 1]
    text(["b"])
    assert calls == [2, 1, 1] and len(text.known) == 2


def test_sizes_are_the_constant_of_restoration_or_each_samples_own(configured, encoder):
    from sample.text import SIZES
    batch = None
    for sizes in ("constant", "true"):
        run = trainer(configured("supir.adaptor", task={**of("supir.adaptor", encoder), "told": {"sizes": sizes}}))
        batch = run.loader.at(range(3))
        given = run.objective.prepare(batch, Named(0, batch.keys, batch.epochs))["sizes"]
        assert given.tolist() == ([list(map(float, SIZES))] * 3 if sizes == "constant" else batch.sizes.tolist())
    assert Told().sizes == "constant"


# Noise.

def test_the_noisy_latent_is_the_samplers_own_and_depends_on_the_sample_alone(configured, encoder):
    from sample import sigmas
    run = trainer(configured("supir.adaptor", task=of("supir.adaptor", encoder)))
    whole, alone = run.loader.at(range(4)), run.loader.at([2])
    inputs, one = (run.objective.prepare(batch, Named(0, batch.keys, batch.epochs)) for batch in (whole, alone))
    for name in ("noise", "level"):
        assert torch.equal(inputs[name][2], one[name][0])
    torch.testing.assert_close(inputs["noisy"][2], one["noisy"][0], rtol=0, atol=1e-5)
    sigma = sigmas.table()[inputs["level"]].view(-1, 1, 1, 1)
    # The network's input is x / sqrt(sigma² + 1) of the sampler's x = x0 + sigma noise.
    x0 = (inputs["noisy"] * (sigma ** 2 + 1).sqrt() - sigma * inputs["noise"])
    again = run.objective.prepare(whole, Named(0, whole.keys, whole.epochs), level=0)
    sigma = sigmas.table()[0]
    torch.testing.assert_close(x0, again["noisy"] * (sigma ** 2 + 1).sqrt() - sigma * again["noise"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("draw", ["uniform", "stratified"])
def test_levels_are_drawn_evenly(draw):
    from types import SimpleNamespace

    from train.tasks.diffusion import Noising, level_indices
    batch = SimpleNamespace(keys=[f"k{number}" for number in range(4000)], positions=range(4000))
    found = level_indices(Noising(draw=draw), batch, Named(3, batch.keys, [0] * 4000), None)
    counts = np.histogram(found, bins=10, range=(0, 1000))[0]
    assert found.min() >= 0 and found.max() <= 999 and counts.min() > 340 and counts.max() < 460
    if draw == "stratified":            # any 64 in a row are spread over all
        assert np.histogram(found[:64], bins=8, range=(0, 1000))[0].min() >= 6


def test_min_snr_weighs_less_what_is_nearly_clean(configured, encoder):
    run = trainer(configured("supir.adaptor", task={**of("supir.adaptor", encoder), "noising": {"min_snr": 5.0}}))
    batch = run.loader.at(range(2))
    for level, weight in ((999, 1.0), (10, None)):
        with torch.no_grad():
            found = run.losses(batch, level=level)
        ratio = (found["loss"] / found["error"]).tolist()
        assert ratio == pytest.approx([1.0] * 2) if weight else max(ratio) < 0.1


# What comes out.

def test_the_autoencoder_saves_a_prior_whose_latents_have_a_spread_of_one(configured):
    from diffusers import AutoencoderKL
    run = trained(configured("supir.autoencoder"))
    run.export()
    folder = Path(run.config.out) / "model"
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    batch = run.validator.batch()
    with torch.no_grad():
        latent = vae.encode(signed(batch.hq)).latent_dist.mean * vae.config.scaling_factor
    assert latent.std().item() == pytest.approx(1, abs=0.01)
    assert {"unet", "vae", "text_encoder", "tokenizer", "model_index.json"} <= {p.name for p in folder.iterdir()}
    said = json.loads((folder / "trained.json").read_text())
    assert said["task"] == "supir.autoencoder" and said["images"] == 32


def test_the_chain_of_tasks_ends_in_a_folder_that_restores(configured, tmp_path):
    from PIL import Image

    from sample.supir import SupirPipeline

    def stage(name: str, kind: str, **changes) -> Path:
        values = configured(kind, save_dtype="float16", **changes) | {"out": str(tmp_path / name)}
        trained(values).export()
        return tmp_path / name / "model"
    prior = stage("prior", "supir.prior")
    encoder = stage("encoder", "supir.encoder", task={"prior": str(prior)})
    supir = stage("adaptor", "supir.adaptor", task={"prior": str(prior), "encoder": str(encoder), "depth": "paper",
                                                    "preview_steps": 2})
    assert supir_folder.index_of(supir)["prior"] == prior
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    pipeline = SupirPipeline.from_pretrained(supir, device="cpu")
    made = pipeline(picture, "a harbour", preset="lightning", short=64)
    assert made.image.shape == (64, 64, 3) and made.image.std() > 0


def test_a_saved_adaptor_is_gone_on_from(configured, encoder, tmp_path):
    values = configured("supir.adaptor", task={**of("supir.adaptor", encoder), "depth": [1, 1, 1]}, ema=None)
    run = trained(values)
    run.export()
    start = {"start": str(Path(values["out"]) / "model")}
    more = configured("supir.adaptor", task={**of("supir.adaptor", encoder), **start})
    other = trainer(more | {"out": str(tmp_path / "more")})
    assert all(torch.equal(other.trained[name], parameter) for name, parameter in run.trained.items())
