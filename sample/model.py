"""Which SUPIR restores, the one that is named or the small one that comes with the program; and what it asks for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

import models
from degrade.strict import ConfigError, Strict, check
from models.supir_index import INDEX, read_index

if TYPE_CHECKING:
    from .presets import Preset

EMBEDDED = Path(models.__file__).parent / "embedded"
WEIGHTS = "docs/supir_weights.md"
PRESET, SCALE, SHORT = "quality", 2.0, 1024         # where neither user nor model says otherwise


class Recommended(Strict):
    """What a model's `supir.json` may say about its use, beside what it is."""

    about: str | None = Field(None, description="what the model is, in half a sentence")
    preset: str | dict[str, Any] | None = Field(None, description="its name; or {name: …} with changed figures")
    short: int | None = Field(None, ge=64, description="pixels of the shorter side at which it was trained")
    scale: float | None = Field(None, ge=0.1, le=16, description="how much larger its results are")


def find(model: Path | None) -> Path:
    """The folder that was named, or the embedded one.

    Raises:
        ConfigError: none was named, and this installation has none.
    """
    if model is None and not (EMBEDDED / INDEX).is_file():
        raise ConfigError(f"no --model is given, and this installation has none of its own ({EMBEDDED} is not there). "
                          f"Give a SUPIR folder: `clearshard models import-supir` makes one of the published weights, "
                          f"see {WEIGHTS}")
    return EMBEDDED if model is None else model


def introduced(folder: Path) -> str:
    """One line about the embedded model."""
    about = recommended(folder).about or "a small SUPIR trained by this project"
    return f"no --model: {about}, for a first look; for real work import the authors' weights, see {WEIGHTS}"


def recommended(folder: Path) -> Recommended:
    """What the model's index recommends.

    Raises:
        CheckpointError: it is no SUPIR folder.
        ConfigError: a value that cannot be; names the file and the key.
    """
    index = read_index(folder)
    return check(Recommended, {key: index[key] for key in Recommended.model_fields if key in index},
                 str(folder / INDEX))


def preset_of(folder: Path, name: str | None = None, changes: dict[str, Any] | None = None,
              where: str = "command line") -> Preset:
    """The named preset, or the one that the model recommends, or `quality`; with the changes.

    Raises:
        ConfigError: an unknown preset or figure, in the arguments or in the model's index.
        CheckpointError: it is no SUPIR folder.
    """
    from .presets import choose
    base = choose(name, where=where) if name else resolved(recommended(folder).preset or PRESET, str(folder / INDEX))
    return choose(base, changes, where)


def resolved(preset: str | dict[str, Any], where: str) -> Preset:
    """What is recommended, as a preset. where: from, for errors and sources.

    Raises:
        ConfigError: an unknown preset or figure, or no name.
    """
    from .presets import choose
    own = {"name": preset} if isinstance(preset, str) else preset
    if not isinstance(own.get("name"), str):
        raise ConfigError(f"{where}: preset has no name; write one, such as {{\"name\": \"{PRESET}\", …}}")
    return choose(own["name"], {key: value for key, value in own.items() if key != "name"}, f"{where}: preset")
