"""One image of `clearshard degrade`: decoded, degraded, and written so that it is there whole or not at all."""

from __future__ import annotations

import errno
import functools
import json
import os
import stat
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
import yaml

from .config import ConfigError
from .decode import ImageRefused, Limits, decode
from .jobs import error_class
from .score import read_image
from .sources import SIDECARS
from .storage import TEMPORARY, WorkspaceError, commit, local_uri

if TYPE_CHECKING:
    from degrade import SecondOrderDegrader

SETTINGS = "degraded.yaml"          # in the output folder; a folder that has it is not taken for a source of images
UNFINISHED = os.path.join(".degraded", "unfinished")
# The folder's fault and not the image's: the next image would fail in the same way.
STOPS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}


@dataclass(frozen=True)
class Settings:
    """What decides the pixels, besides the image and its key."""

    recipe: str                     # the recipe's whole YAML
    seed: int = 0
    epoch: int = 0
    compat: str | None = None       # "basicsr" or None
    crop: bool = True               # right and bottom, to multiples of the recipe's scale, if the result is smaller
    max_pixels: int = 64_000_000    # 200 bytes of memory each, at worst


@dataclass(frozen=True)
class Found:
    """A file below the folder of images."""

    path: str                       # relative to the folder
    modified: float                 # seconds since 1970

    @property
    def key(self) -> str:
        """The path as plain text: bytes that are no UTF-8 become `\\xff`."""
        return os.fsencode(self.path).decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class Outcome:
    found: Found
    reason: str | None = None       # None: written
    message: str = ""


@dataclass(frozen=True)
class Maker:
    """Makes the low-quality image of a file; called in the worker processes."""

    images: str                     # folder
    output: str                     # folder
    settings: Settings
    only: str | None = None         # this one of its files

    def walk(self) -> Iterator[Found]:
        """The images, in no particular order."""
        if self.only is None:
            return walk(self.images)
        return iter([Found(self.only, os.stat(os.path.join(self.images, self.only)).st_mtime)])

    def picture(self, found: Found) -> str:
        return os.path.join(self.output, f"{found.path}.png")

    def parameters(self, found: Found) -> str:
        return os.path.join(self.output, f"{found.path}.json")

    def done(self, found: Found) -> bool:
        """Whether the result is there, and is not of an earlier version of the image."""
        try:
            written = os.stat(self.picture(found)).st_mtime
        except OSError:
            return False
        return not written < found.modified <= time.time()      # a camera's clock may be in the future

    def __call__(self, found: Found) -> Outcome:
        """Degrades an image and writes the result; what is wrong with the image is in the outcome.

        Raises:
            ConfigError: the recipe cannot be applied at all.
            WorkspaceError: the output folder takes no more.
        """
        try:
            lq, parameters = self.degraded(found)
        except ConfigError:
            raise
        except Exception as error:      # one bad image never stops the job, whatever it does to the libraries
            return Outcome(found, error_class(error), str(error).removeprefix(f"{error_class(error)}: "))
        try:
            self._write(found, lq, parameters)
        except OSError as error:
            if error.errno in STOPS:
                raise WorkspaceError(f"cannot write into {self.output}: {error.strerror}. What was finished is kept: "
                                     "make room or mend the permission, then run the same command again.") from None
            return Outcome(found, error_class(error), f"cannot be written: {error.strerror}")
        return Outcome(found)

    def degraded(self, found: Found) -> tuple[np.ndarray, dict]:
        """The low-quality image (h, w, 3) uint8 and its parameters."""
        return degrader(self.settings).image(self.original(found), found.key, self.settings.epoch)

    def original(self, found: Found) -> np.ndarray:
        """The image as the degrader gets it: (H, W, 3) uint8 sRGB, cut to whole multiples of the scale."""
        from degrade.recipe import SMALLEST
        limits = Limits(max_pixels=self.settings.max_pixels)
        row = {"uri": local_uri(os.path.join(self.images, found.path)), "offset": None, "length": None}
        image = decode(read_image(row, limits.max_bytes), limits)
        height, width = image.shape[:2]
        if min(height, width) < SMALLEST:
            raise ImageRefused("too_small", f"{width} x {height} pixels; both sides need {SMALLEST} or more")
        recipe = degrader(self.settings).recipe
        step = recipe.scale if self.settings.crop and recipe.output == "lq" else 1
        return np.ascontiguousarray(image[:height - height % step, :width - width % step])

    def _write(self, found: Found, lq: np.ndarray, parameters: dict) -> None:
        """The parameters first: the image under its name is the mark that both are complete."""
        os.makedirs(os.path.dirname(self.picture(found)), exist_ok=True)
        png = cv2.imencode(".png", lq[..., ::-1])[1]
        for target, data in ((self.parameters(found), json.dumps(parameters).encode()), (self.picture(found), png)):
            # Under a short name in a folder of their own: easily swept, and never longer than a name may be.
            path = os.path.join(self.output, UNFINISHED, TEMPORARY + uuid.uuid4().hex)
            with open(path, "wb") as file:
                file.write(data)
            try:
                commit(path, target)
            except OSError:
                os.unlink(path)
                raise


@functools.lru_cache(maxsize=1)
def degrader(settings: Settings) -> SecondOrderDegrader:
    """The degrader of these settings, made once in a process."""
    from degrade import SecondOrderDegrader, load_recipe
    return SecondOrderDegrader(load_recipe(yaml.safe_load(settings.recipe)), settings.seed, compat=settings.compat)


def single_threaded() -> None:
    """A process per core is faster than threads that share it."""
    import torch
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def walk(top: str) -> Iterator[Found]:
    """Every file below a folder, as the disk lists them, so that no folder is held in memory.

    Left out are hidden files, text beside images (`.txt`, `.json`, …) and folders that this command wrote.
    """
    seen, stack = set(), [""]
    while stack:
        folder = stack.pop()
        try:
            entries = os.scandir(os.path.join(top, folder))
        except OSError:
            yield Found(folder, 0.0)            # so that reading it says what is wrong
            continue
        with entries:
            for entry in entries:
                path = os.path.join(folder, entry.name)
                if entry.name.startswith(".") or entry.name.lower().endswith(SIDECARS):
                    continue
                try:
                    status = os.stat(entry.path)
                except OSError:                 # a link to nowhere or in a loop, or just deleted: the same
                    yield Found(path, 0.0)
                    continue
                if not stat.S_ISDIR(status.st_mode):
                    yield Found(path, status.st_mtime)
                elif (place := (status.st_dev, status.st_ino)) not in seen and not os.path.exists(
                        os.path.join(entry.path, SETTINGS)):
                    seen.add(place)             # links may lead back to a folder
                    stack.append(path)
