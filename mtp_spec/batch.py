"""Texts written side by side: whoever comes is admitted while others are in the middle of theirs.

A round brings every text one step further. Drafting comes first: while any text drafts, those that do run their passes
together. Then one pass verifies all trees. Prompts are read beside it, about one chunk a round and by turns, so that a
long one holds up neither the texts nor the other prompts. One thread does all of it.

A text is the same as alone, bit for bit: its rows are (`passes`), and everything else is its own.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import torch

from mtp_spec import company, teams
from mtp_spec.engine import Decoder
from mtp_spec.errors import MTPSpecError
from mtp_spec.handle import Handle
from mtp_spec.model.cache import PAGE, pages_for
from mtp_spec.pages import Lease, Pages
from mtp_spec.passes import MainRows, ModuleRows, Pass, Runner
from mtp_spec.requests import Request
from mtp_spec.streaming import TokenStream

# rows of prompts that a round reads at most, or one chunk
PROMPT_ROWS = 256


class Writer(Protocol):
    """A model, as a batch sees it."""

    def begin(self, request: Request, *, lease: Lease | None) -> TokenStream:
        """Opens a text that writes to these pages; None where texts have memory of their own."""
        ...

    def joint_runner(self) -> Runner | None:
        """Returns the way to run passes of several texts here and now; None where texts run their own."""
        ...


@dataclass(slots=True, eq=False)
class _Text:
    """A text being written.

    Attributes:
        wanted: the pass it waits for, None between steps.
        read: the round in which its prompt's last chunk was read.
        rows: of its last verified tree and root.
    """

    request: Request
    stream: TokenStream
    handle: Handle
    lease: Lease | None
    wanted: Pass | None = None
    read: int = 0
    rows: int = 1


class Batch:
    """The queue, the running texts and their worker.

    Args:
        most: texts that run side by side; others wait.
        pages: the memory of their caches; who finds none free waits. None where texts have memory of their own.
    """

    def __init__(self, most: int, pages: Pages | None) -> None:
        self.most, self.pages = most, pages
        self._waiting, self._running = deque[tuple[Request, Writer, Handle]](), list[_Text]()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed, self._threads, self._round = False, 1, 0
        self._runner: Runner | None = None
        self._way = (0, False)  # how the caches' rows are computed: threads, and whether one way is as good as another

    def submit(self, request: Request, writer: Writer) -> Handle:
        """Puts a text in the queue.

        Raises:
            MTPSpecError: the batch was closed, or the text would not fit if it were alone.
        """
        needed = pages_for(request.room)
        if self.pages is not None and needed > self.pages.total:
            raise MTPSpecError(
                f"this text may need {needed} pages of {PAGE} tokens ({len(request.ids)} of the prompt, up to "
                f"{request.limit} new ones, and its drafts), and there are {self.pages.total}: shorten it, lower "
                "max_new_tokens, or load with more cache_tokens"
            )
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
            if threads != torch.get_num_threads():
                torch.set_num_threads(threads)
            self._runner = writer.joint_runner()
            way = (threads, self._runner is not None and self._runner.cuts_are_free)
            if self.pages is not None and way != self._way:
                self.pages.forget()
                self._way = way
        return True

    @torch.inference_mode()
    def turn(self) -> None:
        """Admits who fits and runs one round."""
        self._leave([text for text in self._running if text.handle.cancelled()])
        self._admit()
        resting = [text for text in self._running if text.wanted is None]
        stepping = [text for text in resting if text.stream.decoder.stats.new_tokens]  # the others read their prompts
        company.introduce(_decoders(stepping), len(self._running) == 1)
        start, drafted = perf_counter(), 0.0
        self._go_on(resting)
        while drafting := [text for text in self._running if _hurries(text) and not isinstance(text.wanted, MainRows)]:
            modules = [text for text in drafting if isinstance(text.wanted, ModuleRows)]
            if modules:
                drafted += company.foresee(_decoders(modules), first=not drafted)
            self._run(drafting)
        verifying, reading = [text for text in self._running if _hurries(text)], self._reading()
        verified = [] if reading else _decoders(verifying)
        for text in verifying:
            text.rows = text.wanted.rows if text.wanted is not None else 1
        seconds = self._run(verifying + reading)
        company.learn(verified, seconds, drafted, perf_counter() - start - seconds)

    def _admit(self) -> None:
        while len(self._running) < self.most:
            with self._wake:
                if not self._waiting:
                    return
                request, writer, handle = self._waiting[0]
            lease = None
            if handle.cancelled():
                self._waiting.popleft()
                continue
            if self.pages is not None:
                prompt = request.ids if self._way[1] else []  # elsewhere rows depend on their passes: nothing is shared
                if not self._is_being_read(request, prompt):
                    lease = self.pages.lease(prompt, request.room, request.strict)
                if lease is None:
                    return  # first come first served: nobody overtakes
            self._waiting.popleft()
            self._open(request, writer, handle, lease)

    def _is_being_read(self, request: Request, prompt: Sequence[int]) -> bool:
        """Whether a running text is about to fill pages that a prompt begins with: waiting for them costs less."""
        assert self.pages is not None
        for text in self._running:
            soon = self.pages.will_share(prompt, text.request.ids)
            if text.lease is None or soon <= text.lease.published or (request.strict and not text.request.strict):
                continue
            if soon > len(self.pages.shared(prompt, request.strict)) * PAGE:
                return True
        return False

    def _open(self, request: Request, writer: Writer, handle: Handle, lease: Lease | None) -> None:
        try:
            self._running.append(_Text(request, writer.begin(request, lease=lease), handle, lease))
        except BaseException as error:  # the request's own: others go on
            handle.fail(error)
            if lease is not None:
                lease.end()

    def _reading(self) -> list[_Text]:
        """Returns the texts whose prompts are read in this round: those that have waited longest."""
        found, rows = list[_Text](), 0
        self._round += 1
        for text in sorted(self._running, key=lambda text: text.read):
            if text.wanted is None or not text.wanted.prompt or (found and rows + text.wanted.rows > PROMPT_ROWS):
                continue
            found.append(text)
            rows, text.read = rows + text.wanted.rows, self._round
        return found

    def _run(self, texts: Sequence[_Text]) -> float:
        """Runs the passes that texts wait for, then their own work up to the next ones; returns the passes' seconds."""
        wanted, start = [text.wanted for text in texts if text.wanted is not None], perf_counter()
        if not wanted:
            return 0.0
        assert self._runner is not None
        try:
            self._runner.run(wanted)
        except BaseException as error:
            for text in texts:
                self._end(text, error)
            return 0.0
        seconds = perf_counter() - start
        self._go_on(texts)
        return seconds

    def _go_on(self, texts: Sequence[_Text]) -> None:
        for text in texts:
            try:
                text.wanted = next(text.stream.work, None)
            except BaseException as error:  # as above
                self._end(text, error)
                continue
            if text.wanted is None:
                while (event := text.stream.pop()) is not None:
                    text.handle.write(event)
                if text.stream.decoder.finished:
                    self._end(text)

    def _leave(self, texts: Sequence[_Text]) -> None:
        for text in list(texts):
            self._running.remove(text)
            text.stream.work.close()  # it holds the stream that holds it: memory is not to wait for the collector
            if text.lease is not None:
                text.lease.end()

    def _end(self, text: _Text, error: BaseException | None = None) -> None:
        self._leave([text])
        if error is None:
            text.handle.finish(text.stream.result)
        else:
            text.handle.fail(error)


def _decoders(texts: Sequence[_Text]) -> list[tuple[Decoder, int]]:
    """Returns the decoders that plan on this machine, and the rows that they wait for, or else had last."""
    found = [(text, text.stream.decoder) for text in texts]
    return [(decoder, text.rows if text.wanted is None else text.wanted.rows) for text, decoder in found
            if isinstance(decoder, Decoder)]  # fmt: skip


def _hurries(text: _Text) -> bool:
    """Whether a text waits for a pass that is no part of reading its prompt."""
    return text.wanted is not None and not text.wanted.prompt
