"""Texts written side by side on a GPU: those whose steps have one shape take them together (`device_group`).

A round reads prompts, in chunks, launches a step of every group, and then looks at the tokens of the steps before, so
that the GPU never waits for the host. A text is the same as alone, bit for bit: its rows are, and everything else is
its own. Where the host has to draw (a logits processor, a grammar), or drafts have laws of their own (acceptance rules
other than the coupled one), a text has steps of its own, by turns with the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from mtp_spec.device_engine import SharedDecoder
from mtp_spec.device_group import Group, Groups, drafting
from mtp_spec.device_lanes import Lane
from mtp_spec.device_reader import First
from mtp_spec.device_state import PREFILL_ROWS, SLACK
from mtp_spec.passes import Turn
from mtp_spec.requests import Request
from mtp_spec.worker import Full, Text, Worker, Writer

# rows of prompts that a round reads at most, or one chunk; and where more texts wait for theirs than take steps
PROMPT_ROWS, HURRIED_ROWS = 256, 2048


class DeviceBatch(Worker):
    """The texts of a model on a GPU.

    Args:
        most: texts that run side by side; with one, texts take turns.
        groups: what outlives a batch: captured steps and the memory that they read.
    """

    def __init__(self, most: int, groups: Groups) -> None:
        super().__init__(most)
        self.groups = groups
        self._unread, self._first = deque[Text](), deque[First]()

    def _check(self, request: Request) -> None:
        """Every text fits: a lane has room for the longest."""

    def _begins(self, writer: Writer, threads: int) -> None:
        """Captured steps need no preparation."""

    def _place(self, request: Request) -> Lane | None:
        if self.most == 1:
            return None
        lane = self.groups.lanes.take()
        if lane is None:
            raise Full
        lane.used = min(lane.capacity, len(request.ids) + max(request.limit + SLACK, PREFILL_ROWS[-1]))
        return lane

    @torch.inference_mode()
    def turn(self) -> None:
        """Admits who fits and runs one round."""
        with self.groups.runtime.turns:
            self._round()

    def _round(self) -> None:
        self._admit()
        self._go_on([text for text in self._running if text.wanted is None])
        self._unread.extend(text for text in self._running if isinstance(text.wanted, Turn) and text.wanted.prompt
                            and not text.read and text not in self._unread)  # fmt: skip
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
            ours = group.texts
            group.clear()
            for text in [text for text in self._running if text.stream.decoder in ours]:
                self._end(text, error)
            return
        self._take_turns(done)

    def _take_turns(self, decoders: Sequence[SharedDecoder]) -> None:
        """Lets texts go on to their next step, who have the results of the last one."""
        texts = {text.stream.decoder: text for text in self._running}
        for decoder in decoders:
            text = texts.get(decoder)
            if text is not None:  # else it has ended while the step was on its way
                self._go_on([text])

    def _draw_first(self) -> None:
        while self._first:
            first = self._first.popleft()
            self.groups.runtime.model.ranks.wait(first.ended)
            for slot, (text, token, failed) in enumerate(zip(first.texts, *first.record.tolist(), strict=False)):
                turn = text.turn
                turn.tokens, turn.path, turn.failed = [token], [0], bool(failed)
                turn.logits = first.logits[slot : slot + 1]
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
                    for slot, text in enumerate(some):
                        unread.remove(text)
                        text.read = 1
                        self.groups.of(text.request).join(first.texts[slot], self.groups.reader.state.part(slot, 1))
            except BaseException as error:  # their own: others go on
                for text in some:
                    self._end(text, error)
                continue
            rows += more
        return rows

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
                and len(_shared(text).tokens) <= rows][: reader.together(rows)]  # fmt: skip
        return some, *reader.whole([_shared(text) for text in some], rows, drafts)

    def _leave(self, texts: Sequence[Text]) -> None:
        for text in texts:
            if text in self._unread:
                self._unread.remove(text)
            decoder = text.stream.decoder
            if not isinstance(decoder, SharedDecoder):
                continue
            for group in self.groups.stepping():
                group.leave(decoder)
                if not group.texts:
                    group.clear()
        super()._leave(texts)


def _shared(text: Text) -> SharedDecoder:
    decoder = text.stream.decoder
    assert isinstance(decoder, SharedDecoder)
    return decoder
