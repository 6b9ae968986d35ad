"""The degrader as a user meets it: any recipe, any size, any batch."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from degrade import ConfigError, SecondOrderDegrader, load_recipe, presets
from degrade.degrader import InputRefused
from degrade.watch import ValuesRefused


def pictures(count, height, width, channels=3, seed=0):
    """Smooth shapes, edges and fine texture, float32 in [0, 1]."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 32
    waves = [np.sin(random.uniform(0.2, 9) * x + random.uniform(0.2, 9) * y + random.uniform(0, 6))
             for _ in range(count * channels)]
    planes = np.stack(waves).reshape(count, channels, height, width) * 0.3 + 0.5
    planes[..., height // 3:, : width // 2] *= 0.4
    return torch.from_numpy(np.clip(planes + random.normal(0, 0.01, planes.shape), 0, 1).astype(np.float32))


def difference(a, b):
    return (a.float() - b.float()).abs() * (1 if a.dtype == torch.uint8 else 255)


RANGES = st.tuples(st.floats(0.2, 3), st.floats(0.2, 3)).map(sorted)
BLURS = st.fixed_dictionaries({
    "op": st.just("blur"), "probability": st.sampled_from([0.5, 1.0]), "sinc": st.floats(0, 1), "sigma": RANGES,
    "size": st.sampled_from([[3, 3], [7, 21], [41, 41]]),
    "kinds": st.dictionaries(st.sampled_from(["iso", "aniso", "generalized_iso", "plateau_aniso", "motion"]),
                             st.floats(0.1, 1), min_size=1)})
RESIZES = st.fixed_dictionaries({
    "op": st.just("resize"), "to": st.sampled_from(["current", "lq", "hq"]),
    "scale": st.fixed_dictionaries({"up": st.floats(0, 1), "down": st.floats(0.1, 1), "keep": st.floats(0, 1),
                                    "range": st.tuples(st.floats(0.05, 1), st.floats(1, 1.5)).map(list)}),
    "modes": st.dictionaries(st.sampled_from(["nearest", "area", "bilinear", "bicubic", "lanczos",
                                              "bicubic_antialias"]), st.floats(0.1, 1), min_size=1)})
OTHERS = st.sampled_from([
    {"op": "noise"}, {"op": "noise", "gaussian": 0, "grey": 1}, {"op": "jpeg"}, {"op": "webp"}, {"op": "camera"},
    {"op": "jpeg", "quality": [1, 100], "subsampling": {"4:4:4": 1, "4:4:0": 1, "4:2:2": 1, "4:2:0": 1}},
    {"op": "sharpen"}, {"op": "usm"}, {"op": "round"}, {"op": "noise", "probability": 0.5}])
STEPS = st.lists(st.one_of(BLURS, RESIZES, OTHERS), max_size=4)


@st.composite
def recipes(draw):
    """Any sequence of operators with a last resize, some of it in either order or one of two."""
    steps = draw(STEPS)
    if draw(st.booleans()):
        steps.append({"op": "order", "first": draw(STEPS), "second": draw(STEPS)})
    if draw(st.booleans()):
        steps.append({"op": "choice", "options": [{"steps": draw(STEPS)}, {"weight": 2, "steps": draw(STEPS)}]})
    output = draw(st.sampled_from(["lq", "hq"]))
    return load_recipe({"name": "any", "scale": draw(st.integers(1, 5)), "output": output,
                        "untouched": draw(st.sampled_from([0, 0.3])),
                        "steps": [*steps, {"op": "resize", "to": output}, {"op": "jpeg"}]})


@settings(max_examples=60, deadline=None)
@given(recipe=recipes(), height=st.integers(16, 70), width=st.integers(16, 70), channels=st.sampled_from([1, 3]),
       seed=st.integers(0, 9))
def test_any_recipe_gives_finite_images_of_the_right_size_that_repeat_whatever_the_batch(
        recipe, height, width, channels, seed):
    hq = pictures(3, height, width, channels, seed)
    degrader = SecondOrderDegrader(recipe, seed)
    lq, parameters = degrader(hq, ["a", "b", "c"], epoch=2)
    size = (height, width) if recipe.output == "hq" else (height // recipe.scale, width // recipe.scale)
    assert lq.shape == (3, channels, *size)
    assert lq.dtype == torch.float32 and lq.isfinite().all() and lq.min() >= 0 and lq.max() <= 1
    stored = json.loads(json.dumps(parameters))
    assert torch.equal(degrader.apply(hq, stored), lq)
    reversed_batch, _ = degrader(hq.flip(0), ["c", "b", "a"], epoch=2)
    assert torch.equal(reversed_batch.flip(0), lq)
    alone, _ = degrader(hq[1:2], ["b"], epoch=2)
    assert torch.equal(alone[0], lq[1])


@settings(max_examples=40, deadline=None)
@given(recipe=recipes(), height=st.integers(16, 70), width=st.integers(16, 70), channels=st.sampled_from([1, 3]))
def test_the_torch_route_gives_the_image_of_the_cpu_route(recipe, height, width, channels):
    hq = pictures(4, height, width, channels)
    keys = ["a", "b", "c", "d"]
    lq, parameters = SecondOrderDegrader(recipe)(hq, keys)
    other = SecondOrderDegrader(recipe, route="torch").apply(hq, parameters)
    assert other.shape == lq.shape
    # One coefficient of a lossy format that rounds the other way moves a whole block, and small images have few.
    assert difference(lq, other).flatten(1).mean(1).median() < 0.25
    assert difference(lq, other).mean() < 1.5


@pytest.mark.parametrize("name", presets())
def test_every_preset_gives_the_same_image_on_both_routes_to_a_fraction_of_a_grey_level(name):
    hq = pictures(4, 117, 130)
    recipe = load_recipe(name)
    lq, parameters = SecondOrderDegrader(recipe, seed=5)(hq, list("abcd"))
    other = SecondOrderDegrader(recipe, route="torch").apply(hq, parameters)
    assert difference(lq, other).mean() < 0.1
    assert difference(lq, other).max() <= 40


@pytest.mark.parametrize("name", presets())
def test_a_preset_survives_its_own_yaml(name, tmp_path):
    recipe = load_recipe(name)
    path = tmp_path / "mine.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe


REDUCE = {"op": "resize", "to": "lq"}
MAYBE = REDUCE | {"probability": 0.5}
BACK = {"op": "resize", "to": "hq"}


@pytest.mark.parametrize(("steps", "possible"), [
    ([REDUCE], True), ([MAYBE], False), ([REDUCE, MAYBE], True), ([REDUCE, BACK], False),
    ([{"op": "order", "first": [REDUCE], "second": [BACK]}], False),
    ([{"op": "order", "first": [BACK], "second": [{"op": "jpeg"}]}, REDUCE], True),
    ([{"op": "choice", "options": [{"steps": [REDUCE]}, {"steps": []}]}], False),
    ([REDUCE, {"op": "resize", "scale": {"down": 1, "range": [0.5, 1]}}], False),
    ([{"op": "choice", "options": [{"steps": []}, {"steps": [{"op": "jpeg"}]}]}] * 40 + [REDUCE], True)])
def test_a_recipe_must_end_at_its_size_whichever_way_a_sample_goes(steps, possible):
    values = {"name": "any", "scale": 4, "steps": steps}
    if possible:
        load_recipe(values)
    else:
        with pytest.raises(ConfigError, match='must have the size "lq" for every sample'):
            load_recipe(values)


def test_bytes_in_bytes_out_and_the_same_image_as_from_floats():
    hq = (pictures(4, 64, 80) * 255).round().byte()
    degrader = SecondOrderDegrader("realesrgan_x4")
    whole, parameters = degrader(hq, list("abcd"))
    floats = degrader.apply(hq.float() / 255, parameters)
    assert whole.dtype == torch.uint8
    assert difference(whole, (floats * 255).round().byte()).mean() < 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("route", ["cpu", "torch"])
def test_other_floats_come_back_as_they_came(dtype, route):
    hq = pictures(1, 32, 32).to(dtype)
    lq, _ = SecondOrderDegrader("realesrgan_x4", route=route)(hq, ["a"])
    assert lq.dtype == dtype


@pytest.mark.parametrize("shape", [(64, 48), (64, 48, 3)])
def test_one_array_gives_what_a_batch_of_one_gives(shape):
    array = (np.random.default_rng(0).random(shape) * 255).astype(np.uint8)
    degrader = SecondOrderDegrader("supir")
    lq, parameters = degrader.image(array, "a")
    planes = torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))
    batch, same = degrader(planes[None], ["a"])
    assert lq.shape == shape and lq.dtype == np.uint8 and same == [parameters]
    assert np.array_equal(np.moveaxis(batch[0].numpy(), 0, -1).squeeze(), lq)


def test_another_seed_key_or_epoch_degrades_otherwise_and_the_same_one_alike_in_another_process():
    hq = pictures(1, 48, 48)
    base, parameters = SecondOrderDegrader("realesrgan_x4", seed=1)(hq, ["a"], epoch=1)
    for seed, key, epoch in ((2, "a", 1), (1, "b", 1), (1, "a", 2)):
        assert not torch.equal(SecondOrderDegrader("realesrgan_x4", seed=seed)(hq, [key], epoch)[0], base)
    program = ("import json; from degrade import SecondOrderDegrader; "
               "print(json.dumps(SecondOrderDegrader('realesrgan_x4', seed=1).draw('a', (48, 48), 1)))")
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == parameters[0]


def test_noise_differs_between_samples_and_grey_noise_is_the_samples_own():
    recipe = load_recipe({"name": "grey", "scale": 1, "output": "hq",
                          "steps": [{"op": "noise", "gaussian": 1, "sigma": [20, 20], "grey": 1}]})
    hq = torch.full((2, 3, 64, 64), 0.5)
    noise = SecondOrderDegrader(recipe)(hq, ["a", "b"])[0] - hq
    assert torch.equal(noise[:, 0], noise[:, 2])
    assert abs(np.corrcoef(noise[0, 0].ravel(), noise[1, 0].ravel())[0, 1]) < 0.05
    assert noise.std() * 255 == pytest.approx(20, rel=0.03)


def test_a_degrader_travels_to_a_worker():
    degrader = SecondOrderDegrader("supir", seed=3)
    assert pickle.loads(pickle.dumps(degrader)).draw("a", (64, 64)) == degrader.draw("a", (64, 64))


def test_untouched_samples_are_only_resized():
    recipe = load_recipe(load_recipe("realesrgan_x4").model_dump(mode="json", exclude_none=True) | {"untouched": 1.0})
    steps = SecondOrderDegrader(recipe).draw("a", (64, 64))["steps"]
    assert [step["op"] for step in steps if step] == ["resize"]
    recipe = load_recipe(load_recipe("stablesr").model_dump(mode="json", exclude_none=True) | {"untouched": 1.0})
    hq = pictures(1, 32, 32)
    assert difference(SecondOrderDegrader(recipe)(hq, ["a"])[0], hq).max() < 1e-3


class TestBadInput:
    degrader = SecondOrderDegrader("realesrgan_x4")

    @pytest.mark.parametrize(("images", "words"), [
        (torch.rand(3, 64, 64), "not \\(3, 64, 64\\)"),
        (torch.rand(1, 4, 64, 64), "not \\(1, 4, 64, 64\\)"),
        (torch.rand(0, 3, 64, 64), "not \\(0, 3, 64, 64\\)"),
        (torch.rand(1, 3, 15, 64), "15 x 64 pixels are too small; 16"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int32), "not torch.int32"),
        (np.zeros((64, 64, 3), np.uint8), "degrader.image"),
    ])
    def test_a_wrong_shape_or_type_is_named(self, images, words):
        with pytest.raises(InputRefused, match=words):
            self.degrader(images, ["a"])

    @pytest.mark.parametrize(("value", "words"), [(float("nan"), "nan"), (1.5, "1.5"), (-0.1, "-0.1"), (200, "200")])
    @pytest.mark.parametrize("route", ["cpu", "torch"])
    def test_values_outside_the_range_name_the_key(self, value, words, route):
        hq = pictures(2, 32, 32)
        hq[1, 2, 7, 9] = value
        with pytest.raises(ValuesRefused, match=f"shard7/bad: .*{words}.*divide by 255"):
            SecondOrderDegrader("realesrgan_x4", route=route)(hq, ["good", "shard7/bad"])

    def test_keys_must_match_the_batch(self):
        with pytest.raises(InputRefused, match="2 images came with 1 keys"):
            self.degrader(pictures(2, 32, 32), ["a"])
        with pytest.raises(InputRefused, match="one key per image"):
            self.degrader(pictures(2, 32, 32), "ab")

    def test_parameters_of_another_size_or_recipe_are_refused(self):
        hq = pictures(1, 32, 32)
        with pytest.raises(InputRefused, match="a: the parameters were drawn for 48 x 48"):
            self.degrader.apply(hq, [self.degrader.draw("a", (48, 48))])
        mixed = [self.degrader.draw("a", (32, 32)), SecondOrderDegrader("diffbir_face").draw("b", (32, 32))]
        with pytest.raises(InputRefused, match="different recipes"):
            SecondOrderDegrader("supir", route="torch").apply(pictures(2, 32, 32), mixed)

    def test_unknown_switches_are_refused(self):
        with pytest.raises(ValueError, match="'Basicsr'"):
            SecondOrderDegrader("supir", compat="Basicsr")
        with pytest.raises(ValueError, match="'gpu'"):
            SecondOrderDegrader("supir", route="gpu")

    @pytest.mark.parametrize(("step", "words"), [
        ({"op": "webp"}, "no operator 'webp'"), ({"op": "blur", "kinds": {"motion": 1}}, "no motion blur"),
        ({"op": "resize", "to": "hq", "modes": {"lanczos": 1}}, "not by 'lanczos'")])
    def test_compat_refuses_what_the_reference_lacks_before_any_image(self, step, words):
        recipe = load_recipe({"name": "any", "scale": 1, "output": "hq",
                              "steps": [{"op": "choice", "options": [{"steps": []}, {"steps": [step]}]}]})
        with pytest.raises(ValueError, match=words):
            SecondOrderDegrader(recipe, compat="basicsr")

    def test_compat_takes_colour_only(self):
        with pytest.raises(InputRefused, match="RGB only"):
            SecondOrderDegrader("supir", compat="basicsr")(pictures(1, 32, 32, channels=1), ["a"])
