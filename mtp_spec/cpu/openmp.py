"""OpenMP's threads, of a thread that will not compute for a while.

Every thread that computes has a team of its own. While there are more threads in teams than processors, GNU's OpenMP
no longer lets them look out for work between two operations: they sleep, and are woken for the next. A token then takes
half as long again, whether the other team does anything or not. So who hands work to another thread dismisses its team.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

HARD = 2  # omp_pause_hard of OpenMP 5.0: nothing is kept


def dismiss() -> None:
    """Ends this thread's team, which comes back with its next computation, about a tenth of a millisecond later."""
    pause = _pause()
    if pause is not None:
        pause(HARD)


@cache
def _pause() -> Any:
    """Returns `omp_pause_resource_all`, or None where OpenMP is another one: LLVM's ends other threads' teams too."""
    try:
        loaded = ctypes.CDLL(None)
        if hasattr(loaded, "GOMP_parallel") and not hasattr(loaded, "__kmpc_fork_call"):
            return loaded.omp_pause_resource_all
    except (OSError, TypeError, AttributeError):  # no such library, as on Windows, or an old one
        pass
    return None
