"""Decides which sequences run: they wait in order, run while there is memory for them, and leave when they end.

One prompt is a batch of one, run by its caller's thread (`stream`); submitted prompts share a scheduler, which a thread
of their own runs (`serving`). First come, first served: nobody overtakes, and nobody who runs is cut short, because a
sequence is given all the memory that it may need before it begins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from time import perf_counter

from mtp_spec.model.errors import RankError
from mtp_spec.sequence import Sequence
from mtp_spec.step import Runner


class Scheduler:
    """The sequences of one runner.

    Args:
        max_batch: most that run at a time.
    Attributes:
        waiting: those that have not begun.
        running: those that have.
    """

    def __init__(self, runner: Runner, max_batch: int = 1) -> None:
        self.runner, self.max_batch = runner, max_batch
        self.waiting, self.running = deque[Sequence](), list[Sequence]()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence in the queue."""
        self.waiting.append(sequence)

    def round(self) -> list[Sequence]:
        """Admits who fits and takes all that run one step further.

        Returns the sequences of which there is news: tokens, their end, an error, or that they are gone.
        """
        gone = [one for one in (*self.running, *self.waiting) if one.cancelled]
        self._leave(gone)
        news = gone + self._admit()
        if self.running:
            start = perf_counter()
            running = list(self.running)
            news += self.runner.round(running)
            seconds = perf_counter() - start
            for one in running:
                one.stats.total_seconds += seconds
        news = list(dict.fromkeys(news))  # a first token and a step's may come in one round
        self._leave(one for one in news if not one.alive)
        return news

    def close(self) -> None:
        """Ends all sequences where they are."""
        try:
            with suppress(RankError):  # what is on its way to a rank that is gone does not come back
                self._leave([*self.running, *self.waiting])
        finally:
            self.runner.close()

    def _admit(self) -> list[Sequence]:
        """Begins sequences while they find room; returns those that cannot begin at all."""
        failed = list[Sequence]()
        while self.waiting and len(self.running) < self.max_batch:
            first = self.waiting[0]
            try:
                if not self.runner.admit(first, self.running):
                    break
            except BaseException as error:  # its own: others go on
                first.fail(error)
                failed.append(first)
                self.waiting.popleft()
                continue
            self.running.append(self.waiting.popleft())
        return failed

    def _leave(self, sequences: Iterable[Sequence]) -> None:
        for one in list(sequences):
            if one in self.running:
                self.running.remove(one)
            elif one in self.waiting:
                self.waiting.remove(one)
            self.runner.release(one)
