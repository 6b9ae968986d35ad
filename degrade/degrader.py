"""The degrader: a batch of high-quality images in, low-quality ones and their parameters out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch

from . import compat as basicsr
from .blur import Blur
from .canvas import Canvas
from .filters import interleaved
from .operator import Size, as_bytes, as_float
from .recipe import OPERATORS, SMALLEST, Recipe, load_recipe
from .watch import Watch, refuse_outside

Parameters = dict[str, Any]
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class InputRefused(ValueError):
    """Images or parameters that cannot be degraded; the message names the key, the value and the remedy."""


class SecondOrderDegrader:
    """Makes low-quality images by a recipe, every sample by parameters of its own.

    What happens to a sample depends on (seed, key, epoch) alone: not on its batch, its neighbours or the machine.
    Tensors on the CPU take the CPU route (OpenCV and libjpeg-turbo, bytes that repeat exactly), others the torch
    route, which agrees with it but for rounding: see docs/degradation.md for the figures.

    Args:
        recipe: a Recipe, or what `load_recipe` takes.
        seed: of all draws.
        compat: "basicsr" repeats the reference's arithmetic and draws, defects included; None does it right.
            Recipes with what basicsr does not have are refused (NotInReference).
        route: "cpu" or "torch"; default: by the device of the images.
    """

    def __init__(self, recipe: Recipe | str | Path, seed: int = 0, *, compat: Literal["basicsr"] | None = None,
                 route: Literal["cpu", "torch"] | None = None) -> None:
        if compat not in (None, "basicsr"):
            raise ValueError(f'compat is None or "basicsr", not {compat!r}')
        if route not in (None, "cpu", "torch"):
            raise ValueError(f'route is "cpu", "torch" or None, not {route!r}')
        self.recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
        if compat:
            basicsr.check(self.recipe.operators())
        self.seed, self.compat, self.route = seed, compat, route
        self.watch = Watch()

    def __call__(self, hq: torch.Tensor, keys: Sequence[str], epoch: int = 0
                 ) -> tuple[torch.Tensor, list[Parameters]]:
        """Degrades a batch.

        Args:
            hq: (B, 3, H, W) or (B, 1, H, W), uint8, or floating point in [0, 1]; sides of 16 pixels or more.
            keys: a name per sample; those of the shards, as a rule.
            epoch: another epoch degrades the same sample otherwise.

        Returns:
            The low-quality batch, of the type and on the device of `hq`; and the parameters per sample, plain data.

        Raises:
            InputRefused: wrong shape, type or number of keys, NaN, or values outside [0, 1]. On a GPU, values are
                checked without waiting for them: the refusal comes from the next call, or from `watch.check()`.
        """
        shape = _shape(hq)
        if len(keys) != shape[0] or isinstance(keys, str):
            raise InputRefused(f"{shape[0]} images came with {len(keys)} keys; give one key per image")
        parameters = [self.draw(key, shape[2:], epoch) for key in keys]
        return self.apply(hq, parameters), parameters

    def draw(self, key: str, size: Size, epoch: int = 0) -> Parameters:
        """The parameters of one sample of `size` (height, width): JSON-ready, and all that `apply` needs."""
        height, width = (int(side) for side in size)
        steps = self.recipe.draw(self.seed, str(key), int(epoch), (height, width), self.compat is not None)
        return {"recipe": self.recipe.name, "seed": self.seed, "key": str(key), "epoch": int(epoch),
                "height": height, "width": width, "compat": self.compat, "steps": steps}

    def image(self, hq: np.ndarray, key: str, epoch: int = 0) -> tuple[np.ndarray, Parameters]:
        """Degrades one image, (H, W, 3) RGB or (H, W), uint8 or float32 in [0, 1], on the CPU route."""
        if hq.ndim not in (2, 3) or hq.shape[2:] not in ((), (3,)):
            raise InputRefused(f"{key}: an image is (H, W, 3) or (H, W), not {hq.shape}")
        parameters = self.draw(key, hq.shape[:2], epoch)
        batch = torch.from_numpy(hq[None, None] if hq.ndim == 2 else hq.transpose(2, 0, 1)[None])
        lq = self.apply(batch, [parameters])[0]
        return np.ascontiguousarray(lq[0].numpy() if hq.ndim == 2 else lq.permute(1, 2, 0).numpy()), parameters

    @torch.no_grad()
    def apply(self, hq: torch.Tensor, parameters: Sequence[Parameters]) -> torch.Tensor:
        """Degrades a batch by given parameters: exactly what the call that drew them returned."""
        shape = _shape(hq)
        if len(parameters) != shape[0]:
            raise InputRefused(f"{shape[0]} images came with the parameters of {len(parameters)}")
        for drawn in parameters:
            if (drawn["height"], drawn["width"]) != tuple(shape[2:]):
                raise InputRefused(f"{drawn['key']}: the parameters were drawn for {drawn['height']} x "
                                   f"{drawn['width']} pixels and the image has {shape[2]} x {shape[3]}; draw anew")
        compat = any(drawn["compat"] for drawn in parameters)
        if not compat and (self.route or ("cpu" if hq.device.type == "cpu" else "torch")) == "cpu":
            return torch.stack([_one(*pair) for pair in zip(hq.cpu(), parameters, strict=True)]).to(hq.device)
        self.watch.see(hq, [drawn["key"] for drawn in parameters])
        return _restored((_as_reference if compat else _batched)(hq, parameters), hq.dtype)


def _shape(hq: torch.Tensor) -> torch.Size:
    if not isinstance(hq, torch.Tensor):
        raise InputRefused(f"images are a torch.Tensor (B, 3, H, W), not {type(hq).__name__}; "
                           "for one array (H, W, 3) call degrader.image")
    if hq.dtype not in (torch.uint8, *FLOATS):
        raise InputRefused(f"images are uint8, or floating point in [0, 1], not {hq.dtype}")
    if hq.ndim != 4 or hq.shape[1] not in (1, 3) or not hq.shape[0]:
        raise InputRefused(f"images are (B, 3, H, W) or (B, 1, H, W), not {tuple(hq.shape)}")
    if min(hq.shape[2:]) < SMALLEST:
        raise InputRefused(f"images of {hq.shape[2]} x {hq.shape[3]} pixels are too small; {SMALLEST} is the least")
    return hq.shape


def _one(planes: torch.Tensor, parameters: Parameters) -> torch.Tensor:
    """The CPU route: (C, H, W) in, (C, h, w) of the same type out."""
    if planes.dtype == torch.uint8:
        image = cv2.merge(list(planes.numpy())) if len(planes) == 3 else planes[0].numpy()
    else:
        image, fine = interleaved(planes.float().numpy())
        if not fine:
            refuse_outside(planes[None], [parameters["key"]])
    steps = [step for step in parameters["steps"] if step is not None]
    while steps:
        step = steps.pop(0)
        if step["op"] == "blur" and steps and steps[0]["op"] == "resize":
            image = Blur.cpu_then_resize(image, step, steps.pop(0))
        else:
            image = OPERATORS[step["op"]].cpu(image, step)
    to_bytes = planes.dtype == torch.uint8
    image = as_bytes(image) if to_bytes else np.clip(as_float(image) / np.float32(255), 0, 1)
    return torch.from_numpy(np.stack(cv2.split(image))).to(planes.dtype)


def _batched(hq: torch.Tensor, parameters: Sequence[Parameters]) -> torch.Tensor:
    """The torch route: operator by operator over all samples that have it, each at its own size."""
    pixels = hq.float() if hq.dtype == torch.uint8 else hq.float() * 255
    count, _, height, width = hq.shape
    canvas = Canvas(pixels, (height,) * count, (width,) * count)
    if len({len(drawn["steps"]) for drawn in parameters}) > 1:
        raise InputRefused("parameters of different recipes cannot share a batch; apply them apart")
    with _full_precision(hq.device):
        for steps in zip(*(drawn["steps"] for drawn in parameters), strict=True):
            chosen = [sample for sample, step in enumerate(steps) if step is not None]
            if not chosen:
                continue
            part = [steps[sample] for sample in chosen]
            if len({step["op"] for step in part}) > 1:
                raise InputRefused("parameters of different recipes cannot share a batch; apply them apart")
            canvas = canvas.put(chosen, OPERATORS[part[0]["op"]].batch(canvas.take(chosen), part))
    return canvas.pixels[:, :, :canvas.heights[0], :canvas.widths[0]].clip(0, 255) / 255


def _as_reference(hq: torch.Tensor, parameters: Sequence[Parameters]) -> torch.Tensor:
    if hq.shape[1] != 3:
        raise InputRefused('compat="basicsr" knows RGB only; repeat the grey channel three times')
    images = hq.float() / 255 if hq.dtype == torch.uint8 else hq.float()
    with _full_precision(hq.device):
        return torch.cat([basicsr.apply(image[None], drawn["steps"], f"{drawn['seed']}/{drawn['key']}/{drawn['epoch']}")
                          for image, drawn in zip(images, parameters, strict=True)])


def _restored(lq: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (lq * 255).round().to(dtype) if dtype == torch.uint8 else lq.to(dtype)


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Float32 as it is written: no autocast, no TF32, whatever the training around has set."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    with torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(
            enabled=torch.backends.cudnn.enabled, benchmark=False, deterministic=False, allow_tf32=False):
        try:
            torch.backends.cuda.matmul.allow_tf32 = False
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = matmul
