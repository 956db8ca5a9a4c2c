"""The caches of texts side by side on a GPU: one allocation, a lane of it for each text.

A lane has room for the longest text, so nobody runs out of it. Behind the lanes every layer has a few idle rows: a step
that is captured for more texts than there are lets the others write there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mtp_spec.device_state import SLACK, WORK_ROWS
from mtp_spec.kernels.mla_cache import Cache
from mtp_spec.model.device import DeviceModel

# most rows of a step's pass, and most texts of one; where there are more they step by turns
STEP_ROWS, STEP_TEXTS = 512, 64
READ_TEXTS = 8  # prompts that are read in one pass
IDLE_ROWS = WORK_ROWS  # a text that nobody reads has one token


class Lanes:
    """The lanes of a loaded model.

    Args:
        tokens: most tokens of prompt and text.  count: how many lanes.

    Attributes:
        caches: of all layers and the MTP modules.  idle: where in a layer the idle rows begin.
    """

    def __init__(self, model: DeviceModel, tokens: int, count: int) -> None:
        self.caches = model.new_caches(tokens + SLACK, STEP_ROWS, count, IDLE_ROWS)
        self.count, self.idle = count, count * self.caches[0].capacity
        self._free = [Lane(self, number) for number in reversed(range(count))]

    def take(self) -> Lane | None:
        """Returns a lane without a text, with finite numbers all over; None where all have one."""
        if not self._free:
            return None
        lane = self._free.pop()
        lane.clean()
        return lane

    def give(self, lane: Lane) -> None:
        """Takes a lane back."""
        if lane not in self._free:
            self._free.append(lane)


@dataclass(slots=True, eq=False)
class Lane:
    """A text's room.

    Attributes:
        used: its first so many slots may have been written to.
    """

    lanes: Lanes
    number: int
    used: int = 0

    @property
    def capacity(self) -> int:
        """Its slots."""
        return self.lanes.caches[0].capacity

    @property
    def first(self) -> int:
        """The row of a layer at which it begins."""
        return self.number * self.capacity

    def caches(self) -> list[Cache]:
        """Returns the caches of a text that has the lane alone."""
        return [replace(cache, base=cache.base + self.first) for cache in self.lanes.caches]

    def clean(self) -> None:
        """Removes what a text has left: it could be NaN, which masks do not remove."""
        store, layers = self.lanes.caches[0].store, len(self.lanes.caches)
        rows = store[: self.lanes.caches[0].spare].unflatten(0, (layers, -1))
        rows[:, self.first : self.first + self.used].zero_()
        self.used = 0

    def end(self) -> None:
        """Gives it back; no harm if repeated."""
        self.lanes.give(self)
