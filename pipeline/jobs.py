"""What a job is: pending units in, immutable parts out.

A unit is the work on one input part. `RowJob` does it row by row: a row that fails becomes a row of the
quarantine, rows that an earlier part holds already are taken over, and the part is written at the end.
Nothing here knows of Ray: `pipeline.cluster` sends units to workers.
"""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

from .isolation import Isolated, RowCrashed
from .storage import WorkspaceError
from .tables import Part, Table, digest, rows_of


class RowTimeout(Exception):
    """One row took longer than it may."""


@dataclass(frozen=True)
class Unit:
    """The work on one input part: small, plain, and the same whenever it is asked for."""

    key: str
    rows: int
    inputs: str                     # digest that the output part will carry
    parts: dict[str, Part] = field(default_factory=dict)    # read by the unit
    earlier: Part | None = None     # output of the same key that it replaces
    failed: Part | None = None      # and its quarantine
    first: int | None = None        # only so many rows (`--limit`)


@dataclass(frozen=True)
class Outcome:
    """What became of a unit."""

    key: str
    rows: int                       # done now
    failed: int = 0                 # of them now in the quarantine
    reused: int = 0                 # taken over from an earlier part
    bytes: int = 0                  # written or read, as the job counts
    errors: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Replicas:
    """How a job's pool of workers is made up."""

    count: int | None = None        # None: one per free place for its GPUs; without GPUs one
    gpus: float | None = None       # of each: a fraction or several; None: 1 where the cluster has GPUs
    depth: int = 2                  # units under way in one worker, so that the next is prepared meanwhile


class Job(ABC):
    """A stage of the corpus. Instances are small and travel to the workers."""

    name: str
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    pool: Replicas | None = None    # workers that keep a model; None: plain tasks

    @abstractmethod
    def pending(self) -> list[Unit]:
        """The units that are not done, from listings alone."""

    @abstractmethod
    def run(self, unit: Unit, isolate: bool = False) -> Outcome:
        """Does one unit in a worker. `isolate`: each row in a process of its own, for rows that crash."""

    @abstractmethod
    def rehearse(self, unit: Unit, rows: int) -> int:
        """Does at most `rows` rows without writing anything; returns how many, for the dry run's estimate."""

    @abstractmethod
    def tidy(self) -> None:
        """Removes what a killed run left; called once by the holder of the workspace."""

    def load(self) -> None:     # noqa: B027 (most jobs have nothing to load)
        """Makes a worker of the pool ready, before its first unit: loads the model."""


class RowJob(Job):
    """A job that turns each row of an input part into one row of the output part with the same key."""

    input: Table
    output: Table
    quarantine: Table
    settings: dict
    identity: str = "ref"           # column of the output that holds the input row's `ref`
    row_timeout_s: float = 120.0
    retry_errors: bool = False

    @abstractmethod
    def rows(self, unit: Unit) -> Iterable[dict]:
        """The input rows of a unit, in order; each has `ref` and `name`."""

    @abstractmethod
    def process(self, row: dict) -> dict:
        """One output row (with `ref`). Any exception puts the row into the quarantine."""

    def inputs(self) -> Iterator[tuple[str, dict[str, Part]]]:
        """Per key the parts that a unit reads; their contents decide whether its output is up to date."""
        for key, part in sorted(self.input.parts().items()):
            yield key, {"input": part}

    def settings_digest(self) -> str:
        return digest(self.name, self.settings)

    def pending(self) -> list[Unit]:
        done, failed = self.output.parts(), self.quarantine.parts()
        settings, units = self.settings_digest(), []
        for key, parts in self.inputs():
            expected = digest(settings, sorted((name, part.content) for name, part in parts.items()))
            up_to_date = key in done and done[key].inputs == expected
            if not up_to_date or (self.retry_errors and key in failed):
                units.append(Unit(key, rows_of(key), expected, parts, done.get(key), failed.get(key)))
        return units

    def tidy(self) -> None:
        self.output.tidy()
        self.quarantine.tidy()

    def rehearse(self, unit: Unit, rows: int) -> int:
        taken = list(islice(self.rows(unit), rows))
        for row in taken:
            with contextlib.suppress(Exception):
                self.process(row)
        return len(taken)

    def run(self, unit: Unit, isolate: bool = False) -> Outcome:
        rows, earlier = list(self.rows(unit)), self._earlier(unit)
        refused = {} if self.retry_errors else earlier.failed
        held = {row["ref"]: self.renewed(row, earlier.rows.get(row["ref"])) for row in rows}
        allowed = rows if unit.first is None else rows[:unit.first]
        fresh = [row for row in allowed if held[row["ref"]] is None and row["ref"] not in refused]
        results = dict(self.attempts(fresh, isolate))
        good, bad = [], []
        for ref in held:
            result, refusal = results.get(ref) or (held[ref], refused.get(ref))
            if result is None and refusal is None:
                result = earlier.rows.get(ref)      # beyond the limit: what other settings made is better than nothing
            good.extend([result] if result else [])
            bad.extend([refusal] if refusal else [])
        self._write(unit, good, bad)
        new_failures = [failure for _, failure in results.values() if failure]
        return Outcome(unit.key, len(fresh), len(new_failures), len(allowed) - len(fresh), 0, tally(new_failures))

    def attempts(self, rows: list[dict], isolate: bool) -> Iterator[tuple[str, Attempt]]:
        """Per row its `ref` and what became of it."""
        with self._runner(isolate) as call:
            for row in rows:
                yield row["ref"], attempt(call, row, self.name)

    def renewed(self, row: dict, earlier: dict | None) -> dict | None:
        """The earlier output row, if it still is what `process(row)` would give."""
        return earlier

    def _earlier(self, unit: Unit) -> Earlier:
        """What older parts of the same key hold that still counts."""
        return Earlier({row[self.identity]: row for row in self._earlier_rows(unit.earlier)},
                       {row["ref"]: row for row in self._read(self.quarantine, unit.failed, self.settings_digest())})

    def _earlier_rows(self, part: Part | None) -> list[dict]:
        return self._read(self.output, part, self.settings_digest())

    def _read(self, table: Table, part: Part | None, settings: str | None = None) -> list[dict]:
        """The rows of an older part, if it was made with these settings; None: with any."""
        if part is None:
            return []
        try:
            same = settings is None or table.metadata(part).get("settings") == settings
            return table.read(part).to_pylist() if same else []
        except FileNotFoundError:       # this unit was done before and its worker died before it could say so
            return []

    def _write(self, unit: Unit, good: list[dict], bad: list[dict]) -> None:
        # The quarantine goes first: once the output part exists, the unit counts as done.
        inputs = unit.inputs if unit.first is None else digest(unit.inputs, unit.first)
        settings = self.settings_digest()
        if bad:
            self.quarantine.write(unit.key, inputs, bad, replaces=unit.failed, settings=settings)
        self.output.write(unit.key, inputs, good, replaces=unit.earlier, settings=settings)
        if unit.failed is not None and not bad:
            self.quarantine.folder.delete(unit.failed.file)

    def _runner(self, isolate: bool) -> contextlib.AbstractContextManager[Callable[[dict], dict]]:
        return (Isolated if isolate else Timed)(self.process, self.row_timeout_s)


@dataclass(frozen=True)
class Earlier:
    """Rows of an older part that still hold."""

    rows: dict[str, dict]           # by the ref of their input row
    failed: dict[str, dict]


Attempt = tuple[dict | None, dict | None]       # (result, None) or (None, quarantine row)


def attempt(call: Callable[[dict], dict], row: dict, stage: str) -> Attempt:
    """(result, None), or (None, quarantine row) if the call raised."""
    try:
        return call(row), None
    except WorkspaceError:
        raise
    except Exception as error:
        return None, failure(row, stage, error)


def failure(row: dict, stage: str, error: Exception) -> dict:
    """The quarantine row of an error."""
    return {"ref": row["ref"], "name": row.get("name"), "stage": stage,
            "error": error_class(error), "message": f"{error}"[:500]}


def error_class(error: BaseException) -> str:
    """The short class of an error for the quarantine table and the report."""
    for kind, name in ((RowTimeout, "timeout"), (RowCrashed, "crashed"), (FileNotFoundError, "not_found"),
                       (PermissionError, "permission"), (IsADirectoryError, "is_a_folder"),
                       (EOFError, "truncated"), (MemoryError, "out_of_memory")):
        if isinstance(error, kind):
            return name
    return getattr(error, "reason", None) if isinstance(getattr(error, "reason", None), str) \
        else type(error).__name__


def tally(failures: list[dict]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in failures:
        counts[row["error"]] = counts.get(row["error"], 0) + 1
    return counts


class Timed:
    """`with Timed(process, limit_s) as call: call(row)`: each call ends within a time limit.

    A signal interrupts Python code. A decoder that hangs in C does not see it: then the process ends itself
    a while after the limit, and the unit is repeated in isolation. Off the main thread there is no limit.

    Raises (by `call`):
        RowTimeout: the limit was reached.
    """

    def __init__(self, process: Callable[[dict], dict], limit_s: float):
        self.process, self.limit_s, self.armed = process, limit_s, 0.0
        self.able = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Callable[[dict], dict]:
        if self.able:
            self.previous = signal.signal(signal.SIGALRM, self._interrupt)
        return self._call if self.able else self.process

    def __exit__(self, *_: object) -> None:
        if self.able:
            faulthandler.cancel_dump_traceback_later()
            signal.signal(signal.SIGALRM, self.previous)

    def _interrupt(self, *_: object) -> None:
        raise RowTimeout(f"took longer than {self.limit_s:g} seconds")

    def _call(self, row: dict) -> dict:
        # Arming starts a thread, half a millisecond: done anew only when a quarter of the limit has gone by.
        if time.monotonic() - self.armed > 0.25 * self.limit_s:
            faulthandler.dump_traceback_later(1.75 * self.limit_s, exit=True)
            self.armed = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, self.limit_s)
        try:
            return self.process(row)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def limited(units: list[Unit], limit: int | None) -> list[Unit]:
    """The first units that make up `limit` rows; the last one is cut."""
    if limit is None:
        return units
    taken: list[Unit] = []
    for unit in units:
        if limit <= 0:
            break
        taken.append(unit if unit.rows <= limit else replace(unit, first=limit))
        limit -= unit.rows
    return taken


@dataclass
class Estimate:
    """What a dry run says."""

    units: int
    rows: int
    sampled: int
    seconds_per_row: float | None


def estimate(job: Job, units: list[Unit], sample: int = 8) -> Estimate:
    """Times a few rows, spread over the pending units, without writing anything."""
    picked = units[:: max(1, len(units) // 4)][:4]
    done, started = 0, time.perf_counter()
    for unit in picked:
        done += job.rehearse(unit, max(1, sample // len(picked)))
    seconds = (time.perf_counter() - started) / done if done else None
    return Estimate(len(units), sum(unit.rows for unit in units), done, seconds)
