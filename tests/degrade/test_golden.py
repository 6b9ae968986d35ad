"""The arithmetic against stored outputs of basicsr 1.4.2, and the default route against what it approximates."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from degrade import compat
from degrade.blur import Blur
from degrade.canvas import Canvas
from degrade.jpeg import CV_SAMPLING, Jpeg
from degrade.kernels import TOLERANCE, factors, kernel

GOLDEN = Path(__file__).parent.parent / "golden" / "degrade"
# Float32 in [0, 1], over sums of up to 2601 products. On the machine of the golden files everything but JPEG is equal
# to the last bit; other processors sum in another order.
CLOSE = 1e-5
USM = {"weight": 0.5, "radius": 50, "threshold": 10}


def golden(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / f"{name}.npz"))


def description(meta: dict) -> dict:
    """A kernel of the golden file in this package's words."""
    names = {"kind": "kind", "size": "size", "sig_x": "sigma_x", "sig_y": "sigma_y", "theta": "theta", "beta": "beta",
             "cutoff": "cutoff"}
    return {names[name]: value for name, value in meta.items() if name in names}


KERNELS = {meta["id"]: description(meta) for meta in json.loads(str(golden("kernels")["meta"]))}


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    """(1, 3, 72, 88) float32 in [0, 1]."""
    return torch.from_numpy(golden("image")["image_u8_hwc_rgb"]).permute(2, 0, 1)[None].float() / 255


def difference(ours: torch.Tensor, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return (ours - torch.from_numpy(theirs)).abs().max().item()


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_those_of_basicsr(name):
    ours, theirs = kernel(KERNELS[name]), golden("kernels")[name]
    ours = np.pad(ours, (len(theirs) - len(ours)) // 2)            # two of theirs are padded to 21
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("name", KERNELS)
def test_separable_sums_stay_within_their_tolerance_of_the_kernel(name):
    whole = kernel(KERNELS[name])
    columns, rows = factors(KERNELS[name])
    sum_of_products = columns.T.astype(float) @ rows
    margin = (len(whole) - len(sum_of_products)) // 2              # light tails are cut
    assert np.abs(np.pad(sum_of_products, margin) - whole).sum() <= TOLERANCE
    assert sum_of_products.sum() == pytest.approx(1, abs=1e-5)


def test_compat_blurs_as_basicsr_does(picture):
    for name, theirs in golden("filter2d").items():
        assert difference(compat.blur(picture, {"kernel": KERNELS[name]}), theirs[None]) < CLOSE, name


def test_the_default_blur_is_within_half_a_grey_level_of_basicsr(picture):
    image = np.ascontiguousarray(picture[0].permute(1, 2, 0).numpy() * np.float32(255))
    for name, theirs in golden("filter2d").items():
        ours = Blur.cpu(image, {"kernel": KERNELS[name]})
        assert np.abs(ours - theirs.transpose(1, 2, 0) * 255).max() < 0.5, name


@pytest.mark.parametrize(("name", "change"), [("out_default", {}), ("out_w1_t5", {"weight": 1.0, "threshold": 5})])
def test_compat_sharpens_as_basicsr_does(picture, name, change):
    assert difference(compat.usm(picture, USM | change), golden("usm")[name]) < CLOSE


@pytest.mark.parametrize("name", golden("resize"))
def test_compat_resizes_as_basicsr_does(picture, name):
    theirs = golden("resize")[name]
    by, mode = name.split("_")
    step = {"mode": mode, "height": theirs.shape[2], "width": theirs.shape[3]}
    if by.startswith("factor"):
        step["factor"] = float(by.removeprefix("factor"))
    assert difference(compat.resize(picture, step), theirs) < CLOSE


@pytest.mark.parametrize("name", golden("diffjpeg"))
def test_compat_compresses_as_basicsr_does(picture, name):
    quality, size = name[1:].split("_")
    height, width = map(int, size.split("x"))
    ours = compat.jpeg(picture[:, :, :height, :width], {"quality": float(quality)})
    assert difference(ours, golden("diffjpeg")[name]) < CLOSE


@pytest.mark.parametrize("quality", [100, 0.5])
def test_compat_refuses_qualities_at_which_basicsr_fails(picture, quality):
    with pytest.raises(compat.NotInReference, match=f"qualities from 1 to below 100.*{quality}"):
        compat.jpeg(picture, {"quality": quality})


def test_the_chain_without_noise_is_that_of_basicsr_at_every_step(picture):
    chain = golden("chain_nonoise")
    first, second, last = ({"op": "blur", "kernel": KERNELS[str(chain[name])]} for name in ("k1", "k2", "ksinc"))
    steps = {
        "usm": {"op": "usm", **USM},
        "blur1": first,
        "resize1": {"op": "resize", "mode": "bicubic", "factor": 0.6, "height": 43, "width": 52},
        "jpeg1": {"op": "jpeg", "quality": 60.0},
        "blur2": second,
        "resize2": {"op": "resize", "mode": "area", "height": 14, "width": 17},
        "jpeg2": {"op": "jpeg", "quality": 80.0},
        "resize3": {"op": "resize", "mode": "bilinear", "height": 18, "width": 22},
        "sinc": last,
        "lq": {"op": "round"}}
    for number, name in enumerate(steps, 1):
        # JPEG rounds, so it could turn 1e-7 before it into a whole step; with this picture no coefficient lies on an
        # edge. Likewise the last rounding: a level more or less would be 0.004.
        ours = compat.apply(picture, list(steps.values())[:number], "picture")
        assert difference(ours, chain[name].clip(0, 1)) < CLOSE, name


@pytest.mark.parametrize("layout", ["4:4:4", "4:4:0", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("size", [(72, 88), (61, 83)])
def test_jpeg_in_torch_is_that_of_libjpeg(picture, layout, size):
    height, width = size
    crop = picture[:, :, :height, :width] * 255
    image = crop[0].permute(1, 2, 0).numpy().round().astype(np.uint8)
    for quality in (30, 37, 50, 64, 75, 85, 95):
        options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, CV_SAMPLING[layout]]
        theirs = cv2.imdecode(cv2.imencode(".jpg", image[..., ::-1], options)[1], cv2.IMREAD_COLOR)[..., ::-1]
        ours = Jpeg.batch(Canvas(crop, (height,), (width,)), [{"quality": quality, "subsampling": layout}]).pixels
        error = np.mean((ours[0].permute(1, 2, 0).numpy() - theirs) ** 2)
        assert 10 * np.log10(255 ** 2 / (error + 1e-12)) >= 50, quality
