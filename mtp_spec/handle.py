"""The caller's handle of a sequence that a worker generates in a batch, for threads and for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import Future
from contextlib import suppress
from threading import RLock
from typing import Any

from mtp_spec.errors import MTPSpecError
from mtp_spec.results import EventLog, Generation, TokenEvent


class Handle:
    """A submitted request: `async for event in handle`, `await handle`, `handle.result()`, `handle.cancel()`.

    Every iteration yields all `TokenEvent`s from the first, the same as those of `lm.stream`. `await` and `result` give
    the `Generation`. They raise the error of this request, also one from its own logits processor, and CancelledError
    (of asyncio, or of concurrent.futures from `result`) if it was cancelled. A task that is cancelled while it awaits
    the handle cancels the request.

    Args:
        owner: the model.
        log: of the sequence.
        leave: called once the request is cancelled, in the thread that cancels it.
        inside: whether the calling thread is the worker's, which must not wait for itself.
    Attributes:
        events: those created so far.
    """

    def __init__(self, owner: object, log: EventLog, leave: Callable[[], object], inside: Callable[[], bool]) -> None:
        self._owner: object = owner  # keeps the model alive while the sequence is generated
        self._future: Future[Generation] = Future()
        self.events: list[TokenEvent] = []
        self._log = log
        self._leave: Callable[[], object] | None = leave
        self._inside: Callable[[], bool] | None = inside
        # a thread that holds it may collect the garbage of an unread stream, which cancels this text
        self._lock, self._listeners = RLock(), list[Callable[[], object]]()
        self._heard = False  # whether anyone listens: else no events are created
        self._future.add_done_callback(self._ended)

    def result(self, timeout: float | None = None) -> Generation:
        """Waits for the complete generation.

        Args:
            timeout: seconds; None waits indefinitely.

        Raises:
            TimeoutError: it was not finished in time.
            MTPSpecError: called by what runs in the worker's thread, such as a drafter or a logits processor.
        """
        self.check_wait()
        return self._future.result(timeout)

    def done(self) -> bool:
        """Whether it is finished, has failed or was cancelled."""
        return self._future.done()

    def cancel(self) -> bool:
        """Stops the generation, or removes it from the queue; returns whether it was not finished yet."""
        return self._future.cancel()

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._future.cancelled()

    def __await__(self) -> Generator[Any, None, Generation]:
        self.check_wait()
        return asyncio.wrap_future(self._future).__await__()

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        self.check_wait()
        loop, news, seen = asyncio.get_running_loop(), asyncio.Event(), 0

        def wake() -> None:
            with suppress(RuntimeError):  # the event loop was closed meanwhile
                loop.call_soon_threadsafe(news.set)

        self.listen(wake)
        try:
            while True:
                news.clear()
                done = self.told()
                while seen < len(self.events):
                    seen += 1
                    yield self.events[seen - 1]
                if done:
                    break
                await news.wait()
        finally:
            with self._lock:
                self._listeners.remove(wake)
        await self  # raises if it failed

    def listen(self, wake: Callable[[], object]) -> None:
        """Calls `wake`, in the worker's thread, when there are new events and at the end."""
        with self._lock:
            self._listeners.append(wake)
            self._heard = True

    def told(self) -> bool:
        """Returns whether it has ended and all of its events are created."""
        done = self._future.done()  # checked first: events come before the end
        if done and not self.cancelled():
            self._tell_all()
        return done

    def check_wait(self) -> None:
        """Checks that the calling thread may wait for the end.

        Raises:
            MTPSpecError: it is the worker's, which would wait for itself.
        """
        inside = self._inside
        if inside is not None and inside():
            raise MTPSpecError(
                "a drafter, logits processor or observer waits for a text of the model that it runs in, whose thread "
                "cannot write it meanwhile: load another model for that text, or write it before"
            )

    # called by the worker, the only one to create events until the future is done

    def written(self) -> None:
        """Creates events of new tokens, if anyone listens."""
        if self._heard and self._tell_all():
            self._wake()

    def finish(self) -> None:
        """Sets the result, unless it was cancelled."""
        if self._future.set_running_or_notify_cancel():
            self._future.set_result(self._log.finish())

    def fail(self, error: BaseException) -> None:
        """Sets an error, unless it was cancelled."""
        if self._future.set_running_or_notify_cancel():
            self._future.set_exception(error)

    def _tell_all(self) -> bool:
        """Creates events of new tokens; returns whether there were any."""
        before = len(self.events)
        with self._lock:
            while (event := self._log.pop()) is not None:
                self.events.append(event)
        return len(self.events) > before

    def _ended(self, future: Future[Generation]) -> None:
        leave, self._owner, self._leave, self._inside = self._leave, None, None, None
        if leave is not None and future.cancelled():
            leave()
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            for wake in tuple(self._listeners):
                wake()
