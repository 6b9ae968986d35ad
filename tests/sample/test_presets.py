"""Presets: figures with sources, changed by name."""

import json

import pytest
import torch

from degrade.strict import ConfigError
from sample.guidance import Churn
from sample.noise import KeyedNoise
from sample.presets import FIGURES, PRESETS, choose, guide, run

from .golden import difference


@pytest.mark.parametrize("name", PRESETS)
def test_every_figure_of_a_preset_has_a_source(name):
    assert sorted(PRESETS[name].source) == FIGURES and all(PRESETS[name].source.values())


def test_the_papers_figures_are_those_of_the_paper():
    paper = PRESETS["paper"]
    assert (paper.steps, paper.tau, paper.guidance.low, paper.guidance.high) == (100, 4.0, 7.5, 7.5)
    assert (paper.centre, paper.gate) == ("lq", 0.0)


def test_changes_keep_what_they_do_not_name_and_say_where_they_are_from():
    changed = choose("quality", {"steps": 30, "guidance": {"high": 2.0}}, "restore.yaml")
    assert (changed.steps, changed.guidance.high, changed.guidance.low) == (30, 2.0, PRESETS["quality"].guidance.low)
    assert changed.source["steps"] == changed.source["guidance"] == "restore.yaml"
    assert json.loads(changed.model_dump_json()) == changed.model_dump(mode="json")
    assert changed.source["control"] == PRESETS["quality"].source["control"] and changed.churn.amount == 5
    assert choose("quality") is PRESETS["quality"] and PRESETS["quality"].steps == 50


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("qualty", {}, "unknown preset 'qualty'; did you mean 'quality'"),
    ("quality", {"stepz": 3}, "did you mean 'steps'"),
    ("quality", {"guidance": {"hig": 3}}, "unknown key 'guidance.hig'; did you mean 'high'"),
    ("quality", {"steps": 0}, "greater than or equal to 1 .found 0"),
    ("quality", {"sampler": "euler"}, "churn is of the edm sampler; euler has none"),
    ("quality", {"tau": -1.0}, "tau: Input should be greater than 0"),
    ("quality", {"source": {"stepz": "me"}}, "source names stepz")])
def test_mistakes_are_answered_with_the_nearest_name(name, changes, message):
    with pytest.raises(ConfigError, match=f"restore.yaml: .*{message}"):
        choose(name, changes, "restore.yaml")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_samples_what_its_network_knows(name):
    z_stage1, z_lq, told = torch.full((2, 4, 4, 4), 0.5), torch.full((2, 4, 4, 4), -0.5), []

    def both(x, sigma, scale):
        return torch.zeros_like(x), torch.full_like(x, scale / PRESETS[name].guidance.at(sigma))

    preset, noise = PRESETS[name], KeyedNoise(3, ["a", "b"])
    out = run(preset, guide(preset, both), noise, z_stage1=z_stage1, z_lq=z_lq, on_step=told.append)
    assert len(told) == preset.steps
    # The last step takes what is denoised there: the network's answer, times the weight, hardly pulled any more.
    assert difference(out, torch.full_like(out, preset.control.low)) < 1e-2
    # Where everything was noise, the paper's pull decides alone.
    assert told[0].denoised.mean().item() == pytest.approx(-0.5 if name == "paper" else preset.control.high, rel=0.1)


def test_guiding_by_a_preset_undoes_its_churn_for_the_control_scale():
    preset = choose("quality", {"control": {"low": 1.0, "high": 0.0}, "churn": {"amount": 5}, "steps": 10})
    scales = []

    def both(x, sigma, scale):
        scales.append(scale)
        return x, x

    run(preset, guide(preset, both), KeyedNoise(0, ["a"]), z_stage1=torch.zeros(1, 4, 2, 2),
        z_lq=torch.zeros(1, 4, 2, 2))
    assert scales == pytest.approx([preset.control.at(sigma) for sigma in preset.sigmas().tolist()[:-1]])
    assert preset.churn == Churn(amount=5, noise=1.02)


def test_a_pull_reaches_every_sampler():
    for name in PRESETS:
        preset = choose(name, {"tau": 0.01, "gate": 0.0, "centre": "lq"})
        out = run(preset, guide(preset, lambda x, sigma, scale: (x * 0, x * 0)), KeyedNoise(0, ["a"]),
                  z_stage1=torch.zeros(1, 4, 2, 2), z_lq=torch.ones(1, 4, 2, 2))
        assert out.mean() > 0.9
