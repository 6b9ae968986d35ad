"""Work that runs ahead of a model, on CPUs of its own: neither waits for the other.

Called in a worker of a pool, batches are prepared by Ray's CPU workers anywhere in the cluster, a few ahead of the one
that is being used. Outside Ray (tests, a library call) the same code runs on the spot.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .isolation import RowCrashed
from .jobs import failure


@dataclass
class Batch:
    """Rows that are ready, and those that could not be made ready."""

    rows: list[dict] = field(default_factory=list)
    inputs: Any = None
    failed: list[tuple[dict, Exception]] = field(default_factory=list)

    def failures(self, stage: str) -> Iterator[tuple[dict, dict]]:
        """Each row that failed with its quarantine row."""
        return ((row, failure(row, stage, error)) for row, error in self.failed)


Prepare = Callable[[list[dict]], Batch]


def ahead(prepare: Prepare, batches: Iterable[list[dict]], depth: int = 4) -> Iterator[Batch]:
    """`prepare(rows)` for each batch, in order, at most `depth` of them before they are asked for.

    A batch that takes its worker down is prepared again row by row, and the culprit fails as `RowCrashed`.
    """
    if not _in_ray():
        yield from map(prepare, batches)
        return
    import ray
    prepared = ray.remote(_prepare)
    task = prepared.options(num_cpus=1, max_retries=2)
    source, waiting, given = iter(batches), deque(), ray.put(prepare)
    while True:
        while len(waiting) < depth and (rows := next(source, None)) is not None:
            waiting.append((rows, task.remote(given, rows)))
        if not waiting:
            return
        rows, reference = waiting.popleft()
        try:
            batch = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except ray.exceptions.RayError:
            yield from _one_by_one(prepared.options(num_cpus=1, max_retries=0), given, rows)
        else:
            yield batch
        del reference       # frees the tensors before the next are waited for


def _in_ray() -> bool:
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def _prepare(prepare: Prepare, rows: list[dict]) -> Batch:
    import cv2
    cv2.setNumThreads(1)
    return prepare(rows)


def _one_by_one(task: Any, given: Any, rows: list[dict]) -> Iterator[Batch]:
    import ray
    for row in rows:
        try:
            yield ray.get(task.remote(given, [row]))
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except ray.exceptions.RayError:
            died = RowCrashed("the worker that prepared it died: its decoder crashed, or there was no memory")
            yield Batch(failed=[(row, died)])
