"""Optional scores: any no-reference metric of pyiqa by name, any transformers image classifier by label.

Nothing is ever downloaded: a metric whose weights are not on this machine says which file goes where.
pyiqa is not for commercial use, so it is imported only when a configuration names one of its metrics.
Both libraries read weights made by others; pyiqa unpickles them, so take them from a source you trust.
"""

import contextlib
import difflib
import io
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import cv2
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

NOT_ONE_IMAGE = ("fid", "fid_dinov2", "sfid", "inception_score", "clipscore")  # sets of images, or image and text


class MetricUnavailable(RuntimeError):
    """A metric cannot run here; the message is one sentence with what is missing and where it goes."""


class MetricConfig(BaseModel):
    """One optional score, which becomes one column."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")        # the column
    kind: Literal["pyiqa", "classifier"]
    model: str                                              # pyiqa's name of the metric, or a model folder or hub id
    label: str | None = None                                # classifier: the label whose probability is the score
    weights: str | None = None                              # pyiqa: a local file instead of the one in its cache
    device: Literal["cpu", "cuda", "auto"] = "auto"
    size: int | None = Field(None, ge=32)                   # pixels; larger images are reduced to this longest side

    @model_validator(mode="after")
    def _fits_kind(self) -> "MetricConfig":
        if self.kind == "classifier" and self.label is None:
            raise ValueError(f"metric {self.name!r}: a classifier needs `label`, whose probability is the score")
        if self.kind == "classifier" and self.weights is not None:
            raise ValueError(f"metric {self.name!r}: `weights` is for pyiqa; a classifier's are in its `model` folder")
        if self.kind == "pyiqa" and self.label is not None:
            raise ValueError(f"metric {self.name!r}: `label` is for classifiers, pyiqa metrics have none")
        return self


class Metric:
    """A loaded metric: `metric(image)` is its score. Raises MetricUnavailable when built without what it needs."""

    def __init__(self, config: MetricConfig):
        self.config = config
        device = _device(config)
        build = _pyiqa if config.kind == "pyiqa" else _classifier
        self._score: Callable[[np.ndarray], float] = build(config, device)

    def __call__(self, image: np.ndarray) -> float:
        """Score of (H, W, 3) uint8 sRGB, in the metric's own range. Raises ValueError where it has none."""
        longest = max(image.shape[:2])
        if self.config.size and longest > self.config.size:
            scale = self.config.size / longest
            height, width = (max(round(length * scale), 1) for length in image.shape[:2])
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        value = self._score(image)
        if not math.isfinite(value):
            raise ValueError(f"{self.config.name}: the score of this {longest}-pixel image is {value}")
        return value


def missing(config: MetricConfig) -> str | None:
    """None if the metric can run here, else one sentence on what is wanted. Loads the model to find out."""
    try:
        Metric(config)
    except MetricUnavailable as error:
        return str(error)
    return None


def _device(config: MetricConfig) -> str:
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise MetricUnavailable(f"metric {config.name!r} is set to device 'cuda', but PyTorch sees no GPU here; "
                                "set device to 'auto' or 'cpu'")
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def full_reference(name: str, device: str = "cpu") -> Callable[[np.ndarray, np.ndarray], float]:
    """A metric of pyiqa that compares (H, W, 3) uint8 sRGB with the true picture, such as lpips.

    Raises:
        MetricUnavailable: pyiqa has none of this name, or it cannot run here.
    """
    config = MetricConfig.model_construct(name=name, kind="pyiqa", model=name, weights=None)     # any name is asked for
    model = _created(config, device, "FR")
    return lambda image, truth: float(model(_planes(image, device), _planes(truth, device)).reshape(-1)[0])


def _pyiqa(config: MetricConfig, device: str) -> Callable[[np.ndarray], float]:
    model = _created(config, device, "NR")
    return lambda image: float(model(_planes(image, device)).reshape(-1)[0])


def _planes(image: np.ndarray, device: str) -> Any:
    """(H, W, 3) uint8 as (1, 3, H, W) float32 in [0, 1]."""
    import torch
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].to(device).float() / 255


def _created(config: MetricConfig, device: str, kind: Literal["NR", "FR"]) -> Callable:
    """A metric without (NR) or with (FR) a reference."""
    import torch

    try:
        import pyiqa
        from pyiqa.utils.download_util import DEFAULT_CACHE_DIR
    except ImportError as error:
        raise MetricUnavailable(f"metric {config.name!r} needs the package {error.name}: "
                                "pip install 'clearshard[iqa]'") from error
    names = [name for name in pyiqa.list_models(kind) if name not in NOT_ONE_IMAGE]
    if config.model not in names:
        sort = "no-reference" if kind == "NR" else "full-reference"
        raise MetricUnavailable(f"metric {config.name!r}: pyiqa has no {sort} metric {config.model!r}; "
                                + _nearest(config.model, names))
    if config.weights and not Path(config.weights).is_file():
        raise MetricUnavailable(f"metric {config.name!r}: there is no file {config.weights!r} (weights)")
    options = {"pretrained_model_path": config.weights} if config.weights else {}
    try:
        # pyiqa announces its loading with print
        with _no_network(), contextlib.redirect_stdout(io.StringIO()):
            return pyiqa.create_metric(config.model, device=torch.device(device), **options)
    except _NetworkRefused as refused:
        raise MetricUnavailable(_wanted(config, refused, DEFAULT_CACHE_DIR)) from refused
    except ModuleNotFoundError as error:
        remedy = "pip install 'setuptools<81'" if error.name == "pkg_resources" else f"pip install {error.name}"
        raise MetricUnavailable(f"metric {config.name!r} needs the package {error.name}: {remedy}") from error
    except Exception as error:  # a damaged or foreign weight file, a model folder that is not there, ...
        raise MetricUnavailable(f"metric {config.name!r}: pyiqa cannot create {config.model!r}: "
                                f"{type(error).__name__}: {_first_line(error)}") from error


def _wanted(config: MetricConfig, refused: "_NetworkRefused", cache: str) -> str:
    """Which file, from where, to where."""
    import torch

    url = urlparse(refused.target)
    file = os.path.basename(url.path)
    if not url.scheme:  # a host name: the hub's client, which opens its connection itself
        return (f"metric {config.name!r} needs a backbone from {refused.target}: on a machine with network run "
                f"`hf download {refused.hub_file or config.model}`, then copy that folder of its hub cache here")
    folder = cache if "IQA-PyTorch" in refused.target else os.path.join(torch.hub.get_dir(), "checkpoints")
    if "openaipublic" in refused.target:
        folder = os.path.expanduser("~/.cache/clip")
    return f"metric {config.name!r} needs the file {file}: put {refused.target} at {os.path.join(folder, file)}"


def _classifier(config: MetricConfig, device: str) -> Callable[[np.ndarray], float]:
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    try:
        with _no_network():
            processor = AutoImageProcessor.from_pretrained(config.model, local_files_only=True)
            model = AutoModelForImageClassification.from_pretrained(config.model, local_files_only=True)
    except (OSError, _NetworkRefused) as error:
        raise MetricUnavailable(
            f"metric {config.name!r}: no image classifier with its image processor in {config.model!r}, neither as a "
            f"folder nor in the hub cache; run `hf download {config.model}` or give a folder ({_first_line(error)})"
        ) from error
    labels = {str(name): index for index, name in model.config.id2label.items()}
    if config.label not in labels:
        raise MetricUnavailable(f"metric {config.name!r}: {config.model!r} has no label {config.label!r}; "
                                + _nearest(config.label, list(labels)))
    model = model.to(device).eval()
    multi_label = model.config.problem_type == "multi_label_classification"

    def score(image: np.ndarray) -> float:
        inputs = processor(images=image, return_tensors="pt", input_data_format="channels_last").to(device)
        with torch.inference_mode():
            logits = model(**inputs).logits[0].float()
        shares = logits.sigmoid() if multi_label else logits.softmax(0)
        return float(shares[labels[config.label]])

    return score


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or sorted(names)[:8]
    return f"nearest: {', '.join(close)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _NetworkRefused(RuntimeError):
    def __init__(self, target: str):
        super().__init__(target)
        self.target = target  # URL, or the name of the host

    @property
    def hub_file(self) -> str | None:
        """Repository and file that the hub's client was asked for, read from its frames; None if unknown."""
        step = self.__traceback__
        while step is not None:
            names = step.tb_frame.f_locals
            if isinstance(names.get("repo_id"), str):
                return " ".join(filter(None, (names["repo_id"], names.get("filename"))))
            step = step.tb_next
        return None


_refuse = ContextVar("refuse", default=False)
_hooked = False


@contextlib.contextmanager
def _no_network() -> Iterator[None]:
    """Any attempt of this thread to reach the network raises _NetworkRefused.

    An audit hook, because it replaces nothing in the libraries and other threads do not notice it.
    """
    global _hooked
    if not _hooked:  # a hook cannot be removed: one for the life of the process
        sys.addaudithook(_audit)
        _hooked = True
    token = _refuse.set(True)
    try:
        yield
    finally:
        _refuse.reset(token)


def _audit(event: str, arguments: tuple) -> None:
    if event not in ("urllib.Request", "socket.getaddrinfo", "socket.connect") or not _refuse.get():
        return
    if event == "socket.connect":
        address = arguments[1]
        if isinstance(address, tuple):  # not a socket file of this machine
            raise _NetworkRefused(str(address[0]))
    else:
        raise _NetworkRefused(str(arguments[0]))
