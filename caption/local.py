"""Captions from a model on this machine: any image-text-to-text model of transformers, such as LLaVA-1.5 or OneVision.

Two halves, so that neither waits for the other: a `Preparer` turns images and questions into tensors on CPUs, a
`Captioner` holds the weights and generates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from degrade.strict import ConfigError

from .config import LocalModel, Sampling
from .generated import Generated

Inputs = dict[str, torch.Tensor]
GREEDY = Sampling()


class Preparer:
    """Images and questions to padded tensors, on the CPU.

    Raises:
        ConfigError: the folder is not there, lacks a file, or its tokenizer has no chat template.
    """

    def __init__(self, folder: str) -> None:
        from transformers import AutoProcessor
        self.folder = folder
        with _named(folder, "a processor (preprocessor_config.json or processor_config.json, tokenizer.json)"):
            self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        if not hasattr(self.processor, "tokenizer") or not hasattr(self.processor, "image_processor"):
            raise ConfigError(f"{folder} is not an image-text-to-text model: its processor takes no images with text")
        if not getattr(self.processor, "chat_template", None):
            raise ConfigError(f"{folder}: the processor has no chat template, so how this model is asked is unknown; "
                              "copy chat_template.jinja from the model's page into the folder")
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"         # generation goes on from the last token, which must not be padding
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def __call__(self, images: Sequence[np.ndarray], questions: Sequence[str],
                 systems: Sequence[str | None] | None = None) -> Inputs:
        """(H, W, 3) uint8 images and a question each, to what the model takes; sequences are padded on the left."""
        from PIL import Image
        chats = [[*([{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []),
                  {"role": "user", "content": [{"type": "image", "image": Image.fromarray(image)},
                                               {"type": "text", "text": question}]}]
                 for image, question, system in zip(images, questions, systems or [None] * len(images), strict=True)]
        return dict(self.processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True}))

    def text(self, tokens: Sequence[int]) -> str:
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


class Captioner:
    """A loaded model. `captioner(inputs, max_new_tokens)` continues a prepared batch.

    Raises:
        ConfigError: the folder is not there or lacks a file, no GPU where one is asked for, or bitsandbytes missing.
    """

    def __init__(self, config: LocalModel, preparer: Preparer | None = None) -> None:
        from transformers import AutoModelForImageTextToText
        from transformers.utils.logging import disable_progress_bar
        disable_progress_bar()
        self.config, self.preparer = config, preparer or Preparer(config.model)
        self.device = _device(config.device)
        self.halved = 0                         # how often a batch did not fit
        with _named(config.model, "the weights and config.json of an image-text-to-text model"):
            self.model = AutoModelForImageTextToText.from_pretrained(
                config.model, local_files_only=True, attn_implementation=config.attention,
                dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
                **_placed(config, self.device))
        if config.quantisation == "none" and config.device != "balanced":
            self.model.to(self.device)
        self.model.eval()

    def __call__(self, inputs: Inputs, max_new_tokens: int, sampling: Sampling = GREEDY) -> list[Generated]:
        """Generates for a batch; one that does not fit into memory is done in halves.

        Raises:
            MemoryError: one image alone does not fit, or a batch of a model whose inputs cannot be cut.
        """
        count = len(inputs["input_ids"])
        try:
            return self._generate(inputs, max_new_tokens, sampling)
        except torch.OutOfMemoryError:
            if count == 1 or any(len(values) != count for values in inputs.values()):
                raise MemoryError("one image alone does not fit into the memory of the device; use quantisation, "
                                  "fewer max_new_tokens or a smaller model") from None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.halved += 1
        halves = [{name: values[part] for name, values in inputs.items()}
                  for part in (slice(None, count // 2), slice(count // 2, None))]
        return [generated for half in halves for generated in self(half, max_new_tokens, sampling)]

    @torch.inference_mode()
    def _generate(self, inputs: Inputs, max_new_tokens: int, sampling: Sampling) -> list[Generated]:
        moved = {name: values.to(self.device, self.model.dtype if values.is_floating_point() else None,
                                 non_blocking=True) for name, values in inputs.items()}
        how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
        if sampling.temperature > 0:
            how = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(sampling.seed)
            tokens = self.model.generate(**moved, **how, max_new_tokens=max_new_tokens,
                                         pad_token_id=self.preparer.processor.tokenizer.pad_token_id)
        return [self._cut(line) for line in tokens[:, moved["input_ids"].shape[1]:].tolist()]

    def _cut(self, tokens: list[int]) -> Generated:
        """The answer up to its end token; without one the model had no room to finish."""
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        place = next((i for i, token in enumerate(tokens) if token in ends), None)
        taken = tokens if place is None else tokens[:place + 1]
        return Generated(self.preparer.text(taken), len(taken), "length" if place is None else "stop")


@contextlib.contextmanager
def _named(folder: str, wanted: str):
    """What transformers says of a folder, as one sentence with the folder and what it should hold."""
    if not Path(folder).is_dir():
        raise ConfigError(f"{folder} is not a folder. Nothing is downloaded here: on a machine with network run "
                          "`hf download MODEL --local-dir FOLDER`, and name that folder")
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().split("\n")[0]
        raise ConfigError(f"{folder} cannot be loaded; it should hold {wanted}. {type(error).__name__}: {first}"
                          ) from error


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = name.replace("balanced", "cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: PyTorch sees no GPU here; use auto or cpu")
    return torch.device(name)


def _placed(config: LocalModel, device: torch.device) -> dict[str, Any]:
    """How the weights are spread and quantised, as `from_pretrained` takes it."""
    where = {"device_map": "balanced" if config.device == "balanced" else {"": device}}
    if config.quantisation == "none":
        return where if config.device == "balanced" else {}
    try:
        import bitsandbytes  # noqa: F401
        from transformers import BitsAndBytesConfig
    except ImportError:
        raise ConfigError("quantisation needs bitsandbytes: pip install bitsandbytes") from None
    return where | {"quantization_config": BitsAndBytesConfig(**{f"load_in_{config.quantisation}": True})}
