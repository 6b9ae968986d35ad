"""A folder of images in, a folder of their low-quality partners out: `clearshard degrade`.

Every image is one unit: its result is there whole or not at all, and depends on its path, its pixels and the settings
only. So what is pending is what has no result yet, and any run can be killed and repeated.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TextIO

import yaml

from .cluster import Totals
from .config import ConfigError
from .degraded_image import SETTINGS, UNFINISHED, Found, Maker, Outcome, single_threaded
from .degraded_sheet import PAGE, Chosen, write_sheet
from .degraded_workers import outcomes
from .lock import Lock
from .stages import Show
from .storage import Folder

RECIPE, REFUSED = "recipe.yaml", "refused.jsonl"
REHEARSED = 8           # images that a dry run times
LISTED = 20             # refused images that are told; all are in the file


@dataclass
class Result:
    """What a run found and did."""

    done_before: int = 0
    totals: Totals = field(default_factory=Totals)          # of this run
    refused: list[Outcome] = field(default_factory=list)    # the first of them
    sheet: str | None = None

    @property
    def written(self) -> int:
        """Images that have a result now."""
        return self.done_before + self.totals.rows - self.totals.failed


@dataclass
class FolderJob:
    """One command on one folder."""

    maker: Maker
    workers: int = 1
    sheet: bool = False
    overwrite: bool = False
    show: Show = field(default_factory=Show)
    name = "degrade"

    def run(self, command: str = "clearshard degrade") -> Result:
        """Does what is pending.

        Raises:
            ConfigError: the output folder was made with other settings, or not by this command; or the recipe cannot
                be used.
            WorkspaceBusy: another run holds the output folder.
            WorkspaceError: the output folder cannot be written.
        """
        output = Folder.at(self.maker.output)
        check(self.maker, self.overwrite)
        with Lock(output / ".degraded", command):
            claim(self.maker)
            os.makedirs(os.path.join(self.maker.output, UNFINISHED), exist_ok=True)
            (output / ".degraded" / "unfinished").sweep()
            self.show.begin(self, sum(not self.maker.done(found) for found in self.maker.walk()))
            try:
                result, chosen = self._make()
            finally:
                self.show.end()
            if self.sheet and result.written:
                result.sheet = write_sheet(self.maker, chosen.sorted(), result.written, result.totals.failed)
            return result

    def rehearse(self) -> tuple[int, int, float | None]:
        """How many images are done, how many are pending, and seconds of one core per image; writes nothing."""
        check(self.maker, self.overwrite)
        changed = bool(differences(self.maker))
        done, seconds = 0, []
        single_threaded()
        pending = 0
        for found in self.maker.walk():
            if not changed and self.maker.done(found):
                done += 1
                continue
            pending += 1
            if len(seconds) < REHEARSED:
                with contextlib.suppress(Exception):        # the run itself says what is wrong with an image
                    started = time.perf_counter()
                    self.maker.degraded(found)
                    seconds.append(time.perf_counter() - started)
        return done, pending, sum(seconds) / len(seconds) if seconds else None

    def _make(self) -> tuple[Result, Chosen]:
        result, chosen, started = Result(), Chosen(), time.perf_counter()
        refused = os.path.join(self.maker.output, REFUSED)
        unfinished = os.path.join(self.maker.output, UNFINISHED, REFUSED)
        with open(unfinished, "w", encoding="utf-8") as log, contextlib.closing(
                outcomes(self.maker, self._pending(result, chosen), self.workers)) as stream:
            for outcome in stream:
                result.totals.seconds = time.perf_counter() - started
                result.totals.rows += 1
                if outcome.reason is None:
                    chosen.offer(outcome.found)
                else:
                    _refuse(result, outcome, log)
                self.show.advance(result.totals)
        os.replace(unfinished, refused)
        if not result.totals.failed:
            os.unlink(refused)
        return result, chosen

    def _pending(self, result: Result, chosen: Chosen) -> Iterator[Found]:
        for found in self.maker.walk():
            if self.maker.done(found):
                result.done_before += 1
                chosen.offer(found)
            else:
                yield found


def _refuse(result: Result, outcome: Outcome, log: TextIO) -> None:
    result.totals.failed += 1
    result.totals.errors[outcome.reason] = result.totals.errors.get(outcome.reason, 0) + 1
    if len(result.refused) < LISTED:
        result.refused.append(outcome)
    row = {"key": outcome.found.key, "reason": outcome.reason, "message": outcome.message}
    log.write(json.dumps(row, ensure_ascii=False) + "\n")


# The output folder ------------------------------------------------------------------------------------------

def stated(maker: Maker) -> dict[str, object]:
    """What the output folder says about itself, but for the recipe, which has a file of its own."""
    settings = asdict(maker.settings)
    return {"images": os.path.abspath(maker.images)} | {
        name: settings[name] for name in ("seed", "epoch", "compat", "crop")}


def differences(maker: Maker) -> list[str]:
    """How the settings of the output folder differ from the wanted ones; [] if it is new or the same."""
    from degrade import load_recipe
    try:
        with open(os.path.join(maker.output, SETTINGS), encoding="utf-8") as file:
            there = yaml.safe_load(file)
        if not isinstance(there, dict):
            raise ValueError
        recipe = load_recipe(os.path.join(maker.output, RECIPE))
    except FileNotFoundError:
        return []
    except (ConfigError, ValueError, yaml.YAMLError):
        return [f"{SETTINGS} and {RECIPE} there cannot be read"]
    wanted, new = load_recipe(yaml.safe_load(maker.settings.recipe)), stated(maker)
    found = [f"{name}: {there.get(name)} there, {new[name]} now" for name in new if there.get(name) != new[name]]
    if recipe != wanted:
        also = "" if recipe.name != wanted.name else ", with other values"
        found.insert(0, f"recipe: {recipe.name} there, {wanted.name} now{also}")
    return found


def check(maker: Maker, overwrite: bool) -> None:
    """Refuses a folder of images that is not there, and an output folder that holds something else."""
    if not os.path.exists(maker.images):
        raise ConfigError(f"{maker.images} does not exist; give a folder of images, or one image")
    try:
        maker.output.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{maker.output!a} is no UTF-8; choose another folder for the results") from None
    if os.path.exists(maker.output) and not os.path.isdir(maker.output):
        raise ConfigError(f"{maker.output} is a file; OUT is a folder")
    names = [] if not os.path.exists(maker.output) else [n for n in os.listdir(maker.output) if not n.startswith(".")]
    if names and SETTINGS not in names and names != [RECIPE]:
        raise ConfigError(f"{maker.output} is not empty and was not made by this command (it has no {SETTINGS}); "
                          "choose another folder")
    if (found := differences(maker)) and not overwrite:
        raise ConfigError(f"{maker.output} was made with other settings ({'; '.join(found)}). Choose another folder, "
                          "or --overwrite to delete its images and make them anew.")


def claim(maker: Maker) -> None:
    """Makes the output folder this run's: what other settings made is deleted, and the settings are written."""
    if differences(maker):
        discard(maker.output)
    elif os.path.exists(os.path.join(maker.output, SETTINGS)):
        return
    folder = Folder.at(maker.output)
    folder.write(RECIPE, maker.settings.recipe.encode())
    text = "# How these images were made; the recipe is beside. `clearshard degrade` reads it, and mixes no settings.\n"
    folder.write(SETTINGS, (text + yaml.safe_dump(stated(maker), sort_keys=False)).encode())


def discard(output: str) -> None:
    """Deletes the images of other settings; killed in the middle, the same command goes on with it."""
    for folder, _, names in os.walk(output):
        known = set(names)
        for name in names:
            if name.endswith(".png") and (beside := f"{name[:-4]}.json") in known:
                os.unlink(os.path.join(folder, name))
                os.unlink(os.path.join(folder, beside))
    for name in (PAGE, REFUSED):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(output, name))
