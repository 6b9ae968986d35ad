"""A pool of Ray actors for jobs that keep a model: units go to whichever worker has room.

The pool grows while units wait and the cluster has room, replaces workers that die, and lets go of those that have
nothing left to do, so that their GPUs are free for others before the slowest worker has ended.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .jobs import Job, Outcome, Unit

if TYPE_CHECKING:
    from .cluster import Totals

ATTEMPTS = 5
LOADS = 3               # workers in a row that died while they loaded
LOOK_EVERY_S = 2.0      # at what the cluster has


class JobStopped(RuntimeError):
    """A job ended before all its units were done; what was finished is kept."""


@dataclass
class Queue:
    """The units of a job that wait, and how often each took its worker down."""

    job: Job
    units: list[Unit]
    totals: Totals
    attempts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.waiting = list(reversed(self.units))

    def suspect(self, unit: Unit) -> bool:
        """Whether the unit took workers down before, and is to be done row by row in isolation."""
        return self.attempts.get(unit.key, 0) >= 2

    def again(self, unit: Unit, error: Exception, blamed: bool = True) -> None:
        """A worker or node died: the unit waits again, at the head; `blamed`: it may have been the cause.

        Raises:
            JobStopped: for the fifth time.
        """
        self.totals.restarts += 1
        self.waiting.append(unit)
        self.attempts[unit.key] = self.attempts.get(unit.key, 0) + blamed
        if self.attempts[unit.key] >= ATTEMPTS:
            raise JobStopped(f"{self.job.name}: unit {unit.key} took its worker down {ATTEMPTS} times, in isolation"
                             f" too ({type(error).__name__}). Is there enough memory for each worker? "
                             "`--workers` runs fewer at once.") from error


class Worker:
    """What runs in an actor: the job's own code, with units side by side in threads."""

    def load(self, job: Job) -> str:
        """Makes the worker ready; returns the node that it is on."""
        import cv2
        import ray
        cv2.setNumThreads(1)
        job.load()
        return ray.get_runtime_context().get_node_id()

    def run(self, job: Job, unit: Unit, isolate: bool) -> Outcome:
        return job.run(unit, isolate)


@dataclass(eq=False)
class Member:
    """An actor as the pool sees it."""

    actor: Any
    node: str | None = None         # None: it is loading
    units: int = 0                  # under way


def pool_outcomes(job: Job, queue: Queue) -> Iterator[Outcome]:
    """Runs the queue's units in a pool; yields outcomes as they come."""
    pool = Pool(job, queue)
    try:
        while queue.waiting or pool.flying:
            pool.resize()
            pool.assign()
            yield from pool.finished()
    finally:
        pool.end()


class Pool:
    """The actors of one job, and what each is doing."""

    def __init__(self, job: Job, queue: Queue) -> None:
        self.job, self.queue = job, queue
        self.members: list[Member] = []
        self.flying: dict[Any, tuple[Member, Unit | None]] = {}     # reference: who, and on what (None: loading)
        self.looked, self.wanted, self.failed_loads = float("-inf"), 0, 0

    def resize(self) -> None:
        """As many actors as there is room and work for."""
        if time.monotonic() - self.looked >= LOOK_EVERY_S:
            self.looked, self.wanted = time.monotonic(), self._room()
        work = len(self.queue.waiting)
        while work and len(self.members) < min(self.wanted, work + self._busy()):
            self._start()
        for member in [m for m in self.members if m.node and not m.units and not work]:
            self._stop(member)

    def _busy(self) -> int:
        return sum(bool(member.units) for member in self.members)

    def _room(self) -> int:
        """How many actors to have.

        Raises:
            JobStopped: the job needs GPUs and the cluster has too few.
        """
        import ray
        replicas, have = self.job.pool, ray.cluster_resources().get("GPU", 0)
        self.gpus = float(bool(have)) if replicas.gpus is None else replicas.gpus
        if replicas.count is not None:
            return replicas.count
        if not self.gpus:
            return 1
        # Several GPUs of one worker lie on one node.
        room = sum(int(node["Resources"].get("GPU", 0) / self.gpus + 1e-6) for node in ray.nodes() if node["Alive"])
        if not room and not self.members:
            raise JobStopped(
                f"{self.job.name}: each worker asks for {self.gpus:g} GPUs, and no node of the cluster has as many (in "
                f"all there are {have:g}). Ask for fewer (`gpus`), set `replicas` to wait for nodes to come, or run "
                "where there are GPUs.")
        return room

    def _start(self) -> None:
        import ray
        actor = ray.remote(Worker).options(num_cpus=0, num_gpus=self.gpus, max_restarts=0, scheduling_strategy="SPREAD",
                                           max_concurrency=self.job.pool.depth + 1).remote()
        member = Member(actor)
        self.members.append(member)
        self.flying[actor.load.remote(self.job)] = member, None

    def _stop(self, member: Member) -> None:
        import ray
        self.members.remove(member)
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(member.actor)

    def assign(self) -> None:
        """Gives units to the least busy; towards the end one each, so that no unit waits behind a slow worker."""
        ready = [member for member in self.members if member.node]
        while self.queue.waiting and ready:
            member = min(ready, key=lambda one: one.units)
            depth = self.job.pool.depth if len(self.queue.waiting) > len(ready) else 1
            suspect = self.queue.suspect(self.queue.waiting[-1])
            if member.units >= (1 if suspect else depth):
                return
            unit = self.queue.waiting.pop()
            member.units += 1
            self.flying[member.actor.run.remote(self.job, unit, suspect)] = member, unit

    def finished(self) -> Iterator[Outcome]:
        """What has ended, after waiting a moment for it."""
        import ray
        if not self.flying:
            time.sleep(0.1)
            return
        done, _ = ray.wait(list(self.flying), timeout=1.0)
        for reference in done:
            member, unit = self.flying.pop(reference)
            member.units -= unit is not None
            try:
                result = unwrapped(lambda reference=reference: ray.get(reference))
            except ray.exceptions.RayError as error:
                self._lost(member, unit, error)
                continue
            if unit is None:
                member.node, self.failed_loads = result, 0
            else:
                yield result

    def _lost(self, member: Member, unit: Unit | None, error: Exception) -> None:
        """The actor is gone; its other units come here one by one.

        Raises:
            JobStopped: workers die again and again.
        """
        import ray
        if member in self.members:
            self._stop(member)
        alive = any(node["NodeID"] == member.node and node["Alive"] for node in ray.nodes())
        if unit is not None:
            self.queue.again(unit, error, blamed=alive)
            return
        self.failed_loads += 1
        if self.failed_loads >= LOADS:
            raise JobStopped(f"{self.job.name}: {LOADS} workers in a row died while they loaded the model "
                             f"({type(error).__name__}). Is there enough memory on their nodes?") from error

    def end(self) -> None:
        for member in list(self.members):
            self._stop(member)


def unwrapped(get: Callable[[], object]) -> object:
    """A task's result; an exception of our own code comes out as itself, without Ray's wrapping."""
    import ray
    try:
        return get()
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(getattr(error, "cause", None), Exception) else error
        raise cause from None
