"""Rungs from a list in place of learned ones, for steps of several shapes in turn."""

from __future__ import annotations

from mtp_spec.planning.shape_planner import Ladder

RING, SMALL = 12, 4  # rows that may wait for an MTP module, and rows that catch up at once, where a test makes them few


class Script:
    """Takes rungs from a list; keeps what it was told."""

    def __init__(self, rungs: list[int], ladder: Ladder) -> None:
        self.ladder, self._rungs, self._next = ladder, rungs, 0
        self.taken: list[tuple[int, int]] = []

    def choose(self) -> int:
        self._next += 1
        return self._rungs[(self._next - 1) % len(self._rungs)]

    def tokens(self, rung: int) -> float:
        return 1.0 + rung

    def learn(self, rung: int, path: list[int], seconds: float | None) -> None:
        self.taken.append((rung, len(path)))

    def learn_all(self, rung: int, paths: list[list[int]], seconds: float | None) -> None:
        for path in paths:
            self.learn(rung, path, seconds)
