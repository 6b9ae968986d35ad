"""Compression: JPEG as libjpeg does it, and WebP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import cv2
import numpy as np
import torch
from pydantic import AfterValidator, Field

from .canvas import Canvas
from .keyed import Draws
from .libjpeg import MCU, compressed
from .operator import Frame, NotNegative, Operator, Step, Weights, as_bytes

Subsampling = Literal["4:4:4", "4:4:0", "4:2:2", "4:2:0"]
CV_SAMPLING = {name: getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{name.replace(':', '')}")
               for name in ("4:4:4", "4:4:0", "4:2:2", "4:2:0")}


def _quality(ends: tuple[float, float]) -> tuple[float, float]:
    if not 1 <= ends[0] <= ends[1] <= 100:
        raise ValueError(f"qualities go from 1 to 100 in order, not {list(ends)}")
    return ends


Quality = Annotated[tuple[float, float], AfterValidator(_quality)]


class Jpeg(Operator):
    """A round trip through JPEG at a whole quality.

    The CPU route asks libjpeg-turbo itself, the torch route repeats its integer arithmetic (see `libjpeg`). In compat
    it is basicsr's differentiable approximation: real-valued quality and tables, the luma table transposed, no
    rounding of colours, chroma repeated instead of interpolated, and zero padding to 16, which darkens two edges.
    """

    op: Literal["jpeg"] = "jpeg"
    quality: Quality = (30, 95)
    subsampling: Annotated[dict[Subsampling, NotNegative], Weights] = Field({"4:2:0": 1.0})

    def draw(self, draws: Draws, frame: Frame) -> Step:
        quality = draws.uniform(*self.quality)
        return {"quality": quality if frame.compat else round(quality), "subsampling": draws.choice(self.subsampling)}

    @staticmethod
    def cpu(image: np.ndarray, step: Step) -> np.ndarray:
        image = as_bytes(image)
        import simplejpeg  # the torch route does without

        # OpenCV encodes and simplejpeg decodes: the one has the accurate transform, the other is faster.
        if image.ndim == 3:
            image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        options = [cv2.IMWRITE_JPEG_QUALITY, round(step["quality"]),
                   cv2.IMWRITE_JPEG_SAMPLING_FACTOR, CV_SAMPLING[step["subsampling"]]]
        data = cv2.imencode(".jpg", image, options)[1].data
        return simplejpeg.decode_jpeg(data) if image.ndim == 3 else simplejpeg.decode_jpeg(data, "GRAY")[..., 0]

    @staticmethod
    def batch(canvas: Canvas, steps: Sequence[Step]) -> Canvas:
        for layout in MCU:                   # the layouts differ in their planes' shapes
            chosen = [i for i, step in enumerate(steps) if step["subsampling"] == layout]
            if chosen:
                part = canvas.take(chosen)
                part = part.with_pixels(compressed(part, [round(steps[i]["quality"]) for i in chosen], layout))
                canvas = canvas.put(chosen, part)
        return canvas


class Webp(Operator):
    """A round trip through lossy WebP. There is no arithmetic of it in torch: those samples visit the CPU."""

    op: Literal["webp"] = "webp"
    quality: Quality = (30, 95)

    def draw(self, draws: Draws, frame: Frame) -> Step:
        return {"quality": round(draws.uniform(*self.quality))}

    @staticmethod
    def cpu(image: np.ndarray, step: Step) -> np.ndarray:
        data = cv2.imencode(".webp", as_bytes(image), [cv2.IMWRITE_WEBP_QUALITY, step["quality"]])[1]
        return cv2.imdecode(data, cv2.IMREAD_GRAYSCALE if image.ndim == 2 else cv2.IMREAD_COLOR)

    @staticmethod
    def batch(canvas: Canvas, steps: Sequence[Step]) -> Canvas:
        pixels = canvas.pixels.clone()
        for i, (step, height, width) in enumerate(zip(steps, canvas.heights, canvas.widths, strict=True)):
            image = pixels[i, :, :height, :width].permute(1, 2, 0).cpu().numpy()
            image = Webp.cpu(np.ascontiguousarray(image.squeeze(2) if image.shape[2] == 1 else image), step)
            image = torch.from_numpy(image).to(pixels).view(height, width, -1)
            pixels[i, :, :height, :width] = image.permute(2, 0, 1)
        return canvas.with_pixels(pixels)
