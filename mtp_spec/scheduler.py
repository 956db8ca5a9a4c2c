"""The queue of texts that are written side by side, and the thread that writes them.

How a round brings the running texts one step further differs between a CPU (`batch`) and a GPU (`device_batch`). Where
processes share a model, each has such a thread, and all of them run the same rounds (`lockstep`).
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch

from mtp_spec.cpu import openmp as teams
from mtp_spec.cpu.passes import Pass, Runner, Turn
from mtp_spec.distributed.sync import Lockstep, News
from mtp_spec.errors import MTPSpecError
from mtp_spec.handle import Handle
from mtp_spec.model.distributed import store as control
from mtp_spec.model.distributed.group import Ranks
from mtp_spec.model.errors import RankError
from mtp_spec.request import Request
from mtp_spec.results import TokenStream


class Place(Protocol):
    """Memory that a text has while it is written: pages of a CPU's cache or a GPU's."""

    def end(self) -> None:
        """Gives it back; no harm if repeated."""
        ...


class Writer(Protocol):
    """A model, as a batch sees it."""

    def begin(self, request: Request, *, lease: Place | None) -> TokenStream:
        """Opens a text that writes to this memory; None where texts have memory of their own."""
        ...

    def joint_runner(self) -> Runner | None:
        """Returns the way to run passes of several texts here and now; None where texts run their own."""
        ...


class Full(Exception):
    """There is no room for a text yet."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A text that waits; `number` counts those of its worker."""

    number: int
    request: Request
    writer: Writer
    handle: Handle


@dataclass(slots=True, eq=False)
class Text:
    """A text being written.

    Attributes:
        number: see `Asked`.
        wanted: what it waits for, None between steps.
        read: the round in which its prompt's last chunk was read.
        rows: of its last verified tree and root.
    """

    number: int
    request: Request
    stream: TokenStream
    handle: Handle
    lease: Place | None
    wanted: Pass | Turn | None = None
    read: int = 0
    rows: int = 1


class Worker(ABC):
    """The queue, the running texts and their thread.

    Args:
        most: texts that run side by side; others wait.
        ranks: those that share the model; each makes its worker at the same place.
    """

    def __init__(self, most: int, ranks: Ranks) -> None:
        self.most, self.lockstep = most, Lockstep(ranks)
        self._waiting, self._running = deque[Asked](), list[Text]()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed, self._resting = False, True
        self._error: BaseException | None = None
        self._threads, self._device = 1, -1
        # texts that have come, and those of them that all ranks know of; numbers of those that some rank cancelled
        self._arrived, self._known, self._cancelled = 0, 0, frozenset[int]()

    def submit(self, requests: Sequence[Request], writer: Writer) -> list[Handle]:
        """Puts texts in the queue, all at once.

        Raises:
            MTPSpecError: the batch was closed, or a text would not fit if it were alone.
            RankError: another rank has failed.
        """
        for request in requests:
            self._check(request)
        handles = [Handle(writer) for _ in requests]
        with self._wake:
            if isinstance(self._error, RankError):
                raise RankError(str(self._error)) from self._error
            if self._closed:
                raise MTPSpecError("this model was closed: load it again")
            for request, handle in zip(requests, handles, strict=True):
                self._waiting.append(Asked(self._arrived, request, writer, handle))
                self._arrived += 1
            self._threads = torch.get_num_threads()  # a new thread would begin with torch's own default
            self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="mtp-spec batch", daemon=True)
                self._thread.start()
            self._wake.notify_all()
        teams.dismiss()  # the worker computes now
        return handles

    def close(self) -> None:
        """Cancels every text, queued or running, and ends the worker; no harm if repeated."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def rests(self) -> bool:
        """Returns whether nothing is left to write, once what was cancelled or written last is out of the way."""
        with self._wake:
            left = [asked.handle for asked in list(self._waiting)] + [text.handle for text in list(self._running)]
            return all(handle.done() for handle in left) and self._wake.wait_for(
                lambda: self._resting, control.PATIENCE
            )

    @abstractmethod
    def turn(self) -> None:
        """Admits who fits and runs one round."""

    @abstractmethod
    def _place(self, request: Request) -> Place | None:
        """Returns the memory of a text that can begin; None where it has memory of its own.

        Raises:
            Full: it has to wait.
        """

    @abstractmethod
    def _check(self, request: Request) -> None:
        """Refuses a text that would not even fit if it were alone."""

    @abstractmethod
    def _begins(self, writer: Writer, threads: int) -> None:
        """Prepares for the first texts after a rest, asked for by a caller with so many threads."""

    def _measured(self) -> list[float]:
        """Returns the times measured since this was asked last, as many on every rank."""
        return []

    def _learn(self, times: Sequence[float]) -> None:
        """Takes the first rank's in their place."""
        assert not times

    def _serve(self) -> None:
        error: BaseException | None = None
        if self._device >= 0:
            torch.cuda.set_device(self._device)
        with self.lockstep.held():
            try:
                while self._work_arrives():
                    self.turn()
            except BaseException as failure:  # nobody may wait for a worker that is gone
                error = failure
            self._stop(error)

    def _stop(self, error: BaseException | None) -> None:
        """Ends what is left."""
        with self._wake:
            self._closed, self._error = True, error
            left = [asked.handle for asked in self._waiting] + [text.handle for text in self._running]
            self._waiting.clear()
        for handle in left:
            if error is None:
                handle.cancel()
            else:
                handle.fail(error)
        try:
            with suppress(RankError):  # what is on its way to a rank that is gone does not come back
                self._leave(self._running)
        finally:
            with self._wake:
                self._resting = True
                self._wake.notify_all()

    def _work_arrives(self) -> bool:
        """Waits for something to do and takes the news; returns whether the worker goes on."""
        with self._wake:
            resting = not self._running and self._next() is None
            if resting:
                self._wait()
            threads = self._threads
        if not self._take_news(resting):
            return False
        first = self._next()
        if first is not None and not self._running:
            self._begins(first.writer, threads)
        return True

    def _wait(self) -> None:
        self._resting = True
        self._wake.notify_all()
        while not (self._closed or self._arrived > self._known):
            teams.dismiss()  # the others compute, if anyone does
            self._wake.wait()
        self._resting = False

    def _news(self) -> News:
        """Returns this rank's."""
        lockstep = self.lockstep
        closing = (lockstep.ranks.rank,) if self._closed else ()
        if lockstep.alone:  # asks when it comes to a text
            return News(self._arrived, self._cancelled, closing)
        left = [(text.number, text.handle) for texts in (self._running, self._waiting) for text in texts]
        return News(self._arrived, frozenset(number for number, handle in left if handle.cancelled()), closing)

    def _take_news(self, resting: bool) -> bool:
        """Takes the news, as all ranks have it where there are several; returns whether the worker goes on."""
        lockstep = self.lockstep
        if not (lockstep.alone or resting or lockstep.due()):
            return True
        with self._wake:
            news = self._news()
        if resting and not lockstep.alone:
            news = lockstep.rest(news)
        elif not lockstep.alone:
            news, times = lockstep.point(news, self._measured())
            self._learn(times)
        if news.closing:
            self._close_with(news.closing[0])
            return False
        self._known, self._cancelled = news.arrived, news.cancelled
        return True

    def _close_with(self, rank: int) -> None:
        """Waits for this rank's program to close the model too, as another's has."""
        ranks = self.lockstep.ranks
        with self._wake:
            if not self._wake.wait_for(lambda: self._closed, control.PATIENCE):
                raise RankError(
                    f"rank {rank} of {ranks.size} closed the model or ended, and rank {ranks.rank} did not within "
                    f"{control.PATIENCE:.0f} s: all make the same calls"
                )

    def _next(self) -> Asked | None:
        """Returns the first text that waits, of those that are known everywhere."""
        return self._waiting[0] if self._waiting and self._waiting[0].number < self._known else None

    def _gone(self, text: Text | Asked) -> bool:
        """Whether a text was cancelled, as far as all ranks know."""
        if self.lockstep.alone:
            return text.handle.cancelled()
        return text.number in self._cancelled

    def _admit(self) -> None:
        """Ends texts that were cancelled, and opens those that have come and find room."""
        cancelled = [text for text in self._running if self._gone(text)]
        self._leave(cancelled)
        for text in cancelled:
            text.handle.cancel()  # by another rank
        while len(self._running) < self.most and (asked := self._next()) is not None:
            if self._gone(asked):
                self._waiting.popleft()
                asked.handle.cancel()
                continue
            request, lease = asked.request, None
            try:
                lease = self._place(request)
                self._waiting.popleft()
                stream = asked.writer.begin(request, lease=lease)
                asked.handle.begin(stream.teller)
                self._running.append(Text(asked.number, request, stream, asked.handle, lease))
            except Full:
                return  # first come first served: nobody overtakes
            except BaseException as error:  # the request's own: others go on
                if self._waiting and self._waiting[0] is asked:  # it found no place
                    self._waiting.popleft()
                self._fail([asked], error)
                if lease is not None:
                    lease.end()

    def _go_on(self, texts: Sequence[Text]) -> None:
        """Lets texts do their own work up to what they wait for next."""
        for text in texts:
            try:
                text.wanted = next(text.stream.work, None)
            except BaseException as error:  # as above
                self._fail([text], error)
                continue
            text.handle.written()
            if text.wanted is None and text.stream.decoder.finished:
                self._leave([text])
                text.handle.finish()

    def _leave(self, texts: Sequence[Text]) -> None:
        for text in list(texts):
            self._running.remove(text)
            text.stream.work.close()  # it holds the stream that holds it: memory is not to wait for the collector
            if text.lease is not None:
                text.lease.end()

    def _fail(self, texts: Sequence[Text | Asked], error: BaseException) -> None:
        """Ends texts with an error.

        Raises:
            RankError: not every rank has it.
        """
        self.lockstep.ranks.fail_alike(f"text {', '.join(str(text.number) for text in texts)}", error)
        self._leave([text for text in texts if isinstance(text, Text)])
        for text in texts:
            text.handle.fail(error)
