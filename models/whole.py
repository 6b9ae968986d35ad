"""A folder that appears only when it is complete."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

REPLACED = "replaced"


@contextlib.contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A sibling folder to write into, which becomes the target at the end or, after an error, vanishes.

    One that a killed process left goes when the next starts.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}-unfinished-"
    for left in [path for path in target.parent.iterdir() if path.name.startswith(prefix)]:
        if not psutil.pid_exists(int(left.name.removeprefix(prefix).split("-")[0])):
            clear(left, target)
    made = target.parent / f"{prefix}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        made.mkdir()        # in here, so that a stop right after it is followed by the removal
        yield made
        open_to_readers(made)
        if target.exists():
            # A folder with files in it cannot be renamed over, so the old one steps aside first.
            target.rename(made / REPLACED)
        made.rename(target)
        shutil.rmtree(target / REPLACED, ignore_errors=True)
    finally:
        clear(made, target)


def clear(left: Path, target: Path) -> None:
    """Removes what an unfinished run left, and puts back a folder that was about to be replaced."""
    if (left / REPLACED).exists() and not target.exists():
        (left / REPLACED).rename(target)
    shutil.rmtree(left, ignore_errors=True)


def open_to_readers(folder: Path) -> None:
    """Files of safetensors are for their owner only; these follow the umask."""
    os.umask(mask := os.umask(0o022))
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
