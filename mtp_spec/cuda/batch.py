"""Texts written side by side on a GPU: those whose steps have one shape take them together (`device_group`).

A round reads prompts, in chunks, launches a step of every group, and then looks at the tokens of the steps before, so
that the GPU never waits for the host. A text is the same as alone, bit for bit: its rows are, and everything else is
its own. Where the host has to draw (a logits processor, a grammar), or drafts have laws of their own (acceptance rules
other than the coupled one), a text has steps of its own, by turns with the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import groupby

from mtp_spec.cache.pages import check_pages
from mtp_spec.cpu.passes import Turn
from mtp_spec.cuda.engine import SharedDecoder
from mtp_spec.cuda.group import Group, Groups, drafting
from mtp_spec.cuda.pages import DeviceLease, room_of
from mtp_spec.cuda.prefill import First
from mtp_spec.model.undisturbed import undisturbed
from mtp_spec.request import Request
from mtp_spec.scheduler import Full, Text, Worker, Writer

# rows of prompts that a round reads at most, or one chunk; and where more texts wait for theirs than take steps
PROMPT_ROWS, HURRIED_ROWS = 256, 2048


class DeviceBatch(Worker):
    """The texts of a model on a GPU.

    Args:
        most: texts that run side by side; with one, texts take turns.
        groups: what outlives a batch: captured steps and the memory that they read.
    """

    def __init__(self, most: int, groups: Groups) -> None:
        super().__init__(most, groups.runtime.model.ranks)
        self.groups = groups
        self._unread, self._first = deque[Text](), deque[First]()
        self._shared: dict[SharedDecoder, Text] = {}  # those that share steps

    def _check(self, request: Request) -> None:
        if self.most > 1:
            check_pages(request, room_of(request, self.groups.runtime.max_context), self.groups.page_count)

    def _begins(self, writer: Writer, threads: int) -> None:
        """Captured steps need no preparation."""

    def _place(self, request: Request) -> DeviceLease | None:
        if self.most == 1:
            return None
        pages, drafts, lease = self.groups.pages, drafting(request), None
        others = [(text.lease, text.request.ids, drafting(text.request)) for text in self._running
                  if isinstance(text.lease, DeviceLease)]  # fmt: skip
        if not pages.is_being_read(request.ids, drafts, others):
            lease = pages.lease(request.ids, room_of(request, self.groups.runtime.max_context), drafts)
        if lease is None:
            raise Full
        return lease

    @undisturbed()
    def turn(self) -> None:
        """Admits who fits and runs one round."""
        with self.groups.runtime.turns:
            self._round()

    def _round(self) -> None:
        self._admit()
        resting = [text for text in self._running if text.wanted is None]
        self._go_on(resting)
        for text in resting:
            if isinstance(text.wanted, Turn):  # its first one: its prompt
                self._unread.append(text)
                self._shared[_shared(text)] = text
        self._draw_first()
        read = self._read()
        groups = self.groups.stepping()
        alone = not read and sum(len(group.texts) for group in groups) == len(self._running)
        for group in groups:
            self._step(group, alone and len(groups) == 1)

    def _step(self, group: Group, alone: bool) -> None:
        try:
            group.launch(alone)
            done = group.finish()
        except BaseException as error:
            self._fail([self._shared[decoder] for decoder in group.texts], error)
            return
        self._take_turns(done)

    def _measured(self) -> list[float]:
        return self.groups.measured()

    def _learn(self, times: Sequence[float]) -> None:
        self.groups.learn(times)

    def _take_turns(self, decoders: Sequence[SharedDecoder]) -> None:
        """Lets texts go on to their next step, who have the results of the last one."""
        # who is not there has ended while the step was on its way
        self._go_on([self._shared[decoder] for decoder in decoders if decoder in self._shared])

    def _draw_first(self) -> None:
        while self._first:
            first = self._first.popleft()
            self.groups.runtime.model.ranks.wait(first.ended)
            record = self.groups.reader.done(first)
            for slot, (text, token, failed) in enumerate(zip(first.texts, *record, strict=True)):
                turn = text.turn
                turn.tokens, turn.path, turn.failed = [token], [0], bool(failed)
                turn.logits = None if first.logits is None else first.logits[slot : slot + 1]
            self._take_turns(first.texts)

    def _read(self) -> int:
        """Reads some prompts; returns how many rows that were."""
        rows, unread = 0, self._unread
        while unread and (rows < PROMPT_ROWS or (2 * len(unread) > len(self._running) and rows < HURRIED_ROWS)):
            some = [unread[0]]
            try:
                some, more, first = self._read_some()
                if first is not None:
                    self._first.append(first)
                    self._join(some, first)
            except BaseException as error:  # their own: others go on
                self._fail(some, error)
                continue
            rows += more
        return rows

    def _join(self, some: Sequence[Text], first: First) -> None:
        """Lets texts, whose prompts were read, take their steps."""
        state, slot = self.groups.reader.state, 0
        for text in some:
            self._unread.remove(text)
            text.read = 1
        for group, own in groupby(some, lambda text: self.groups.of(text.request)):
            count = len(list(own))
            group.join(first.texts[slot : slot + count], state.part(slot, count))
            slot += count

    def _read_some(self) -> tuple[list[Text], int, First | None]:
        """Reads the prompt of who waits longest, with others that fit into the same pass, or a chunk of it.

        Returns the texts, the pass's rows, and first tokens where the prompts have come to their end.
        """
        reader, oldest, drafts = self.groups.reader, self._unread[0], drafting(self._unread[0].request)
        decoder = _shared(oldest)
        rows = reader.rows(decoder)
        if rows is None:
            return [oldest], *reader.chunk(decoder, drafts)
        some = [text for text in self._unread if drafting(text.request) == drafts
                and reader.fits(_shared(text), rows)][: reader.together(rows)]  # fmt: skip
        return some, *reader.whole([_shared(text) for text in some], rows, drafts)

    def _leave(self, texts: Sequence[Text]) -> None:
        for text in texts:
            if text in self._unread:
                self._unread.remove(text)
            decoder = text.stream.decoder
            if not isinstance(decoder, SharedDecoder):
                continue
            self._shared.pop(decoder, None)
            for group in self.groups.stepping():
                group.leave(decoder)
                if not group.texts:
                    group.clear()
        super()._leave(texts)


def _shared(text: Text) -> SharedDecoder:
    decoder = text.stream.decoder
    assert isinstance(decoder, SharedDecoder)
    return decoder
