"""Measured times on their way to the planners: where ranks share a model the first one's count, told once a round."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Untold:
    """Times of a runner's steps that its planners have not learned yet.

    Args:
        alone: no other rank plans by them, so they are learned at once.
    """

    def __init__(self, alone: bool) -> None:
        self._alone, self._kept = alone, list[tuple[tuple[float, ...], Callable[..., None]]]()

    def add(self, seconds: tuple[float, ...], learn: Callable[..., None]) -> None:
        """Takes seconds, and what learns them, an argument each."""
        if self._alone:
            learn(*seconds)
        else:
            self._kept.append((seconds, learn))

    def measured(self) -> list[float]:
        """Returns all that is kept, in order."""
        return [second for seconds, _ in self._kept for second in seconds]

    def learn(self, times: Sequence[float]) -> None:
        """Lets the planners learn these in the place of what is kept."""
        told = iter(times)
        for seconds, learn in self._kept:
            learn(*(next(told) for _ in seconds))
        self._kept.clear()
