"""Queues measured times for the planners: ranks that share a model learn the first rank's times once a round."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class PendingTimes:
    """Times of a runner's steps that its planners have not learned yet.

    Args:
        alone: whether there are no other ranks, so that times are learned at once.
    """

    def __init__(self, alone: bool) -> None:
        self._alone, self._kept = alone, list[tuple[tuple[float, ...], Callable[..., None]]]()

    def add(self, seconds: tuple[float, ...], learn: Callable[..., None]) -> None:
        """Takes seconds and the function that learns them, one argument each."""
        if self._alone:
            learn(*seconds)
        else:
            self._kept.append((seconds, learn))

    def measured(self) -> list[float]:
        """Returns all queued seconds, in order."""
        return [second for seconds, _ in self._kept for second in seconds]

    def learn(self, times: Sequence[float]) -> None:
        """Lets the planners learn these times in place of the queued ones."""
        told = iter(times)
        for seconds, learn in self._kept:
            learn(*(next(told) for _ in seconds))
        self._kept.clear()
