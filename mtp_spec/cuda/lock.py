"""A fair, re-entrant lock around CUDA-graph work.

Nothing else may run during a capture, and captured work leaves its results where the next work writes.
"""

from __future__ import annotations

from threading import Lock, get_ident


class FairLock:
    """A lock for use with `with`; the thread that holds it may enter again.

    A thread that releases it and immediately asks again queues behind those that were waiting, so a worker in a loop
    starves no other thread.
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
