"""One schedule for sampling and training, checked against diffusers' and against its own definitions."""

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from hypothesis import example, given
from hypothesis import strategies as st

from sample import sigmas

from .golden import difference

KINDS = ("epsilon", "v_prediction", "sample")
SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture
def pair():
    """A clean latent, noise, and a noise level per sample."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 4, 3, 3, generator=generator)
    return x0, noise, torch.tensor([0, 10, 500, 980, 999])


@given(st.floats(0, 30))
def test_a_sigma_is_snapped_to_the_nearest_level(sigma):
    found = abs(sigmas.levels()[sigmas.index_of(sigma)] - sigma)
    assert found == min(abs(level - sigma) for level in sigmas.levels())


@given(st.integers(1, 1000), st.sampled_from(["released", "karras", "trailing", "leading"]))
@example(1000, "leading")
@example(1000, "trailing")
def test_every_spacing_descends_to_zero_within_the_table(steps, spacing):
    levels = getattr(sigmas, spacing)(steps)
    assert levels.shape == (steps + 1,) and levels.dtype == torch.float32 and levels[-1] == 0
    assert (levels.diff() < 0).all()
    assert levels[0] <= sigmas.levels()[-1] + 1e-5 and levels[-2] >= sigmas.levels()[0] - 1e-6


@pytest.mark.parametrize("steps", [0, 1001, -3])
def test_a_schedule_without_steps_or_with_too_many_is_refused(steps):
    for spacing in (sigmas.released, sigmas.karras, sigmas.trailing, sigmas.leading):
        with pytest.raises(ValueError, match="1 to 1000 steps"):
            spacing(steps)


@pytest.mark.parametrize(("spacing", "steps"), [("trailing", 4), ("trailing", 8), ("trailing", 30), ("leading", 50)])
def test_spacings_are_those_of_diffusers(spacing, steps):
    theirs = EulerDiscreteScheduler(timestep_spacing=spacing, steps_offset=1, **SDXL)
    theirs.set_timesteps(steps)
    assert difference(getattr(sigmas, spacing)(steps), theirs.sigmas) < 1e-4


def test_noise_is_added_as_in_diffusers(pair):
    theirs = DDPMScheduler(**SDXL)
    assert difference(sigmas.add_noise(*pair), theirs.add_noise(*pair)) < 1e-5
    assert difference(sigmas.target(*pair, "v_prediction"), theirs.get_velocity(*pair)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_what_should_be_predicted_leads_back_to_latent_and_noise(pair, kind):
    x0, noise, index = pair
    x, perfect = sigmas.add_noise(*pair), sigmas.target(*pair, kind)
    # The last level has 0.07 of signal and the first 0.03 of noise, by which rounding is divided.
    assert difference(sigmas.clean(x, perfect, index, kind), x0) < 1e-4
    assert difference(sigmas.noise_in(x, perfect, index, kind), noise) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", [0, 500, 999])
def test_a_perfect_network_in_training_is_a_perfect_denoiser_in_sampling(pair, kind, index):
    x0, noise, _ = pair
    levels = torch.full((5,), index)

    def network(x, seen):
        assert seen == index
        assert difference(x, sigmas.add_noise(x0, noise, levels)) < 1e-4        # training's input, from sampling's
        return sigmas.target(x0, noise, levels, kind).bfloat16()

    sigma = sigmas.levels()[index]
    denoised = sigmas.denoiser(network, kind)(x0 + sigma * noise, sigma * 1.0004)       # snapped
    assert denoised.dtype == torch.float32
    assert difference(denoised, x0) < 2 ** -7 * max(1, sigma) * 4               # bfloat16's steps


def test_an_unknown_prediction_is_refused_by_name(pair):
    for ask in (lambda: sigmas.scalings(1.0, "eps"), lambda: sigmas.target(*pair, "eps"),
                lambda: sigmas.clean(*pair, "eps"), lambda: sigmas.noise_in(*pair, "eps")):
        with pytest.raises(ValueError, match="epsilon, v_prediction, sample, not 'eps'"):
            ask()
