"""Checkpoints: `checkpoints/step-N/`, written while training goes on, there from one moment to the next or not at all.

Every rank writes its pieces into `step-N.partial`; when all are there, the first writes `state.json` and renames the
folder. A kill leaves the previous checkpoint, and a partial one that the next start removes.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .pieces import Damaged, Piece, Pieces, replace, write
from .ranks import PATIENCE, Ranks

log = logging.getLogger(__name__)
STATE, PARTIAL = "state.json", ".partial"
LOOK_S = 0.05


@dataclass(frozen=True)
class Checkpoint:
    """One that is complete."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]

    def pieces(self) -> Pieces:
        return Pieces(self.folder, self.state["ranks"])


class Checkpoints:
    """The checkpoints of a run, of which one at a time is written in the background.

    folder: on a disk that all ranks share; keep: how many of the last stay; milestone: images of whose multiples each
    stays.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep: int = 3, milestone: int | None = None) -> None:
        self.folder, self.ranks, self.keep, self.milestone = folder, ranks, keep, milestone
        self.writing: threading.Thread | None = None
        self.failed: BaseException | None = None
        if ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"*{PARTIAL}"):
                shutil.rmtree(left)
        ranks.barrier()

    def all(self) -> list[Checkpoint]:
        """Those that are complete, oldest first."""
        return [Checkpoint(path, json.loads((path / STATE).read_text(encoding="utf-8")))
                for path in sorted(self.folder.glob("step-*")) if not path.name.endswith(PARTIAL)
                and (path / STATE).is_file()]

    def latest(self) -> tuple[Checkpoint, Pieces] | None:
        """The last one whose files are whole."""
        for found in reversed(self.all()):
            try:
                return found, found.pieces()
            except Damaged as error:
                log.warning("%s is passed over: %s", found.folder.name, error)
        return None

    def save(self, state: dict[str, Any], pieces: Mapping[str, Piece]) -> None:
        """Writes in the background; `pieces` are this rank's, on the host, and nobody changes them any more.

        Raises:
            RuntimeError: the one before could not be written.
        """
        self.wait()
        partial = self.folder / f"step-{state['step']:09d}{PARTIAL}"
        partial.mkdir(parents=True, exist_ok=True)
        state = state | {"format": 1, "ranks": self.ranks.count}
        self.writing = threading.Thread(target=self._write, args=(partial, state, pieces), daemon=True,
                                        name="checkpoint")
        self.writing.start()

    def wait(self) -> None:
        """Until what is being written is there.

        Raises:
            RuntimeError: it could not be written.
        """
        if self.writing is not None:
            self.writing.join()
            self.writing = None
        if self.failed is not None:
            failed, self.failed = self.failed, None
            raise RuntimeError(f"the checkpoint could not be written: {failed}") from failed

    def _write(self, partial: Path, state: dict[str, Any], pieces: Mapping[str, Piece]) -> None:
        try:
            write(partial, self.ranks.rank, pieces)
            if self.ranks.first:
                self._commit(partial, state)
        except BaseException as error:
            self.failed = error

    def _commit(self, partial: Path, state: dict[str, Any]) -> None:
        until = time.monotonic() + PATIENCE.total_seconds()
        while missing := [rank for rank in range(self.ranks.count) if not (partial / f"rank-{rank}.json").is_file()]:
            if time.monotonic() > until:
                raise TimeoutError(f"ranks {missing} have not written their part of {partial}: is {self.folder} on a "
                                   "disk that all ranks share?")
            time.sleep(LOOK_S)
        replace(partial / STATE, json.dumps(state, indent=1))
        whole = partial.with_name(partial.name.removesuffix(PARTIAL))
        if whole.exists():          # written before, damaged since, and passed over when the run went on
            shutil.rmtree(whole)
        partial.rename(whole)
        self._thin()

    def _thin(self) -> None:
        for old in self.all()[:-self.keep]:
            if not (self.milestone and old.state["images"] % self.milestone == 0):
                shutil.rmtree(old.folder)
