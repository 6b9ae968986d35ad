"""How near each part of a SUPIR brings degraded pictures to the true ones: what is made, measured and kept.

One line of JSON per picture and variant is appended as soon as it is measured, so a run can be killed and repeated.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from degrade import SecondOrderDegrader
from degrade.strict import ConfigError
from pipeline.decode import Limits, decode
from pipeline.jobs import error_class
from pipeline.storage import Folder, WorkspaceError

from . import colour, pixels
from .noise import KeyedNoise
from .presets import Preset, choose
from .restore import Input
from .supir import SupirPipeline

INPUT, AUTOENCODER, PLAIN, ROBUST = "input", "autoencoder", "plain encoder", "robust encoder"
RESTORED, ALONE, UNPULLED = "restored", "without control", "without pull"
TRUTH = "truth"
SETTINGS, LINES, SHOWN = "settings.json", "measures.jsonl", "shown"      # in the folder of an evaluation
Variants = Mapping[str, Preset | None]
Measures = Mapping[str, Callable[[np.ndarray, np.ndarray], float]]


def variants(preset: Preset, taus: Iterable[float] = ()) -> dict[str, Preset | None]:
    """Every variant by name, with how it is sampled; None where nothing is.

    taus: strengths of the pull, 0 for none, which is added where there is any other: the rest is compared with it.
    """
    found = dict.fromkeys((INPUT, AUTOENCODER, PLAIN, ROBUST)) | {
        RESTORED: preset, ALONE: choose(preset, {"control": {"low": 0.0, "high": 0.0}}, ALONE)}
    for tau in sorted({*taus, 0.0} if taus else (), key=lambda tau: -tau or -np.inf):
        name = f"tau {tau:g}" if tau else UNPULLED
        found[name] = choose(preset, {"tau": tau or None}, name)
    return found


class TooSmall(ValueError):
    """A picture that holds no square of the unit."""

    reason = "too_small"


@dataclass(frozen=True)
class Picture:
    """A true picture: its name, a hash of its file, and (H, W, 3) uint8 with sides of multiples of 64."""

    name: str
    content: str
    hq: np.ndarray


def middle(image: np.ndarray, unit: int = pixels.UNIT) -> np.ndarray:
    """The largest part in the middle of (H, W, 3) whose sides are multiples of `unit`.

    Raises:
        TooSmall: there is none.
    """
    height, width = (side // unit * unit for side in image.shape[:2])
    if not height or not width:
        raise TooSmall(f"a picture of {image.shape[1]} x {image.shape[0]} pixels is smaller than {unit} x {unit}")
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return np.ascontiguousarray(image[top:top + height, left:left + width])


class Lines:
    """The measurements that are there. A half-written last line, of a run that was killed, goes with the next one.

    Raises:
        ConfigError: another line is damaged; names it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[tuple[str, str, str], dict[str, float]] = {}
        text = path.read_bytes() if path.is_file() else b""
        whole = text[:text.rfind(b"\n") + 1]
        self.end = len(whole)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                self.found[row["image"], row["content"], row["variant"]] = row["measured"]
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{path}: line {number} is damaged; delete it, and what it said is measured "
                                  "again") from None

    def add(self, picture: Picture, variant: str, measured: dict[str, float]) -> None:
        """Raises WorkspaceError: the disk takes no more."""
        row = {"image": picture.name, "content": picture.content, "variant": variant, "measured": measured}
        try:
            with self.path.open("r+b" if self.path.exists() else "wb") as file:
                file.seek(self.end)
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                self.end = file.tell()
                file.truncate()
        except OSError as error:
            raise WorkspaceError(f"cannot write {self.path}: {error.strerror}. What was measured is kept: make room, "
                                 "then run the same command again.") from None
        self.found[picture.name, picture.content, variant] = measured


@dataclass
class Batches:
    """Batches of pictures of one size that lack the same variants, nearly in the order of their names.

    After they were walked through, `there` names the pictures that could be read, with the hashes of their files, and
    `refused` the others with the class of the error and its message.
    """

    sources: Sequence[Input]
    lines: Lines
    wanted: Sequence[str]
    size: int
    limits: Limits = field(default_factory=Limits)
    there: dict[str, str] = field(default_factory=dict)
    refused: list[tuple[str, str, str]] = field(default_factory=list)

    def pending(self) -> int:
        """Measurements that are missing, if all files are pictures."""
        count = 0
        for source in self.sources:
            with contextlib.suppress(OSError):      # which is told when it is this file's turn
                count += len(self._missing(source.name, self._content(source)[1]))
        return count

    def __iter__(self) -> Iterator[tuple[list[Picture], tuple[str, ...]]]:
        waiting: dict[tuple, list[Picture]] = {}
        for source in self.sources:
            try:
                data, content = self._content(source)
                if missing := self._missing(source.name, content):
                    picture = Picture(source.name, content, middle(decode(data, self.limits)))
                    waiting.setdefault((picture.hq.shape, missing), []).append(picture)
            except Exception as error:
                kind = error_class(error)
                self.refused.append((source.name, kind, str(error).removeprefix(f"{kind}: ")[:300]))
                continue
            self.there[source.name] = content
            if missing and len(waiting[key := (picture.hq.shape, missing)]) == self.size:
                yield waiting.pop(key), missing
        for (_, missing), batch in waiting.items():
            yield batch, missing

    def _missing(self, name: str, content: str) -> tuple[str, ...]:
        return tuple(variant for variant in self.wanted if (name, content, variant) not in self.lines.found)

    def _content(self, source: Input) -> tuple[bytes, str]:
        data = source.path.read_bytes()
        return data, blake2b(data, digest_size=8).hexdigest()


class Maker:
    """Makes the variants of a batch. Degradation and noise are keyed by the pictures' names, so batches change nothing.

    Raises:
        ConfigError: the results of the recipe are smaller than its input, so that nothing could be compared.
    """

    def __init__(self, pipeline: SupirPipeline, degrader: SecondOrderDegrader, quality: str = "supir",
                 colours: colour.Method = "wavelet", tile: int = 1 << 20) -> None:
        if degrader.recipe.output != "hq":
            raise ConfigError(f"the results of recipe {degrader.recipe.name} are smaller than its input; to compare "
                              "them use one of the same size, such as supir: `clearshard recipe list`")
        self.pipeline, self.degrader, self.colours, self.tile = pipeline, degrader, colours, tile
        positive, negative = pipeline.prompt("", None, quality, False)
        self.told = pipeline.told([negative]), pipeline.told([positive])

    def __call__(self, batch: list[Picture], wanted: Variants) -> Iterator[tuple[str, list[np.ndarray]]]:
        """The pictures of one variant after the other, (H, W, 3) uint8 each."""
        shape, run = batch[0].hq.shape[:2], self.pipeline
        sizes = pixels.plan(shape, short=min(shape))
        lq = [self.degrader.image(picture.hq, picture.name)[0] for picture in batch]
        images = torch.cat([pixels.prepare(image, sizes) for image in lq])
        if INPUT in wanted:
            yield INPUT, lq
        if AUTOENCODER in wanted:
            truth = torch.cat([pixels.prepare(picture.hq, sizes) for picture in batch])
            yield AUTOENCODER, finished(run.reconstructed(truth), sizes)
        if PLAIN in wanted:
            yield PLAIN, finished(run.reconstructed(images), sizes)
        noise = KeyedNoise(self.degrader.seed, [picture.name for picture in batch])
        latents = run.latents(images, noise)
        if ROBUST in wanted:
            yield ROBUST, finished(latents.x_stage1, sizes)
        for preset, names in alike(wanted):
            sampled = run.decode(run.sample(latents, *self.told, preset, noise, self.tile))
            results = finished(colour.match(sampled, latents.x_stage1, self.colours), sizes)
            yield from ((name, results) for name in names)


def alike(wanted: Variants) -> Iterator[tuple[Preset, list[str]]]:
    """Presets that are sampled, each once, with the variants that it makes: `restored` may have no pull either."""
    names: dict[str, list[str]] = {}
    for name, preset in wanted.items():
        if preset is not None:
            names.setdefault(preset.model_dump_json(exclude={"source"}), []).append(name)
    return ((wanted[same[0]], same) for same in names.values())


def finished(images: torch.Tensor, sizes: pixels.Plan) -> list[np.ndarray]:
    """(B, 3, H, W) in about [-1, 1] as pictures."""
    return [pixels.finish(image[None], sizes) for image in images]


def evaluate(batches: Batches, make: Maker, wanted: Variants, measures: Measures, out: Folder, shown: Sequence[str],
             watch: Callable[[int], Any]) -> None:
    """Makes and measures what is missing.

    measures: each a function of a picture and the true one; shown: pictures that are kept, for the sheet; watch: is
    told how many were measured.
    """
    for batch, missing in batches:
        for variant, results in make(batch, {name: wanted[name] for name in missing}):
            for picture, result in zip(batch, results, strict=True):
                if picture.name in shown:
                    keep(out, picture.name, TRUTH, picture.hq)
                    keep(out, picture.name, variant, result)
                batches.lines.add(picture, variant, {
                    name: float(measure(result, picture.hq)) for name, measure in measures.items()})
            watch(len(batch))


def keep(out: Folder, name: str, variant: str, image: np.ndarray) -> None:
    """Writes a picture for the sheet."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    (out / SHOWN).write(kept_as(name, variant), data.getvalue())


def kept_as(name: str, variant: str) -> str:
    return f"{name.replace('/', '_')}.{variant.replace(' ', '_')}.png"


def check_same(out: Folder, settings: dict[str, Any], write: bool = True) -> None:
    """Compares the settings of an evaluation with those of the one that is there, or writes them if there is none.

    Raises:
        ConfigError: it was made with others.
    """
    if out.exists(SETTINGS):
        try:
            there = dict(json.loads(out.read(SETTINGS)))
        except (ValueError, TypeError):
            raise ConfigError(f"{out / SETTINGS} is damaged; --overwrite begins anew") from None
        other = [key for key in settings if there.get(key) != settings[key]]
        if other:
            raise ConfigError(f"{out} holds an evaluation with another {', '.join(other)}; choose another --out, or "
                              "--overwrite what is there")
    elif write:
        out.write(SETTINGS, json.dumps(settings, indent=1, ensure_ascii=False).encode())
