"""One sequence, token by token, as `LM.stream` returns it; its caller's thread generates it, or a worker does."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace

from mtp_spec.errors import MTPSpecError
from mtp_spec.handle import Handle
from mtp_spec.results import Generation, TokenEvent
from mtp_spec.scheduler import Scheduler
from mtp_spec.sequence import Sequence
from mtp_spec.step import Runner

CLOSED = "this stream was closed, or left for the one after it (after=): begin it again"


class TokenStream(Iterator[TokenEvent]):
    """Iterates over the tokens of one generation as they are committed; `result` is whole at the end.

    Args:
        owner: the model, which lives as long as the stream.
        after: an earlier stream, which is closed if it is unfinished and there is no room for both.
    """

    def __init__(
        self, sequence: Sequence, runner: Runner, owner: object = None, after: TokenStream | None = None
    ) -> None:
        self.sequence, self.owner = sequence, owner
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
        while (event := self._pop()) is None:
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
            raise MTPSpecError(CLOSED)
        try:
            self._scheduler.round()
        except BaseException as error:  # cut short in the middle of a step, whose caches are not to be used
            sequence.error = error
        if not sequence.alive:
            self._end()
        if sequence.error is not None:
            raise sequence.error
        return True

    def _pop(self) -> TokenEvent | None:
        return self.sequence.log.pop()


class SharedStream(TokenStream):
    """Iterates over the tokens of a text that a worker writes, beside others and whether or not it is read.

    What it tells, and its `result`, depend on what was read of it only, so they are the same on all ranks.
    """

    def __init__(self, sequence: Sequence, handle: Handle, owner: object) -> None:
        self.sequence, self.owner, self._handle = sequence, owner, handle
        self._news, self._read, self._whole = threading.Event(), list[TokenEvent](), False
        handle.listen(self._news.set)
        self._end = weakref.finalize(self, handle.cancel)  # nobody wants the rest any more

    @property
    def result(self) -> Generation:
        """What was told so far; whole once the stream has ended."""
        made, count = self.sequence.log.result, len(self._read)
        if self._whole:
            return made
        logprobs = None if made.logprobs is None else made.logprobs[:count]
        text, ids = "".join(one.text for one in self._read), [one.token_id for one in self._read]
        return replace(made, text=text, token_ids=ids, logprobs=logprobs)

    def rest(self) -> Generation:
        """Waits for the end."""
        for _ in self:
            pass
        return self.result

    def advance(self) -> bool:
        """Waits for news; returns false at the end."""
        if self._whole:
            return False
        self._news.clear()
        done = self._handle.told()
        if not self._end.alive or self._handle.cancelled():
            raise MTPSpecError(CLOSED)
        if len(self._handle.events) > len(self._read):
            return True
        if done:
            self._whole = True
            self._handle.result()  # or what went wrong
            return False
        self._news.wait()
        return True

    def _pop(self) -> TokenEvent | None:
        if not self._end.alive or len(self._read) == len(self._handle.events):
            return None
        self._read.append(self._handle.events[len(self._read)])
        return self._read[-1]
