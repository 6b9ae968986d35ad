"""Files and folders through SUPIR: `clearshard restore`.

An image is done when its PNG is there, which comes last and by rename; so a run can be killed and repeated.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from degrade.strict import ConfigError
from pipeline.decode import Limits, decode
from pipeline.jobs import error_class
from pipeline.sources import SIDECARS
from pipeline.storage import TEMPORARY, WorkspaceError, commit

FORMAT = 1
NOTE = "clearshard"             # key of the settings in the PNG


@dataclass(frozen=True)
class Input:
    """A file, and the path of its result below the output folder without an extension."""

    path: Path
    name: str


@dataclass
class Totals:
    """What a run did."""

    done: int = 0
    skipped: int = 0
    seconds: float = 0.0
    refused: list[tuple[str, str, str]] = field(default_factory=list)       # name, class, message


class Restorer(Protocol):
    """Restores one picture as asked."""

    def __call__(self, image: np.ndarray, asked: dict[str, Any]) -> Any: ...


def inputs(places: Iterable[str | Path], out: Path) -> Iterator[Input]:
    """The files of folders (with subfolders) and single files, without hidden ones, sidecars and what lies in `out`.

    Raises:
        ConfigError: a place that is not there, or two inputs whose results would have one name.
    """
    taken: dict[str, Path] = {}
    for place in map(Path, places):
        if not place.exists():
            raise ConfigError(f"{place} does not exist; give image files or folders of them")
        files = [(place, place.name)] if place.is_file() else sorted(
            (file, file.relative_to(place).as_posix()) for file in place.rglob("*") if file.is_file())
        for file, name in files:
            hidden = any(part.startswith(".") for part in Path(name).parts)
            if hidden or file.suffix.lower() in SIDECARS or out.resolve() in file.resolve().parents:
                continue
            if taken.setdefault(name, file) != file:
                raise ConfigError(f"{file} and {taken[name]} would both become {name}.png; restore them one by one")
            yield Input(file, name)


def outputs(folder: Path, source: Input) -> dict[str, Path]:
    """Where the parts of a result lie: image (PNG), settings, and the first stage's preview."""
    return {"image": folder / f"{source.name}.png", "settings": folder / f"{source.name}.json",
            "stage1": folder / f"{source.name}.stage1.jpg"}


def is_done(folder: Path, source: Input, settings: dict[str, Any]) -> bool:
    """Whether the result is there, made of this file with these settings."""
    places = outputs(folder, source)
    try:
        made = json.loads(places["settings"].read_text(encoding="utf-8"))
        return places["image"].stat().st_mtime >= source.path.stat().st_mtime and made.get("asked") == settings
    except (OSError, ValueError):
        return False


def restore(sources: Iterable[Input], folder: Path, restorer: Restorer, asked: Callable[[Input], dict[str, Any]], *,
            limits: Limits, overwrite: bool = False,
            watch: Callable[[Totals, Input], None] = lambda totals, source: None) -> Totals:
    """Restores what is not done. One bad image never stops the rest. `asked`: the settings of each.

    Raises:
        ConfigError: the device cannot do it at all.
        WorkspaceError: the folder takes no more; what was finished is kept.
    """
    totals, started = Totals(), time.perf_counter()
    for source in sources:
        settings = asked(source)
        if not overwrite and is_done(folder, source, settings):
            totals.skipped += 1
            watch(totals, source)
            continue
        try:
            image = decode(source.path.read_bytes(), limits)
            restored = restorer(image, settings)
        except ConfigError:
            raise
        except Exception as error:
            totals.refused.append((source.name, error_class(error), str(error)[:300]))
        else:
            write(folder, source, restored, settings)
            totals.done += 1
        totals.seconds = time.perf_counter() - started
        watch(totals, source)
    return totals


def write(folder: Path, source: Input, restored: Any, asked: dict[str, Any]) -> None:
    """The preview, the sidecar, and last the PNG with the settings in it.

    Raises:
        WorkspaceError: names the file and the cause.
    """
    made = {"format": FORMAT, "source": str(source.path), "asked": asked, "made": restored.settings}
    text, note, picture, preview = json.dumps(made, indent=1, ensure_ascii=False), PngInfo(), io.BytesIO(), io.BytesIO()
    note.add_itxt(NOTE, text)
    Image.fromarray(restored.image).save(picture, "PNG", pnginfo=note, compress_level=4)
    Image.fromarray(restored.stage1).save(preview, "JPEG", quality=90)
    places = outputs(folder, source)
    for kind, data in (("stage1", preview.getvalue()), ("settings", text.encode()), ("image", picture.getvalue())):
        _commit(places[kind], data)


def _commit(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        commit(str(partial), str(path))
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise WorkspaceError(f"cannot write {path}: {error.strerror}. What was finished is kept: make room or mend the "
                             "permission, then run the same command again.") from None


def settings_like(path: Path) -> dict[str, Any]:
    """The settings of an earlier result, from its sidecar or its PNG.

    Raises:
        ConfigError: it is neither.
    """
    try:
        if path.suffix.lower() == ".png":
            with Image.open(path) as image:
                text = image.text[NOTE] if NOTE in getattr(image, "text", {}) else ""
        else:
            text = path.read_text(encoding="utf-8")
        found = json.loads(text)
        if found["format"] != FORMAT:
            raise ValueError(f"it is of format {found['format']}, and this program knows {FORMAT}")
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} holds no settings of a restoration ({error}); give the .json or the .png that "
                          "`clearshard restore` wrote") from None
