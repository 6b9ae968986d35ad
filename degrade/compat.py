"""The arithmetic of basicsr 1.4.2 (Real-ESRGAN's reference), defects included, from the figures in its papers and code.

For parity only: sample by sample, in [0, 1], at the speed of the reference. What differs from the default is said at
each operator of the default.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from .canvas import Canvas
from .kernels import kernel
from .libjpeg import CHROMA, LUMA
from .noise import LUMA as GREY
from .noise import fields
from .operator import Operator, Step
from .strict import ConfigError

KERNEL = 21                                  # every drawn kernel is padded to this size
MODES = ("area", "bilinear", "bicubic")


class NotInReference(ConfigError):
    """An operator or a mode that basicsr does not have."""


def check(operators: Iterable[Operator]) -> None:
    """Refuses operators and filters that basicsr does not have.

    Raises:
        NotInReference: with the name of the first.
    """
    for operator in operators:
        if operator.op not in OPERATORS:
            raise NotInReference(f"basicsr has no operator {operator.op!r}; leave compat out for this recipe")
        odd = [mode for mode, weight in getattr(operator, "modes", {}).items() if weight and mode not in MODES]
        if odd:
            raise NotInReference(f"basicsr resizes by {', '.join(MODES)}, not by {odd[0]!r}; leave compat out")
        if getattr(operator, "kinds", {}).get("motion") and getattr(operator, "sinc", 0) < 1:
            raise NotInReference("basicsr has no motion blur; leave compat out for this recipe")


def apply(image: torch.Tensor, steps: Sequence[Step | None], name: str) -> torch.Tensor:
    """One image (1, 3, H, W) in [0, 1] through drawn steps; `name` seeds its Poisson counts."""
    for number, step in enumerate(steps):
        if step is not None:
            image = OPERATORS[step["op"]](image, step | {"name": f"{name}/{number}"})
    return image.clamp(0, 1)


def filter2d(image: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Correlation with one kernel (K, K), borders reflected; also where the image is smaller than the kernel."""
    reach = kernel.shape[-1] // 2
    canvas = Canvas(image, (image.shape[2],), (image.shape[3],))
    weight = kernel.to(image).expand(image.shape[1], 1, -1, -1)
    return F.conv2d(canvas.padded(reach, reach, reach, reach, "reflect"), weight, groups=image.shape[1])


def usm(image: torch.Tensor, step: Step) -> torch.Tensor:
    size = step["radius"] + 1 - step["radius"] % 2
    line = cv2.getGaussianKernel(size, 0)
    window = torch.from_numpy((line @ line.T).astype(np.float32))
    residual = image - filter2d(image, window)
    mask = filter2d((residual.abs() * 255 > step["threshold"]).float(), window)
    return mask * (image + step["weight"] * residual).clamp(0, 1) + (1 - mask) * image


def blur(image: torch.Tensor, step: Step) -> torch.Tensor:
    weights = kernel(step["kernel"])
    margin = max(0, (KERNEL - len(weights)) // 2)
    return filter2d(image, torch.from_numpy(np.pad(weights, margin).astype(np.float32)))


def resize(image: torch.Tensor, step: Step) -> torch.Tensor:
    size = {"scale_factor": step["factor"]} if "factor" in step else {"size": (step["height"], step["width"])}
    return F.interpolate(image, mode=step["mode"], **size)


def noise(image: torch.Tensor, step: Step) -> torch.Tensor:
    if step["family"] == "gaussian":
        canvas = Canvas(image, (image.shape[2],), (image.shape[3],))
        noise = fields(canvas, [step["field"]], [step["grey"]]) * (step["sigma"] / 255)
    else:
        levels = torch.tensordot(image.new_tensor(GREY), image, dims=([0], [1]))[:, None] if step["grey"] else image
        levels = (levels * 255).round().clamp(0, 255) / 255
        values = 2 ** math.ceil(math.log2(len(levels.unique())))
        seed = hashlib.blake2b(step["name"].encode(), digest_size=16).digest()
        random = np.random.Generator(np.random.Philox(key=int.from_bytes(seed, "little")))
        counts = torch.from_numpy(random.poisson((levels * values).cpu().numpy())).to(levels)
        noise = (counts / values - levels) * step["scale"]
    return (image + noise).clamp(0, 1)


def jpeg(image: torch.Tensor, step: Step) -> torch.Tensor:
    """DiffJPEG: 4:2:0, real-valued tables, the luma table transposed, zero padding to 16, chroma repeated."""
    quality = step["quality"]
    if not 1 <= quality < 100:
        raise NotInReference(f"basicsr's JPEG takes qualities from 1 to below 100, where it returns NaN, not {quality}")
    scale = (5000 / quality if quality < 50 else 200 - 2 * quality) / 100
    height, width = image.shape[2:]
    rgb = F.pad(image.clamp(0, 1), (0, -width % 16, 0, -height % 16)) * 255
    forward = rgb.new_tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    back = rgb.new_tensor([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]])
    centre = rgb.new_tensor([0, 128, 128]).view(1, 3, 1, 1)
    luma, chroma = (torch.einsum("cd,bdhw->bchw", forward, rgb) + centre).split([1, 2], 1)
    luma = _quantised(luma, LUMA.T * scale)
    chroma = _quantised(F.avg_pool2d(chroma, 2), CHROMA * scale)
    chroma = chroma.repeat_interleave(2, 2).repeat_interleave(2, 3)
    rgb = torch.einsum("cd,bdhw->bchw", back, torch.cat([luma, chroma], 1) - centre)
    return rgb.clamp(0, 255)[:, :, :height, :width] / 255


def _quantised(plane: torch.Tensor, table: np.ndarray) -> torch.Tensor:
    place = np.arange(8)
    matrix = np.cos((2 * place + 1) * place[:, None] * math.pi / 16) / 2
    matrix[0] /= math.sqrt(2)
    cosines, steps = plane.new_tensor(matrix), plane.new_tensor(table)
    batch, channels, height, width = plane.shape
    blocks = (plane - 128).reshape(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    blocks = (cosines @ blocks @ cosines.T / steps).round() * steps
    blocks = cosines.T @ blocks @ cosines
    return blocks.transpose(3, 4).reshape(batch, channels, height, width) + 128


OPERATORS = {"usm": usm, "blur": blur, "resize": resize, "noise": noise, "jpeg": jpeg,
             "round": lambda image, step: (image * 255).round().clamp(0, 255) / 255}
