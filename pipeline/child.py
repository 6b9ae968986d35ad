"""One call in a process of its own, whose memory is gone when it returns and which ends with its parent."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def in_child(function: Callable[..., T], *arguments: object) -> T:
    """`function(*arguments)`, computed in a new process; its exceptions are raised here.

    For steps of the driver that need memory for a moment. A driver that is killed takes the child along, so
    that nothing goes on writing into a workspace that another run may hold by then.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_watch, initargs=(os.getpid(),)) as pool:
        return pool.submit(function, *arguments).result()


def _watch(parent: int) -> None:
    def look() -> None:
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)
    threading.Thread(target=look, daemon=True).start()
