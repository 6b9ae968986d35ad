"""Worker processes for images, where a process that dies costs one image."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import forkserver
from multiprocessing.context import BaseContext

from .degraded_image import Found, Maker, Outcome, single_threaded

AHEAD = 2               # images under way or waiting, per worker
DIED = ("worker_died", "the process that degraded it ended: killed, out of memory, or crashed by the image; "
                       "try fewer --workers or a lower --max-pixels")


def outcomes(maker: Maker, images: Iterable[Found], workers: int) -> Iterator[Outcome]:
    """What becomes of each image, in the order of the images; a few per worker are taken from them at a time."""
    images, waiting = iter(images), deque()
    for first in images:            # with nothing to do no process is started
        images = chain([first], images)
        try:
            with pool(workers) as processes:
                while True:
                    for found in islice(images, AHEAD * workers - len(waiting)):
                        waiting.append((found, None))           # first, so that it is not lost if the pool is broken
                        waiting[-1] = found, processes.submit(maker, found)
                    if not waiting:
                        return
                    outcome = waiting[0][1].result()
                    waiting.popleft()
                    yield outcome
        except BrokenProcessPool:
            # All that were waiting fail with the one that was to blame; each by itself shows which it was.
            yield from one_by_one(maker, waiting)
            waiting = deque()


def one_by_one(maker: Maker, waiting: Iterable[tuple[Found, Future | None]]) -> Iterator[Outcome]:
    """The images of a broken pool, with at most one in a process at any time."""
    left = deque(waiting)
    while left:
        with contextlib.suppress(BrokenProcessPool), pool(1) as processes:
            while left:
                found, future = left[0]
                finished = future is not None and not future.cancelled() and not future.exception()
                try:
                    outcome = future.result() if finished else processes.submit(maker, found).result()
                except BrokenProcessPool:
                    left.popleft()
                    yield Outcome(found, *DIED)
                    raise
                left.popleft()
                yield outcome


def prepared() -> BaseContext:
    """Starts the server that workers are forked from, and does not wait for it: it takes seconds to load torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__, "degrade.degrader"])
    with _interrupts(signal.SIG_IGN):       # inherited by the server, and from it by the workers
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that leave Ctrl-C to this one, and end with it however it ends."""
    context = prepared()
    processes, interrupted = ProcessPoolExecutor(workers, mp_context=context, initializer=_start), []
    try:
        with _interrupts(lambda *_: interrupted.append(True)):      # half a start would leave workers with nothing
            processes.submit(int)
        if interrupted:
            raise KeyboardInterrupt
        yield processes
    finally:
        processes.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _interrupts(handler: Callable | signal.Handlers) -> Iterator[None]:
    """Meanwhile Ctrl-C and SIGTERM go to this handler; in threads, which get none, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def _start() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    single_threaded()

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=follow, daemon=True).start()
