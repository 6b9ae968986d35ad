"""What can be said of a folder of SUPIR without loading a network: its index, its licence, its files of weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .checkpoint import CheckpointError

INDEX = "supir.json"
LICENCE = ("The weights that the authors of SUPIR published may be used for non-commercial purposes only (SUPIR "
           "software licence, SupPixel, 2024), and its terms name hosting, and training on outputs, as commercial. "
           "They stay under that licence in this folder, whatever the licence of the program that reads them.")
UNKNOWN = "unknown: whoever made the checkpoint decides"


def read_index(folder: Path) -> dict[str, Any]:
    """What `supir.json` says.

    Raises:
        CheckpointError: no such folder, not complete, damaged, or of a later version.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if index["format"] != 1:
            raise CheckpointError(f"{folder / INDEX} has format {index['format']}, which a later version wrote")
        if not isinstance(index["prior"], str):
            raise TypeError('a place of its prior: "prior" is no text')
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder} has no {INDEX}: it is no SUPIR folder, or the command that made it was "
                              "stopped. Make one with `clearshard models import-supir`") from None
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / INDEX} lacks {error}") from None
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{folder / INDEX} is damaged: {error}") from None
    return index


def weight_files(part: Path) -> dict[str, list[Path]]:
    """The .safetensors of a part by variant, such as fp16; the plain ones, whole or in shards, are those of ""."""
    found: dict[str, list[Path]] = {}
    for path in sorted(part.glob("*.safetensors")):
        named = re.fullmatch(r"[^.]+\.(.+?)(-\d+-of-\d+)?\.safetensors", path.name)
        found.setdefault(named[1] if named else "", []).append(path)
    return found


def stored_variant(part: Path, wanted: str | None = None) -> str | None:
    """The wanted variant where a part has it; else None for plain weights, or the one variant that it has."""
    found = weight_files(part)
    return wanted if wanted in found else None if "" in found else next(iter(found), None)
