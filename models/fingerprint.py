"""A folder of weights known by its content, so that results can be keyed by the model that made them."""

from __future__ import annotations

import hashlib
from pathlib import Path

READ_WHOLE = 16 << 20       # bytes; what is larger is weights, known by size, head and tail
ENDS = 64 << 10


def fingerprint(folder: str | Path) -> str:
    """12 hexadecimal digits that change when a file of the model changes; its place and dates do not matter.

    Of weights the size, the first and the last 64 KiB are read: a safetensors header holds every name, shape and place.

    Raises:
        FileNotFoundError: the folder is not there, or holds no file.
    """
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _counts(path.relative_to(folder)))
    if not files:
        raise FileNotFoundError(f"{folder} is no folder with a model in it")
    digest = hashlib.blake2b(digest_size=6)
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= READ_WHOLE:
                digest.update(file.read())
            else:
                digest.update(file.read(ENDS))
                file.seek(-ENDS, 2)
                digest.update(file.read(ENDS))
    return digest.hexdigest()


def _counts(path: Path) -> bool:
    """Not hidden files and caches, nor cards and pictures for people."""
    return not any(part.startswith(".") for part in path.parts) and path.suffix.lower() not in {".md", ".png", ".jpg"}
