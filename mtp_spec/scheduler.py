"""Decides which sequences run: they wait in a queue, start when there is memory for them, and leave when they end.

A single prompt is a batch of one, run by its caller's thread (`stream`); submitted prompts share a scheduler, which has
a thread of its own (`serving`). First come, first served: no sequence overtakes another, and none is preempted, because
each gets all the memory that it may need before it starts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from contextlib import suppress
from time import perf_counter

from mtp_spec.model.errors import RankError
from mtp_spec.sequence import Sequence
from mtp_spec.step import Runner


class Scheduler:
    """The sequences of one runner.

    Args:
        max_batch: most sequences that run at a time.
    Attributes:
        waiting: sequences that have not started.
        running: sequences that have.
    """

    def __init__(self, runner: Runner, max_batch: int = 1) -> None:
        self.runner, self.max_batch = runner, max_batch
        self.waiting, self.running = deque[Sequence](), list[Sequence]()
        self._cancelled = list[Sequence]()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence in the queue."""
        self.waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence in the next round."""
        sequence.cancelled = True
        self._cancelled.append(sequence)

    def round(self) -> list[Sequence]:
        """Admits the sequences that fit and advances every running one by a step.

        Returns the sequences that changed: new tokens, finished, failed, or cancelled.
        """
        gone, self._cancelled = self._cancelled, []
        self._leave(gone)
        news = gone + self._admit()
        if self.running:
            start = perf_counter()
            running = list(self.running)
            news += self.runner.round(running)
            seconds = perf_counter() - start
            for one in running:
                one.stats.total_seconds += seconds
        news = list(dict.fromkeys(news))  # a sequence may be reported twice in a round: first token, then a step's
        self._leave([one for one in news if not one.alive])
        return news

    def close(self) -> None:
        """Stops all sequences."""
        try:
            with suppress(RankError):  # communication with a rank that has exited cannot complete
                self._leave([*self.running, *self.waiting])
        finally:
            self.runner.close()

    def _admit(self) -> list[Sequence]:
        """Starts sequences while memory lasts; returns those that failed to start."""
        failed = list[Sequence]()
        while self.waiting and len(self.running) < self.max_batch:
            first = self.waiting[0]
            try:
                if not self.runner.admit(first, self.running):
                    break
            except BaseException as error:  # of this sequence only: the others continue
                first.fail(error)
                failed.append(first)
                self.waiting.popleft()
                continue
            self.running.append(self.waiting.popleft())
        return failed

    def _leave(self, sequences: Seq[Sequence]) -> None:
        for one in sequences:
            if one in self.running:
                self.running.remove(one)
            elif one in self.waiting:
                self.waiting.remove(one)
            self.runner.release(one)
