"""What the workers of processes that share a model decide alike: which texts there are, and which go.

Each rank's worker runs the same rounds, or their exchanges would not fit together. But a text comes, is cancelled and
the model is closed at another moment in every process. So a worker acts on such news only once all ranks know it: at
points that every worker comes to after the same rounds, or, where nothing runs, as soon as all have a text.

In between nothing is exchanged beside what the model does. Only a rank where a text fails asks the others whether it
failed there too: those go on to an exchange of tensors that it does not join, and find what it has said instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass

import torch

from mtp_spec.model.distributed.group import Ranks
from mtp_spec.model.errors import RankError

# rounds between two points at which running workers tell news: an exchange costs a tenth of a millisecond
EVERY = 8


@dataclass(frozen=True, slots=True)
class News:
    """What has come for a worker.

    Attributes:
        arrived: texts so far; those that all ranks have, once agreed on.
        cancelled: numbers of texts; those that any rank cancels.
        closing: ranks whose model was closed.
    """

    arrived: int
    cancelled: frozenset[int]
    closing: tuple[int, ...]


class Lockstep:
    """One rank's side of it; a process alone agrees with itself. To be made in the same order on all ranks."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.alone = ranks, ranks.size == 1
        self._channel, self._rounds = ranks.channel(), 0

    def held(self) -> AbstractContextManager[None]:
        """To be entered by the worker's thread, whose exchanges of facts are not those of the caller's thread."""
        return nullcontext() if self.alone else self.ranks.on(self._channel)

    def rest(self, mine: News) -> News:
        """Returns the news where nothing runs, once all ranks have some; who closes does not wait for that.

        Raises:
            RankError: as `point`.
        """
        self._rounds = 0
        if mine.closing:
            with suppress(RankError):  # the others may have ended
                if self._channel is not None:
                    self._channel.give(_told(mine))
            return mine
        return _joint([_heard(one) for one in self.ranks.everyone(_told(mine))])

    def due(self) -> bool:
        """Whether this round begins with a point."""
        self._rounds += 1
        return self._rounds % EVERY == 0

    def point(self, mine: News, times: Sequence[float]) -> tuple[News, list[float]]:
        """Returns the news, and the first rank's measured times; every rank has measured as many.

        Raises:
            RankError: a rank failed or does not answer.
        """
        numbers = [mine.arrived, len(mine.cancelled), bool(mine.closing), *times]
        everyone = self.ranks.stack(torch.tensor(numbers, dtype=torch.float64))
        cancelled = frozenset[int]()
        if everyone[:, 1].any():
            cancelled = cancelled.union(*self.ranks.everyone(sorted(mine.cancelled)))
        closing = everyone[:, 2].nonzero().flatten().tolist()
        return News(int(everyone[:, 0].min()), cancelled, tuple(closing)), everyone[0, 3:].tolist()


def _told(news: News) -> list[object]:
    return [news.arrived, sorted(news.cancelled), news.closing]


def _heard(told: list[object]) -> News:
    arrived, cancelled, closing = told
    assert isinstance(arrived, int)
    assert isinstance(cancelled, list)
    assert isinstance(closing, list)
    return News(arrived, frozenset(cancelled), tuple(closing))


def _joint(everyone: Sequence[News]) -> News:
    cancelled = frozenset[int]().union(*(one.cancelled for one in everyone))
    closing = tuple(rank for one in everyone for rank in one.closing)
    return News(min(one.arrived for one in everyone), cancelled, closing)
