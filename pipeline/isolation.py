"""Calls in a process of their own, for the image that takes its decoder down with it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool


class RowCrashed(Exception):
    """The process that worked on a row died (segmentation fault, out of memory)."""


class Isolated:
    """`with Isolated(function, limit_s) as call: call(row)`: a crash or a hang costs one row.

    One child process serves row after row; when it dies or exceeds the limit, the row in its hands is the
    culprit and the next row gets a new child.

    Raises (by `call`):
        RowCrashed: the child died, or hung for longer than `limit_s`.
    """

    def __init__(self, function: Callable[[dict], dict], limit_s: float):
        self.function, self.limit_s, self.pool = function, limit_s, None

    def __enter__(self) -> Callable[[dict], dict]:
        return self._call

    def __exit__(self, *_: object) -> None:
        self._end()

    def _call(self, row: dict) -> dict:
        if self.pool is None:
            self.pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
            self.pool.submit(callable, self.function).result()      # start and imports do not count towards the limit
        try:
            return self.pool.submit(self.function, row).result(timeout=self.limit_s)
        except BrokenProcessPool:
            self._end()
            raise RowCrashed("the decoder crashed its process on this file") from None
        except TimeoutError:
            self._end()
            raise RowCrashed(f"hung for longer than {self.limit_s:g} seconds") from None

    def _end(self) -> None:
        if self.pool is not None:
            for process in list((self.pool._processes or {}).values()):
                process.kill()
            self.pool.shutdown(wait=False, cancel_futures=True)
            self.pool = None
