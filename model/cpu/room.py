"""Memory that calls of the CPU engine work in: kept from call to call, and used by one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtp_spec.kernels.cpu.team import TEAM


def zeros(count: int) -> Tensor:
    """Returns zeros in float32, without torch's threads, which a forked process does not have."""
    return torch.from_numpy(np.zeros(count, np.float32))


@dataclass(frozen=True, slots=True)
class Room:
    """Room for calls of up to so many rows over so many slots by so many threads."""

    rows: int
    context: int
    threads: int
    memory: Tensor


class Rooms:
    """Rooms for calls of one kind: as many as there were calls at the same time.

    Args:
        floats: how many are needed for so many rows, slots and threads.
        step: slots are counted in so many, so that a text that grows finds room.
    """

    def __init__(self, floats: Callable[[int, int, int], int], step: int = 1) -> None:
        self._floats, self._step = floats, step
        self._free: list[Room] = []

    @contextmanager
    def lent(self, rows: int, context: int, threads: int) -> Iterator[Room]:
        """Yields a room that is the caller's until the end of the block.

        One that a call left with an error is let go of: a helper may still look at it.
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
            found = self._free.pop()  # one step for Python, so that no two calls get the same
        except IndexError:
            found = Room(0, 0, 0, zeros(0))
        if found.rows >= rows and found.context >= context and found.threads >= threads:
            return found
        TEAM.release(found)
        rows, threads = max(rows, found.rows), max(threads, found.threads)
        context = max(-(-context // self._step) * self._step, found.context)
        return Room(rows, context, threads, zeros(self._floats(rows, context, threads)))
