"""One sequence that its caller's thread generates, token by token: what `LM.stream` returns."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

from mtp_spec.errors import MTPSpecError
from mtp_spec.results import Generation, TokenEvent
from mtp_spec.scheduler import Scheduler
from mtp_spec.sequence import Sequence
from mtp_spec.step import Runner


class TokenStream(Iterator[TokenEvent]):
    """Iterates over the tokens of one generation as they are committed; `result` is whole at the end.

    Args:
        owner: the model, which lives as long as the stream.
        after: an earlier stream, which is closed if it is unfinished and there is no room for both.
        allowed: asked before every step; raises where the text cannot go on.
    """

    def __init__(
        self, sequence: Sequence, runner: Runner, owner: object = None, allowed: Callable[[], None] | None = None,
        after: TokenStream | None = None,
    ) -> None:  # fmt: skip
        self.sequence, self.owner, self._allowed = sequence, owner, allowed
        runner.check(sequence.request)
        if after is not None and after.sequence.alive and runner.crowded(sequence.request):
            after.close()
        self._scheduler = Scheduler(runner)
        self._scheduler.add(sequence)
        # a stream that nobody holds any more gives its memory back
        self._end = weakref.finalize(self, self._scheduler.close)

    @property
    def result(self) -> Generation:
        """What was told so far; whole once the stream has ended."""
        return self.sequence.log.result

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> TokenEvent:
        if self._allowed is not None and self.sequence.alive:
            self._allowed()
        while (event := self.sequence.log.pop()) is None:
            if not self.advance():
                raise StopIteration
        return event

    def rest(self) -> Generation:
        """Generates to the end without making an event of every token."""
        while self.advance():
            pass
        return self.sequence.log.finish()

    def close(self) -> None:
        """Ends the stream where it is and gives its memory back; no harm if repeated."""
        self._end()

    def advance(self) -> bool:
        """Runs one round, without telling what it brought; returns whether there was anything to do."""
        sequence = self.sequence
        if sequence.finished or sequence.error is not None:
            return False
        if not self._end.alive:
            raise MTPSpecError("this stream was closed, or left for the one after it (after=): begin it again")
        if self._allowed is not None:
            self._allowed()
        try:
            self._scheduler.round()
        except BaseException as error:  # cut short in the middle of a step, whose caches are not to be used
            sequence.error = error
        if not sequence.alive:
            self._end()
        if sequence.error is not None:
            raise sequence.error
        return True
