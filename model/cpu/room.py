"""Working memory for calls of the CPU engine: kept between calls, and used by one call at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtp_spec.kernels.cpu.team import TEAM

LINE = 64  # bytes of a line of a processor's cache


def zeros(count: int) -> Tensor:
    """Returns zeros in float32, without torch's threads, which a forked process does not have.

    They begin with a line of the cache, which numpy's do not: else every second read of 32 bytes needs two lines.
    """
    wide = LINE // 4
    held = np.zeros(count + wide - 1, np.float32)
    return torch.from_numpy(held)[-held.ctypes.data % LINE // 4 :][:count]


@dataclass(frozen=True, slots=True)
class Room:
    """Working memory for calls of up to so many rows, slots and threads."""

    rows: int
    context: int
    threads: int
    memory: Tensor


class Rooms:
    """Pool of rooms for one kind of call; it grows to the number of concurrent calls.

    Args:
        floats: returns the float32 numbers needed for given rows, slots and threads.
        step: slots are rounded up to a multiple of this, so that a growing sequence can reuse a room.
    """

    def __init__(self, floats: Callable[[int, int, int], int], step: int = 1) -> None:
        self._floats, self._step = floats, step
        self._free: list[Room] = []

    @contextmanager
    def lent(self, rows: int, context: int, threads: int) -> Iterator[Room]:
        """Yields a room for the caller's exclusive use until the end of the block.

        After an error the room is not reused: a helper thread may still read it.
        """
        room = self._found(rows, context, threads)
        try:
            yield room
        except BaseException:
            TEAM.release(room)
            raise
        self._free.append(room)

    def _found(self, rows: int, context: int, threads: int) -> Room:
        try:
            found = self._free.pop()  # atomic in Python, so no two calls get the same room
        except IndexError:
            found = Room(0, 0, 0, zeros(0))
        if found.rows >= rows and found.context >= context and found.threads >= threads:
            return found
        TEAM.release(found)
        rows, threads = max(rows, found.rows), max(threads, found.threads)
        context = max(-(-context // self._step) * self._step, found.context)
        return Room(rows, context, threads, zeros(self._floats(rows, context, threads)))
