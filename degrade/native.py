"""Functions compiled to machine code by numba, once per machine."""

from __future__ import annotations

from collections.abc import Callable

try:
    import numba
except ImportError:                          # the torch route does without
    numba = None

# No promises about signed zeros and the order of sums, which is what vector instructions need.
OPTIONS = {"error_model": "numpy", "nogil": True, "fastmath": {"contract", "reassoc", "nsz"}}


def native(function: Callable) -> Callable:
    """Compiles at the first call and keeps the result on disk, where there is a folder that can be written to."""
    if numba is None:
        def missing(*arguments: object) -> None:
            raise ImportError(f"the CPU route of the degrader needs numba ({function.__name__}): pip install numba")
        return missing
    try:
        return numba.njit(cache=True, **OPTIONS)(function)
    except RuntimeError:                     # neither beside the source nor in the user's cache
        return numba.njit(**OPTIONS)(function)


def inlined(function: Callable) -> Callable:
    """Becomes a part of the compiled functions that call it."""
    return function if numba is None else numba.njit(inline="always")(function)
