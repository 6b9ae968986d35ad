"""The compat mode against the basicsr that is installed, step by step, for steps as they are drawn."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from degrade import SecondOrderDegrader, compat
from degrade.canvas import Canvas
from degrade.noise import fields
from tests.conftest import photograph

reference = pytest.importorskip("tests.reference", reason="needs basicsr 1.4.2: pip install 'clearshard[reference]'",
                                exc_type=ImportError)
CLOSE = 1e-5                                 # as in test_golden: float32 in [0, 1], sums in another order


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    """(1, 3, 90, 106) float32 in [0, 1]: no side is a multiple of 8."""
    image = np.array(photograph(3, 106, 90), np.float32) / 255
    return torch.from_numpy(image.transpose(2, 0, 1).copy())[None]


def drawn(op: str, count: int = 40) -> list[dict]:
    """Steps of one operator, as the recipe draws them."""
    degrader = SecondOrderDegrader("realesrgan_x4", seed=5, compat="basicsr")
    steps = [step | {"name": f"{key}/{slot}"} for key in range(count)
             for slot, step in enumerate(degrader.draw(str(key), (90, 106))["steps"]) if step and step["op"] == op]
    assert len(steps) >= count
    return steps


def of_basicsr(step: dict) -> np.ndarray:
    """A described kernel, made by basicsr and padded as its data set pads."""
    kernel, library = step["kernel"], reference.basicsr_degradations
    kind, size = kernel["kind"], kernel["size"]
    if kind == "sinc":
        return reference.circular_lowpass_kernel(kernel["cutoff"], size, pad_to=21)
    shape = (size, kernel["sigma_x"], kernel.get("sigma_y", kernel["sigma_x"]), kernel.get("theta", 0))
    make = {"generalized": library.bivariate_generalized_Gaussian, "plateau": library.bivariate_plateau}
    family = kind.split("_")[0]
    beta = (kernel["beta"],) if family in make else ()
    whole = make.get(family, library.bivariate_Gaussian)(*shape, *beta, isotropic=not kind.endswith("aniso"))
    return np.pad(whole, (21 - size) // 2)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


def test_importing_the_reference_leaves_the_error_state_of_numpy():
    assert np.geterr()["divide"] == np.geterr()["invalid"] == "warn"


def test_drawn_kernels_blur_alike(picture):
    for step in drawn("blur"):
        kernel = torch.from_numpy(of_basicsr(step).astype(np.float32))[None]
        assert difference(compat.blur(picture, step), reference.filter2D(picture, kernel)) < CLOSE, step


def test_drawn_resizes_are_alike(picture):
    for step in drawn("resize"):
        size = {"scale_factor": step["factor"]} if "factor" in step else {"size": (step["height"], step["width"])}
        theirs = F.interpolate(picture, mode=step["mode"], **size)
        assert difference(compat.resize(picture, step), theirs) < CLOSE, step
        assert theirs.shape[2:] == (step["height"], step["width"])       # what the draw had promised


def test_drawn_compressions_are_alike(picture):
    jpeg = reference.DiffJPEG(differentiable=False)
    for step in drawn("jpeg"):
        theirs = jpeg(picture, torch.tensor([step["quality"]]))
        # A coefficient on the edge of rounding may fall to either side; its block then differs by a whole step.
        far = (compat.jpeg(picture, step) - theirs).abs().amax(1) > CLOSE
        assert far.float().mean() < 0.01, step


def test_sharpening_is_alike(picture):
    assert difference(compat.usm(picture, drawn("usm")[0]), reference.USMSharp()(picture)) < CLOSE


def test_gaussian_noise_of_the_same_field_is_alike(picture, monkeypatch):
    canvas = Canvas(picture, (90,), (106,))
    for step in drawn("noise"):
        if step["family"] == "gaussian":
            field = fields(canvas, [step["field"]], [step["grey"]])
            monkeypatch.setattr(torch, "randn", lambda *shape, field=field, **_: field[:, :shape[1]].reshape(shape)
                                if len(shape) == 4 else field[0, 0])
            theirs = reference.basicsr_degradations.add_gaussian_noise_pt(
                picture, torch.tensor([step["sigma"]]), torch.tensor([float(step["grey"])]))
            assert difference(compat.noise(picture, step), theirs) < CLOSE, step


class Steady:
    """In place of a generator: the counts of Poisson are three quarters of what is expected, rounded down."""

    def __init__(self, *_: object) -> None:
        pass

    @staticmethod
    def poisson(rate: np.ndarray) -> np.ndarray:
        return np.floor(rate * np.float32(0.75))


def test_poisson_noise_of_the_same_counts_is_alike(picture, monkeypatch):
    monkeypatch.setattr(np.random, "Generator", Steady)
    monkeypatch.setattr(torch, "poisson", lambda rate: (rate * 0.75).floor())
    for step in drawn("noise"):
        if step["family"] == "poisson":
            theirs = reference.basicsr_degradations.add_poisson_noise_pt(
                picture, torch.tensor([step["scale"]]), gray_noise=torch.tensor([float(step["grey"])]))
            # Grey levels are sums in another order: one in thousands rounds to the next level.
            far = (compat.noise(picture, step) - theirs).abs() > CLOSE
            assert far.float().mean() < 1e-3, step


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize(("levels", "expected"), [([0.5], 182), ([0.25, 0.75], 128), (None, 11.2)])
def test_poisson_noise_grows_where_an_image_has_few_values(grey, levels, expected):
    """With one value in the image, white is one electron; with 256 it is 256 (facts.json of the goldens)."""
    values = torch.tensor(levels) if levels else torch.arange(256) / 255
    image = values.repeat(256 * 256 // len(values)).view(1, 1, 256, 256).expand(1, 3, -1, -1).contiguous()
    scale = 0.01                                            # so little that nothing is clipped but at black and white
    step = {"family": "poisson", "scale": scale, "grey": grey, "name": "any"}
    torch.manual_seed(0)
    theirs = reference.basicsr_degradations.add_poisson_noise_pt(image, scale, gray_noise=float(grey)) - image
    ours = compat.noise(image, step) - image
    inside = (image > 0.1) & (image < 0.9)
    ours, theirs = ours[inside] * 255 / scale, theirs[inside] * 255 / scale
    # 65536 or more values: the standard error of a deviation is 0.3 %, of a mean 0.4 % of the deviation.
    assert ours.std().item() == pytest.approx(expected, rel=0.02)
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.02)
    assert abs(ours.mean().item()) < 0.02 * expected


def test_the_reference_repeats_with_its_seed_and_gives_a_quarter_of_the_size():
    batch = torch.rand(2, 3, 128, 160, generator=torch.manual_seed(0))
    chain = reference.Reference()
    first, again, other = (chain(batch, usm=False, seed=seed) for seed in (3, 3, 4))
    assert first.shape == (2, 3, 32, 40)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal((first * 255).round() / 255, first)
