"""SDXL as a painter of negatives: each image depends on its own row, whatever lies beside it in the batch."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from degrade.strict import ConfigError
from pipeline.ahead import Batch
from pipeline.crops import Crops
from pipeline.decode import Limits
from pipeline.jobs import Timed
from pipeline.tables import digest

from .config import Negatives
from .tokens import LIMIT, Tokens, fit

SUBJECT = 4         # tokens that are always left to a caption: one character of any script


@dataclass(frozen=True)
class Painted:
    """An image and the prompt that it was painted with."""

    image: np.ndarray               # (H, W, 3) uint8
    prompt: str


class NotFinite(ArithmeticError):
    """What came out holds NaN or infinity."""

    reason = "not_finite"


@dataclass(frozen=True)
class Sources:
    """The tiles that are painted over, as `inputs["images"]`: (size, size, 3) uint8, None where there is none."""

    limits: Limits
    config: Negatives
    row_timeout_s: float

    def __call__(self, rows: list[dict]) -> Batch:
        crops, batch = Crops(self.limits), Batch(inputs={"images": []})
        wanted = self.config.mode == "image_to_image"
        with Timed(lambda row: square(crops.pixels(row), self.config.size), self.row_timeout_s) as read:
            for row in rows:
                try:
                    batch.inputs["images"].append(read(row) if wanted else None)
                    batch.rows.append(row)
                except Exception as error:
                    batch.failed.append((row, error))
        return batch


def square(image: np.ndarray, size: int) -> np.ndarray:
    """The middle of an (H, W, 3) image at (size, size, 3)."""
    scale = size / min(image.shape[:2])
    if scale != 1:
        shape = max(size, round(image.shape[1] * scale)), max(size, round(image.shape[0] * scale))
        image = cv2.resize(image, shape, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return np.ascontiguousarray(image[top:top + size, left:left + size])


class Painter:
    """A loaded SDXL. `painter(rows, inputs)` gives an image per row, or the error that it ended with.

    Raises:
        ConfigError: diffusers is missing, the folder is not there or lacks a part, there is no GPU where one is asked
            for, or the words leave no room for a subject.
    """

    def __init__(self, config: Negatives) -> None:
        import torch
        self.config, self.lock = config, threading.Lock()
        name = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"negatives: device {name!r}: PyTorch sees no GPU here; use auto or cpu")
        self.pipeline = _load(config, getattr(torch, config.dtype)).to(name)
        self.pipeline.set_progress_bar_config(disable=True)
        self.tokens = Tokens(self.pipeline.tokenizer)
        words = self.tokens.count(config.words.negative)
        if words > LIMIT - SUBJECT:
            raise ConfigError(f"negatives.words: {config.words.name!r} takes {words} of {LIMIT} tokens, and {SUBJECT} "
                              "are kept for a subject; shorten its negative words")

    def __call__(self, rows: list[dict], inputs: dict[str, Any]) -> list[Painted | Exception]:
        with self.lock:     # also around the counting of tokens: padding is a state of the tokenizer that all share
            prompts = [self.prompt(row) for row in rows]
            images = self._paint(rows, prompts, inputs["images"])
        return [image if isinstance(image, Exception) else Painted(image, prompt)
                for image, prompt in zip(images, prompts, strict=True)]

    def prompt(self, row: dict) -> str:
        """The subject, cut so that the words of poor quality behind it fit CLIP's 77 tokens."""
        return fit(row["subject"] or "", self.tokens, LIMIT, keep=row["words"])

    def _paint(self, rows: list[dict], prompts: list[str], sources: list[np.ndarray | None]) -> list[Any]:
        """A batch that does not fit into memory is painted in halves."""
        import torch
        try:
            return [_pixels(image) for image in self._run(rows, prompts, sources)]
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                return [MemoryError("one image alone does not fit into the memory of the device; use a smaller size "
                                    "or dtype: bfloat16")]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        middle = len(rows) // 2
        return [image for half in (slice(None, middle), slice(middle, None))
                for image in self._paint(rows[half], prompts[half], sources[half])]

    def _run(self, rows: list[dict], prompts: list[str], sources: list[np.ndarray | None]) -> np.ndarray:
        """(B, H, W, 3) float in [0, 1]. The noise comes from generators on the CPU: it is the same on every device."""
        import torch
        config = self.config
        where: dict[str, Any] = {"height": config.size, "width": config.size}
        if config.mode == "image_to_image":
            stacked = torch.from_numpy(np.stack(sources)).permute(0, 3, 1, 2) / 255
            where = {"image": stacked, "strength": config.strength}
        return self.pipeline(
            prompt=prompts, negative_prompt=[config.negative_prompt] * len(rows), num_inference_steps=config.steps,
            guidance_scale=config.guidance_scale, output_type="np",
            generator=[torch.Generator().manual_seed(row["seed"]) for row in rows], **where).images


def _load(config: Negatives, dtype: Any) -> Any:
    if lacking := _lacking(Path(config.model)):
        raise ConfigError(f"{config.model} holds no {', no '.join(lacking)}: it is no whole SDXL in diffusers' layout. "
                          "Nothing is downloaded here: on a machine with network run `hf download MODEL --local-dir "
                          "FOLDER`")
    try:
        from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
    except ImportError as error:
        raise ConfigError(f"negatives need diffusers: pip install diffusers ({error})") from None
    kind = StableDiffusionXLImg2ImgPipeline if config.mode == "image_to_image" else StableDiffusionXLPipeline
    try:
        return kind.from_pretrained(config.model, torch_dtype=dtype, local_files_only=True, add_watermarker=False)
    except Exception as error:      # files cut short end in safetensors' own error, others in nearly any
        first = str(error).strip().split("\n")[0]
        raise ConfigError(f"{config.model} cannot be loaded as SDXL (unet, vae, two text encoders and tokenizers, "
                          f"scheduler). {type(error).__name__}: {first}") from error


def _lacking(folder: Path) -> list[str]:
    """What is missing in a folder of SDXL; without a vocabulary transformers would make do with an empty one."""
    wanted = {name: [name] for name in (
        "model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
        "text_encoder_2/config.json", "scheduler/scheduler_config.json")}
    wanted |= {f"{name}/vocab.json": [f"{name}/vocab.json", f"{name}/tokenizer.json"]
               for name in ("tokenizer", "tokenizer_2")}
    return [name for name, files in wanted.items() if not any((folder / file).is_file() for file in files)]


def _pixels(image: np.ndarray) -> np.ndarray | NotFinite:
    if not np.isfinite(image).all():
        return NotFinite("the image holds NaN: SDXL's autoencoder overflows in float16; use dtype: bfloat16 or float32")
    return (image * 255).round().astype(np.uint8)


def likeness(source: np.ndarray | None, painted: np.ndarray) -> float | None:
    """How much of the source's fine detail is still there: the correlation of both pictures' high frequencies, -1 to 1.

    Near 1 the photograph came through as it was, and the image is no negative. None without a source.
    """
    if source is None:
        return None
    first, second = (_detail(image) for image in (source, painted))
    spread = first.std() * second.std()
    return float((first * second).mean() / spread) if spread > 1e-6 else 0.0


def _detail(image: np.ndarray) -> np.ndarray:
    luma = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return luma - cv2.GaussianBlur(luma, (0, 0), 2.0)


_painters: dict[str, Painter] = {}
_making = threading.Lock()


def painter(config: Negatives) -> Painter:
    """The painter of a configuration, kept for the life of the process."""
    name = digest(config.model_dump(mode="json"))
    with _making:
        if name not in _painters:
            _painters[name] = Painter(config)
        return _painters[name]
