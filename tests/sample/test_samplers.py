"""Samplers on denoisers that are known exactly: Gaussian data, constant images, recorders."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sample import sigmas
from sample.guidance import SIGMA_MAX, Churn, Control, Guidance, Restore, guided
from sample.noise import KeyedNoise
from sample.samplers import Cancelled, dpmpp_2m_sde, edm, euler, start

from .golden import difference

SHAPE = (3, 4, 6, 5)
KEYS = ("a.png", "b.png", "c.png")


def gaussian(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """The best denoiser of data that are standard normals."""
    return x / (1 + sigma ** 2)


def nonlinear(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Depends on all of its own image."""
    return torch.tanh(x + x.mean((1, 2, 3), keepdim=True)) / (1 + 0.1 * sigma)


CENTRE, START = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(5))
SAMPLERS = {
    "edm": lambda denoise, x, noise, centre, **more: edm(
        denoise, x, sigmas.released(6), churn=Churn(amount=3, noise=1.01), restore=Restore(centre, 2.0), noise=noise,
        **more),
    "sde": lambda denoise, x, noise, centre, **more: dpmpp_2m_sde(
        denoise, x, sigmas.karras(6), restore=Restore(centre, 2.0), noise=noise, **more),
    "euler": lambda denoise, x, noise, centre, **more: euler(
        denoise, x, sigmas.trailing(6), restore=Restore(centre, 2.0), **more)}


def sampled(name: str, images: list[int], seed: int = 0, **more) -> torch.Tensor:
    noise = KeyedNoise(seed, [KEYS[image] for image in images])
    x = start(noise.start(CENTRE[images]), sigmas.released(6))
    return SAMPLERS[name](nonlinear, x, noise, CENTRE[images], **more)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_batch_is_its_images_one_by_one_in_any_order(name):
    together = sampled(name, [2, 0, 1])
    for place, image in enumerate([2, 0, 1]):
        assert difference(together[place:place + 1], sampled(name, [image])) < 1e-5
    assert difference(together[:1], together[1:2]) > 0.1


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_seed_gives_one_result_and_another_seed_another(name):
    assert difference(sampled(name, [0, 1]), sampled(name, [0, 1])) == 0
    assert difference(sampled(name, [0, 1]), sampled(name, [0, 1], seed=1)) > 1e-3


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_is_told_and_can_cancel(name):
    told = []
    out = sampled(name, [0, 1], on_step=told.append)
    assert [(one.step, one.total) for one in told] == [(step, 6) for step in range(1, 7)]
    assert told[0].sigma == pytest.approx(14.6146, abs=1e-4) and told[-1].denoised.shape == out.shape
    assert difference(told[-1].x, out) == 0

    def stop(progress):
        told.append(progress)
        if progress.step == 2:
            raise Cancelled

    told.clear()
    with pytest.raises(Cancelled):
        sampled(name, [0, 1], on_step=stop)
    assert len(told) == 2


@pytest.mark.parametrize("name", SAMPLERS)
def test_everything_is_float32_around_a_network_in_bfloat16(name):
    seen = []

    def half(x, sigma):
        seen.append(x.dtype)
        return nonlinear(x, sigma).bfloat16()

    x = start(START.bfloat16(), sigmas.released(6))
    out = SAMPLERS[name](half, x, KeyedNoise(0, KEYS), CENTRE)
    assert out.dtype == torch.float32 and set(seen) == {torch.float32}


def test_sde_at_eta_zero_is_finite_needs_no_noise_and_beats_euler():
    levels, truth = sigmas.karras(20), START
    # The probability flow of Gaussian data only scales: x(sigma) is proportional to sqrt(1 + sigma**2).
    x = truth * math.sqrt(1 + levels[0].item() ** 2)
    out = dpmpp_2m_sde(gaussian, x, levels, eta=0)
    assert out.isfinite().all()
    assert difference(out, truth) < 0.4 * difference(edm(gaussian, x, levels), truth)


@given(st.floats(0, 1.5), st.integers(1, 12))
def test_sde_is_finite_at_any_eta_and_length(eta, steps):
    out = dpmpp_2m_sde(gaussian, torch.ones(3, 1, 2, 2) * 15, sigmas.karras(steps), eta=eta, noise=KeyedNoise(0, KEYS))
    assert out.isfinite().all() and out.abs().max() < 20


def test_after_a_step_of_the_sde_the_noise_is_that_of_its_sigma_unless_as_released():
    levels, noise = sigmas.karras(8), KeyedNoise(0, ["one"])
    first = []

    def spread(**more):
        first.clear()
        x = start(noise.start(torch.empty(1, 4, 128, 128)), levels)
        dpmpp_2m_sde(lambda x, sigma: torch.zeros_like(x), x, levels, noise=noise, on_step=first.append, **more)
        return first[0].x.std().item()

    assert spread() == pytest.approx(levels[1].item(), rel=0.02)
    assert spread(released=True) < 0.8 * levels[1].item()


def test_sde_obeys_the_pull_and_the_control_scale():
    scales = []

    def both(x, sigma, scale):
        scales.append(scale)
        return gaussian(x, sigma), gaussian(x, sigma) + 0.1

    control = Control(low=1.0, high=0.2)
    denoise = guided(both, Guidance(low=4, high=1), control)
    levels, x, noise = sigmas.karras(8), START * 14.6, KeyedNoise(0, KEYS)
    free = dpmpp_2m_sde(denoise, x, levels, noise=noise)
    assert scales == [control.at(sigma) for sigma in levels.tolist()[:-1]] and scales[0] < 0.21 < 0.9 < scales[-1]
    pulled = dpmpp_2m_sde(denoise, x, levels, noise=noise, restore=Restore(CENTRE, 0.2))
    assert (pulled - CENTRE).abs().mean() < 0.7 * (free - CENTRE).abs().mean()


def test_a_weaker_pull_has_a_larger_tau():
    distances = [(edm(gaussian, START * 14.6, sigmas.released(20), restore=Restore(CENTRE, tau))
                  - CENTRE).abs().mean() for tau in (0.5, 4.0, 6.0)]
    assert distances == sorted(distances) and distances[0] < 0.8 * distances[2]


def test_the_printed_algorithm_pulls_in_the_last_step_and_the_released_one_does_not():
    denoised = torch.zeros(SHAPE)
    assert difference(Restore(CENTRE, 4.0)(denoised, 0.1, 0.0), denoised) == 0
    printed = Restore(CENTRE, 4.0, gate=0.0)
    assert difference(printed(denoised, 0.1, 0.0), CENTRE * (0.1 / SIGMA_MAX) ** 4) < 1e-12
    assert printed(denoised, 0.1, 0.0).abs().max() > 0
    assert difference(printed(denoised, SIGMA_MAX, 10.0), CENTRE) == 0


@given(st.floats(0.03, 14.6), st.floats(0, 100), st.integers(1, 200))
def test_the_sigma_before_churn_is_found_again(sigma, amount, steps):
    churn = Churn(amount=amount)
    assert churn.before(sigma * (1 + churn.gamma(sigma, steps)), steps) == pytest.approx(sigma)


def test_churn_stays_between_its_bounds():
    seen = []

    def recorder(x, sigma):
        seen.append(sigma)
        return gaussian(x, sigma)

    churn, levels = Churn(amount=5, t_min=0.5, t_max=5), sigmas.released(20)
    edm(recorder, START, levels, churn=churn, noise=KeyedNoise(0, KEYS))
    raised = {level: got / level for level, got in zip(levels.tolist(), seen, strict=False)}
    assert all(factor == pytest.approx(1.25 if 0.5 <= level <= 5 else 1) for level, factor in raised.items())


def test_with_churn_the_weight_goes_by_the_raised_sigma_and_the_control_by_that_of_the_schedule():
    churn, scales, guidance, control = Churn(amount=5), [], Guidance(low=4, high=1), Control(low=1, high=0.3)

    def both(x, sigma, scale):
        scales.append(scale)
        return torch.zeros_like(x), torch.ones_like(x)

    denoise = guided(both, guidance, control, lambda raised: churn.before(raised, 10))
    told, levels = [], sigmas.released(10)
    edm(denoise, START, levels, churn=churn, noise=KeyedNoise(0, KEYS), on_step=told.append)
    for step, sigma in zip(told, levels.tolist(), strict=False):
        assert scales[step.step - 1] == pytest.approx(control.at(sigma))
        assert step.denoised.mean().item() == pytest.approx(guidance.at(min(1.5, math.sqrt(2)) * sigma), rel=1e-5)


def test_a_weight_of_one_asks_for_the_positive_prompt_only():
    def both(x, sigma, scale):
        raise AssertionError("evaluated the negative prompt")

    alone = guided(both, Guidance(low=1, high=1), Control(low=1, high=1), alone=lambda x, sigma, scale: x + scale)
    assert difference(alone(CENTRE, 3.0), CENTRE + 1) == 0
    with pytest.raises(AssertionError, match="negative"):
        guided(both, Guidance(low=2, high=1), Control(low=1, high=1), alone=lambda *_: CENTRE)(CENTRE, 3.0)


def test_few_steps_towards_one_image_arrive_at_it():
    assert difference(euler(lambda x, sigma: CENTRE, START * 14.6, sigmas.trailing(4)), CENTRE) < 1e-6


def test_noise_that_is_missing_or_for_other_images_is_asked_for():
    x, levels = START, sigmas.karras(4)
    with pytest.raises(ValueError, match="give noise=KeyedNoise"):
        dpmpp_2m_sde(gaussian, x, levels)
    with pytest.raises(ValueError, match="give noise=KeyedNoise"):
        edm(gaussian, x, levels, churn=Churn(amount=1))
    with pytest.raises(ValueError, match="noise for 2 images was asked for a batch of 3"):
        dpmpp_2m_sde(gaussian, x, levels, noise=KeyedNoise(0, KEYS[:2]))


def test_keyed_noise_is_normal_and_independent_by_seed_image_step_and_purpose():
    like = torch.empty(2, 4, 64, 64)
    draws = [KeyedNoise(seed, keys)(step, like) for seed, keys, step in
             [(0, "ab", 0), (1, "ab", 0), (0, "cd", 0), (0, "ab", 1)]] + [KeyedNoise(0, "ab").start(like)]
    flat = torch.cat([draw.flatten(1) for draw in draws])
    assert (flat.mean(1).abs() < 0.04).all() and ((flat.std(1) - 1).abs() < 0.03).all()
    assert (torch.corrcoef(flat) - torch.eye(10)).abs().max() < 0.04           # 5 deviations of 16384 numbers
