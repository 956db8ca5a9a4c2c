"""Helper threads for the engine's forward passes.

They are Python threads, so that no system's thread library is needed, and stay inside one call of the engine, without
the GIL. After some milliseconds without work they sleep. The caller never waits for them to wake up: a pass is divided
into pieces that any available thread takes (team.h).
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mtp_spec.kernels.cpu.engine import Library, library

PATIENCE = 6000  # polls without work before a helper sleeps: some milliseconds


class Team:
    """The helpers of this process."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a model may be garbage collected during another's call
        self._helpers: list[_Helper] = []
        self._calling, self._released = False, list[object]()

    @contextmanager
    def called(self, threads: int) -> Iterator[int]:
        """Yields the number of threads a call may use: `threads`, or one while another call uses the helpers."""
        if threads == 1 or self._calling or not self._lock.acquire(blocking=False):
            yield 1
            return
        self._calling = True
        try:
            while len(self._helpers) < threads - 1:
                self._helpers.append(_Helper(library(), len(self._helpers) + 1))
            for helper in self._helpers[: threads - 1]:
                helper.wake()
            yield threads
        finally:
            self._calling = False
            if self._released:
                self.release()
            self._lock.release()

    def release(self, *things: object) -> None:
        """Releases memory that passes used, once no helper reads it any more."""
        with self._lock:
            self._released += things
            if self._calling:
                return  # the call in progress will do it
            if self._helpers:
                library().rest()
            self._released.clear()

    def forget(self) -> None:
        """Resets after a fork: the helpers belong to the parent."""
        if self._helpers:
            library().forked()
        self._lock, self._helpers, self._calling = threading.RLock(), [], False


class _Helper:
    def __init__(self, engine: Library, number: int) -> None:
        self._engine, self._number = engine, number
        self._work, self._asleep = threading.Event(), False
        threading.Thread(target=self._serve, name=f"mtp-spec helper {number}", daemon=True).start()

    def wake(self) -> None:
        if self._asleep:
            self._work.set()

    def _serve(self) -> None:
        while True:
            self._engine.help(self._number, PATIENCE)
            self._asleep = True
            self._work.wait()
            self._work.clear()
            self._asleep = False


TEAM = Team()


def _end() -> None:
    if TEAM._helpers:
        library().close(1)


_fork: Callable[..., None] | None = getattr(os, "register_at_fork", None)
if _fork is not None:
    _fork(after_in_child=TEAM.forget)
atexit.register(_end)
