"""Releases the OpenMP pool of a thread that will not compute for a while.

Every thread that computes has a pool of its own. If the pools have more threads than there are processors, GNU OpenMP
stops spinning between operations: its threads sleep and are woken for the next operation. A token then takes half as
long again, even if the other pool is idle. So a thread releases its pool before it hands work to another.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

HARD = 2  # omp_pause_hard of OpenMP 5.0: nothing is kept


def dismiss() -> None:
    """Releases this thread's pool; its next computation creates it again, in about a tenth of a millisecond."""
    pause = _pause()
    if pause is not None:
        pause(HARD)


@cache
def _pause() -> Any:
    """Returns `omp_pause_resource_all`, or None without GNU OpenMP: LLVM's would end other threads' pools too."""
    try:
        loaded = ctypes.CDLL(None)
        if hasattr(loaded, "GOMP_parallel") and not hasattr(loaded, "__kmpc_fork_call"):
            return loaded.omp_pause_resource_all
    except (OSError, TypeError, AttributeError):  # no such library, as on Windows, or an old one
        pass
    return None
