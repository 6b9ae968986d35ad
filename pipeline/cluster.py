"""Runs a job's units on Ray: bounded in flight, repaired when a worker or a node dies.

Only units and outcomes travel through Ray, a few hundred bytes each; workers read and write storage
themselves. Plain tasks rather than a Ray Data pipeline, because a unit that takes its worker down must be
told apart from a node that was lost (the first is repeated row by row in isolation, the second just
repeated), and because a job must stop early when its source is rotten.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .jobs import Job, Outcome, Unit
from .pool import JobStopped, Queue, pool_outcomes, unwrapped

FORWARDED = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")


@dataclass
class Totals:
    """Sums over the outcomes of a job."""

    units: int = 0
    rows: int = 0
    failed: int = 0
    reused: int = 0
    bytes: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    restarts: int = 0               # units repeated because a worker or node died

    def add(self, outcome: Outcome) -> None:
        self.units += 1
        self.rows += outcome.rows
        self.failed += outcome.failed
        self.reused += outcome.reused
        self.bytes += outcome.bytes
        for name, count in outcome.errors.items():
            self.errors[name] = self.errors.get(name, 0) + count


class Cluster:
    """Ray, started when the first unit needs it: this machine, or the cluster at `address`."""

    def __init__(self, address: str | None = None, workers: int | None = None):
        self.address = address or os.environ.get("RAY_ADDRESS")
        self.workers = workers

    def start(self) -> None:
        import ray
        if ray.is_initialized():
            return
        # Ray's coming default, chosen now; it warns at every start otherwise.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        options = {"log_to_driver": False, "logging_level": "ERROR"}
        if self.address:
            forwarded = {name: os.environ[name] for name in FORWARDED if name in os.environ}
            ray.init(address=self.address, runtime_env={"env_vars": forwarded} if forwarded else None, **options)
        else:
            ray.init(address="local", num_cpus=self.workers, include_dashboard=False, **options)

    def stop(self) -> None:
        if "ray" in sys.modules and sys.modules["ray"].is_initialized():
            sys.modules["ray"].shutdown()

    def call(self, function: Callable, *arguments: object, num_cpus: float = 1, num_gpus: float = 0) -> object:
        """One function with all of a worker's memory to itself: for steps that see the whole corpus."""
        import ray
        self.start()
        task = ray.remote(function).options(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=3)
        return unwrapped(lambda: ray.get(task.remote(*arguments)))

    def run(self, job: Job, units: list[Unit], max_error_rate: float = 1.0,
            watch: Callable[[Totals], None] = lambda totals: None) -> Totals:
        """Runs units until all are done.

        Raises:
            JobStopped: more than `max_error_rate` of the rows failed (judged from 100 rows on), or a unit
                could not be done in five attempts.
            WorkspaceError: the workspace could not be written.
        """
        totals = Totals()
        if not units:
            return totals
        self.start()
        started = time.perf_counter()
        for outcome in self._outcomes(job, units, totals):
            totals.add(outcome)
            totals.seconds = time.perf_counter() - started
            watch(totals)
            refuse_rotten(job, totals, max_error_rate)
        return totals

    def _outcomes(self, job: Job, units: list[Unit], totals: Totals) -> Iterator[Outcome]:
        queue = Queue(job, units, totals)
        return pool_outcomes(job, queue) if job.pool else self._task_outcomes(job, queue)

    def _task_outcomes(self, job: Job, queue: Queue) -> Iterator[Outcome]:
        import ray
        work = ray.remote(_work).options(num_cpus=job.num_cpus, num_gpus=job.num_gpus, max_retries=0)
        flying: dict = {}
        try:
            while queue.waiting or flying:
                while queue.waiting and len(flying) < self._width(job):
                    unit = queue.waiting.pop()
                    flying[work.remote(job, unit, queue.suspect(unit))] = unit
                done, _ = ray.wait(list(flying), timeout=1.0)
                for reference in done:
                    unit = flying.pop(reference)
                    try:
                        yield unwrapped(lambda reference=reference: ray.get(reference))
                    except ray.exceptions.RayError as error:
                        queue.again(unit, error)
        finally:
            for reference in flying:
                ray.cancel(reference, force=True)

    def _width(self, job: Job) -> int:
        """Twice as many units in flight as the cluster can run now, so that no worker waits for the driver."""
        import ray
        have = ray.cluster_resources()
        slots = have.get("CPU", 1) / job.num_cpus if job.num_cpus else 1e9
        if job.num_gpus:
            slots = min(slots, have.get("GPU", 0) / job.num_gpus)
        return max(2, int(2 * slots))


def _work(job: Job, unit: Unit, isolate: bool) -> Outcome:
    import cv2
    cv2.setNumThreads(1)        # one core per worker: Ray counts them
    return job.run(unit, isolate)


def refuse_rotten(job: Job, totals: Totals, max_error_rate: float) -> None:
    if totals.rows >= 100 and totals.failed > max_error_rate * totals.rows:
        worst = max(totals.errors, key=totals.errors.get)
        raise JobStopped(
            f"{job.name} stopped: {totals.failed} of {totals.rows} rows failed, mostly {worst!r}, which is more "
            f"than max_error_rate = {max_error_rate:g}. Look into quarantine/{job.name}; when the source is "
            f"mended, run the same command with --retry-errors.")
