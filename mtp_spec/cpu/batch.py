"""Texts written side by side on a CPU: whoever comes is admitted while others are in the middle of theirs.

A round brings every text one step further. Drafting comes first: while any text drafts, those that do run their passes
together. Then one pass verifies all trees. Prompts are read beside it, about one chunk a round and by turns, so that a
long one holds up neither the texts nor the other prompts. One thread does all of it (`worker`).

A text is the same as alone, bit for bit: its rows are (`passes`), and everything else is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch

from mtp_spec.cache.pages import HostLease, HostPages, Lease, check_pages
from mtp_spec.cpu import batch_context as company
from mtp_spec.cpu.engine import Decoder
from mtp_spec.cpu.passes import MainRows, ModuleRows, Runner, Turn
from mtp_spec.model.distributed.group import Ranks
from mtp_spec.model.undisturbed import undisturbed
from mtp_spec.request import Request
from mtp_spec.scheduler import Full, Text, Worker, Writer

# rows of prompts that a round reads at most, or one chunk
PROMPT_ROWS = 256


class Batch(Worker):
    """Texts that share passes.

    Args:
        most: texts that run side by side; others wait.
        pages: the memory of their caches; who finds none free waits. None where texts have memory of their own.
        ranks: those that share the model.
    """

    def __init__(self, most: int, pages: HostPages | None, ranks: Ranks) -> None:
        super().__init__(most, ranks)
        self.pages, self._round = pages, 0
        self._runner: Runner | None = None
        self._way = (0, False)  # how the caches' rows are computed: threads, and whether one way is as good as another

    def _check(self, request: Request) -> None:
        if self.pages is not None:
            check_pages(request, request.room, self.pages.total)

    def _begins(self, writer: Writer, threads: int) -> None:
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
        self._runner = writer.joint_runner()
        way = (threads, self._runner is not None and self._runner.technique == "batched")
        if self.pages is not None and way != self._way:
            self.pages.forget()
            self._way = way

    @undisturbed()
    def turn(self) -> None:
        """Admits who fits and runs one round."""
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
        company.learn(verified, seconds, drafted, perf_counter() - start - seconds, self.lockstep.ranks)

    def _place(self, request: Request) -> HostLease | None:
        if self.pages is None:
            return None
        prompt = request.ids if self._way[1] else []  # elsewhere rows depend on their passes: nothing is shared
        others = [(text.lease, text.request.ids, text.request.strict) for text in self._running
                  if isinstance(text.lease, Lease)]  # fmt: skip
        lease = None
        if not self.pages.is_being_read(prompt, request.strict, others):
            lease = self.pages.lease(prompt, request.room, request.strict)
        if lease is None:
            raise Full
        return lease

    def _reading(self) -> list[Text]:
        """Returns the texts whose prompts are read in this round: those that have waited longest."""
        found, rows = list[Text](), 0
        self._round += 1
        for text in sorted(self._running, key=lambda text: text.read):
            if text.wanted is None or not text.wanted.prompt or (found and rows + text.wanted.rows > PROMPT_ROWS):
                continue
            found.append(text)
            rows, text.read = rows + text.wanted.rows, self._round
        return found

    def _run(self, texts: Sequence[Text]) -> float:
        """Runs the passes that texts wait for, then their own work up to the next ones; returns the passes' seconds."""
        wanted = [text.wanted for text in texts if text.wanted is not None and not isinstance(text.wanted, Turn)]
        start = perf_counter()
        if not wanted:
            return 0.0
        assert self._runner is not None
        try:
            self._runner.run(wanted)
        except BaseException as error:
            self._fail(texts, error)
            return 0.0
        seconds = perf_counter() - start
        self._go_on(texts)
        return seconds


def _decoders(texts: Sequence[Text]) -> list[tuple[Decoder, int]]:
    """Returns the decoders that plan on this machine, and the rows that they wait for, or else had last."""
    found = [(text, text.stream.decoder) for text in texts]
    return [(decoder, text.rows if text.wanted is None else text.wanted.rows) for text, decoder in found
            if isinstance(decoder, Decoder)]  # fmt: skip


def _hurries(text: Text) -> bool:
    """Whether a text waits for a pass that is no part of reading its prompt."""
    return text.wanted is not None and not text.wanted.prompt
