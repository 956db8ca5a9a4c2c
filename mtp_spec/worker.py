"""The queue of texts that are written side by side, and the thread that writes them.

How a round brings the running texts one step further differs between a CPU (`batch`) and a GPU (`device_batch`).
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from mtp_spec import teams
from mtp_spec.errors import MTPSpecError
from mtp_spec.handle import Handle
from mtp_spec.passes import Pass, Runner, Turn
from mtp_spec.requests import Request
from mtp_spec.streaming import TokenStream


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


@dataclass(slots=True, eq=False)
class Text:
    """A text being written.

    Attributes:
        wanted: what it waits for, None between steps.
        read: the round in which its prompt's last chunk was read.
        rows: of its last verified tree and root.
    """

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
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._waiting, self._running = deque[tuple[Request, Writer, Handle]](), list[Text]()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed, self._threads = False, 1

    def submit(self, request: Request, writer: Writer) -> Handle:
        """Puts a text in the queue.

        Raises:
            MTPSpecError: the batch was closed, or the text would not fit if it were alone.
        """
        self._check(request)
        handle = Handle(writer)
        with self._wake:
            if self._closed:
                raise MTPSpecError("this model was closed: load it again")
            self._waiting.append((request, writer, handle))
            self._threads = torch.get_num_threads()  # a new thread would begin with torch's own default
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="mtp-spec batch", daemon=True)
                self._thread.start()
            self._wake.notify()
        teams.dismiss()  # the worker computes now
        return handle

    def close(self) -> None:
        """Cancels every text, queued or running, and ends the worker; no harm if repeated."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

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

    def _serve(self) -> None:
        error: BaseException | None = None
        try:
            while self._work_arrives():
                self.turn()
        except BaseException as failure:  # nobody may wait for a worker that is gone
            error = failure
        with self._wake:
            self._closed = True
            left = [handle for *_, handle in self._waiting] + [text.handle for text in self._running]
            self._waiting.clear()
            self._leave(self._running)
        for handle in left:
            if error is None:
                handle.cancel()
            else:
                handle.fail(error)

    def _work_arrives(self) -> bool:
        with self._wake:
            while not (self._closed or self._waiting or self._running):
                teams.dismiss()  # the others compute, if anyone does
                self._wake.wait()
            if self._closed:
                return False
            writer, threads = (self._waiting[0][1] if self._waiting else None), self._threads
        if writer is not None and not self._running:
            self._begins(writer, threads)
        return True

    def _admit(self) -> None:
        """Ends texts that were cancelled, and opens those that have come and find room."""
        self._leave([text for text in self._running if text.handle.cancelled()])
        while len(self._running) < self.most:
            with self._wake:
                if not self._waiting:
                    return
                request, writer, handle = self._waiting[0]
            lease = None
            if handle.cancelled():
                self._waiting.popleft()
                continue
            try:
                lease = self._place(request)
                self._waiting.popleft()
                stream = writer.begin(request, lease=lease)
                handle.begin(stream.teller)
                self._running.append(Text(request, stream, handle, lease))
            except Full:
                return  # first come first served: nobody overtakes
            except BaseException as error:  # the request's own: others go on
                if self._waiting and self._waiting[0][2] is handle:  # it found no place
                    self._waiting.popleft()
                handle.fail(error)
                if lease is not None:
                    lease.end()

    def _go_on(self, texts: Sequence[Text]) -> None:
        """Lets texts do their own work up to what they wait for next."""
        for text in texts:
            try:
                text.wanted = next(text.stream.work, None)
            except BaseException as error:  # as above
                self._end(text, error)
                continue
            text.handle.written()
            if text.wanted is None and text.stream.decoder.finished:
                self._end(text)

    def _leave(self, texts: Sequence[Text]) -> None:
        for text in list(texts):
            self._running.remove(text)
            text.stream.work.close()  # it holds the stream that holds it: memory is not to wait for the collector
            if text.lease is not None:
                text.lease.end()

    def _end(self, text: Text, error: BaseException | None = None) -> None:
        self._leave([text])
        if error is None:
            text.handle.finish()
        else:
            text.handle.fail(error)
