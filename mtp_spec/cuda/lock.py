"""A fair, re-entrant lock around CUDA-graph work.

Nothing else may run while work is captured, and captured work leaves numbers where the next one writes.
"""

from __future__ import annotations

from threading import Lock, get_ident


class FairLock:
    """A lock to be entered with `with`; the thread that has it may enter again.

    A thread that leaves it and asks at once comes after those that were waiting, so that a worker in a loop keeps
    nobody out.
    """

    def __init__(self) -> None:
        self._door, self._inside = Lock(), Lock()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        if self._owner != get_ident():
            with self._door:
                self._inside.acquire()
            self._owner = get_ident()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._inside.release()
