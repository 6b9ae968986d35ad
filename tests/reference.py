"""The reference: basicsr 1.4.2 as installed, and Real-ESRGAN's chain on top of it.

The one place that knows how to import basicsr on current libraries. Without it (the extra `reference`; it does not
build on Python 3.13) importing this module raises ImportError, which `pytest.importorskip` understands.

The chain is that of Real-ESRGAN's x4plus training options (Wang et al., ICCVW 2021), with batch-shared draws where the
reference shares them: scales, filters, the family of the noise, whether to blur again, the order at the end.
"""

from __future__ import annotations

import math
import random
import sys
import types

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import functional


def _import() -> tuple[types.ModuleType, types.ModuleType, types.ModuleType]:
    """basicsr's modules of interest, with what it asks of torchvision and without what it does to numpy."""
    missing = "torchvision.transforms.functional_tensor"          # gone since torchvision 0.17
    if missing not in sys.modules:
        shim = types.ModuleType(missing)
        shim.rgb_to_grayscale = functional.rgb_to_grayscale
        sys.modules[missing] = shim
    before = np.geterr()
    try:
        from basicsr.data import degradations
        from basicsr.utils import diffjpeg, img_process_util
    except ModuleNotFoundError as error:
        raise ImportError(f"the degradation reference needs basicsr 1.4.2: pip install clearshard[reference] ({error})"
                          ) from error
    finally:
        np.seterr(**before)                                       # basicsr silences divisions for the whole process
    return degradations, diffjpeg, img_process_util


basicsr_degradations, _diffjpeg, _images = _import()
filter2D, USMSharp = _images.filter2D, _images.USMSharp
# The middle of a sinc kernel is 0 / 0 at first; this is what basicsr silences numpy for.
circular_lowpass_kernel = np.errstate(divide="ignore", invalid="ignore")(basicsr_degradations.circular_lowpass_kernel)
random_mixed_kernels = basicsr_degradations.random_mixed_kernels
random_add_gaussian_noise_pt = basicsr_degradations.random_add_gaussian_noise_pt
random_add_poisson_noise_pt = basicsr_degradations.random_add_poisson_noise_pt

KINDS = {"iso": 0.45, "aniso": 0.25, "generalized_iso": 0.12, "generalized_aniso": 0.03,
         "plateau_iso": 0.12, "plateau_aniso": 0.03}
SIZES = tuple(range(7, 22, 2))
MODES = ("area", "bilinear", "bicubic")


class DiffJPEG(_diffjpeg.DiffJPEG):
    """basicsr's, contiguous on both ends: it returns channels-last, on which filter2D's `view` fails since torch 2.15.

    The qualities are copied, for basicsr overwrites them.
    """

    @torch.no_grad()
    def forward(self, x: torch.Tensor, quality: float | torch.Tensor) -> torch.Tensor:
        quality = quality.clone() if isinstance(quality, torch.Tensor) else quality
        return super().forward(x.contiguous(), quality).contiguous()


class Reference:
    """Real-ESRGAN x4plus: `Reference()(gt, seed=7)` is the low-quality batch of a batch.

    Args:
        scale: 4, or 2 for x2plus.
        device: where images and kernels are.
    """

    def __init__(self, scale: int = 4, device: str | torch.device = "cpu") -> None:
        self.scale = scale
        self.jpeg = DiffJPEG(differentiable=False).to(device)
        self.usm = USMSharp().to(device)

    @torch.no_grad()
    def __call__(self, gt: torch.Tensor, usm: bool = True, seed: int | None = None) -> torch.Tensor:
        """Degrades (B, 3, H, W) float32 in [0, 1] to (B, 3, H / scale, W / scale), whole grey levels by 255.

        Args:
            usm: sharpen first, as training does; leave it out for images that were sharpened before.
            seed: of the three global generators that the reference draws from; None leaves them as they are.
        """
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        first, second, last = (kernels.to(gt) for kernels in self.kernels(len(gt)))
        height, width = (side // self.scale for side in gt.shape[2:])

        image = filter2D(self.usm(gt) if usm else gt, first)
        image = F.interpolate(image, scale_factor=_scale((0.2, 0.7, 0.1), (0.15, 1.5)), mode=random.choice(MODES))
        image = self._compressed(_noisy(image, (1, 30), (0.05, 3)))

        if np.random.uniform() < 0.8:
            image = filter2D(image, second)
        factor = _scale((0.3, 0.4, 0.3), (0.3, 1.2)) / self.scale
        size = int(gt.shape[2] * factor), int(gt.shape[3] * factor)
        image = F.interpolate(image, size=size, mode=random.choice(MODES))
        image = _noisy(image, (1, 25), (0.05, 2.5))

        compress_last = np.random.uniform() < 0.5
        if not compress_last:
            image = self._compressed(image)
        image = filter2D(F.interpolate(image, size=(height, width), mode=random.choice(MODES)), last)
        if compress_last:
            image = self._compressed(image)
        return (image * 255).round().clamp(0, 255) / 255

    def _compressed(self, image: torch.Tensor) -> torch.Tensor:
        return self.jpeg(image.clamp(0, 1), image.new_zeros(len(image)).uniform_(30, 95))

    @staticmethod
    def kernels(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The kernels of both blurs and of the last sinc filter, (count, 21, 21) each, a draw per sample."""
        drawn = zip(*((_kernel((0.2, 3)), _kernel((0.2, 1.5)), _last_kernel()) for _ in range(count)), strict=True)
        return tuple(torch.from_numpy(np.stack(kernels).astype(np.float32)) for kernels in drawn)


def _kernel(sigma: tuple[float, float]) -> np.ndarray:
    size = random.choice(SIZES)
    if np.random.uniform() < 0.1:
        cutoff = np.random.uniform(math.pi / (3 if size < 13 else 5), math.pi)
        return circular_lowpass_kernel(cutoff, size, pad_to=SIZES[-1])
    kernel = random_mixed_kernels(list(KINDS), list(KINDS.values()), size, sigma, sigma, (-math.pi, math.pi),
                                  (0.5, 4), (1, 2), noise_range=None)
    return np.pad(kernel, (SIZES[-1] - size) // 2)


def _last_kernel() -> np.ndarray:
    if np.random.uniform() < 0.8:
        size = random.choice(SIZES)
        return circular_lowpass_kernel(np.random.uniform(math.pi / 3, math.pi), size, pad_to=SIZES[-1])
    delta = np.zeros((SIZES[-1], SIZES[-1]))
    delta[SIZES[-1] // 2, SIZES[-1] // 2] = 1
    return delta


def _scale(weights: tuple[float, float, float], ends: tuple[float, float]) -> float:
    """One scale for the whole batch; `weights` of going up, going down and staying."""
    low, high = random.choices([(1, ends[1]), (ends[0], 1), (1, 1)], weights)[0]
    return np.random.uniform(low, high)


def _noisy(image: torch.Tensor, sigma: tuple[float, float], scale: tuple[float, float]) -> torch.Tensor:
    """One family of noise for the whole batch; strength and greyness per sample."""
    if np.random.uniform() < 0.5:
        return random_add_gaussian_noise_pt(image, sigma_range=sigma, gray_prob=0.4, clip=True, rounds=False)
    return random_add_poisson_noise_pt(image, scale_range=scale, gray_prob=0.4, clip=True, rounds=False)
