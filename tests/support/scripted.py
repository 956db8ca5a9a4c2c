"""Shapes from a list in place of learned ones, for steps of several shapes in turn."""

from __future__ import annotations

from mtp_spec.planning.base import Outcome
from mtp_spec.planning.shape_planner import ShapeBatch, ShapePlan

RING, SMALL = 12, 4  # rows that may wait for an MTP module, and rows that catch up at once, where a test makes them few


class Script:
    """Takes shapes from a list; keeps what it was told."""

    def __init__(self, shapes: list[int]) -> None:
        self._shapes, self._next = shapes, 0
        self.taken: list[tuple[int, int]] = []

    def plan(self, batch: ShapeBatch) -> ShapePlan:
        shape = self._shapes[self._next % len(self._shapes)]
        self._next += 1
        return ShapePlan(batch.table, shape, 1.0 + shape, 1.0)

    def learn(self, plan: ShapePlan, outcome: Outcome) -> None:
        self.taken += [(plan.shape, len(path)) for path in outcome.paths if path is not None]
