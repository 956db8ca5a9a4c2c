"""Prefill on a GPU: processes prompts and draws their first tokens.

Short prompts are processed whole, several in a pass that also draws their first tokens: all inputs go to the device in
one copy, and one graph does the rest. A long prompt is processed in chunks, between the steps of other sequences; where
its rows are attended in the expanded form (`prompts`), in few long ones, the last with other prompts. The host does not
wait for a first token: it reads it after the sequence's first step was launched.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from mtp_spec.cuda.constants import Constants
from mtp_spec.cuda.guided import guide_first, remaining
from mtp_spec.cuda.pages import READ_TEXTS, STEP_ROWS, DevicePages
from mtp_spec.cuda.prompts import Piece, read_pieces
from mtp_spec.cuda.runtime import DeviceRuntime
from mtp_spec.cuda.state import PREFILL_ROWS, Mail, State, settings_of, union
from mtp_spec.cuda.step import Prefill
from mtp_spec.cuda.text import DeviceText
from mtp_spec.kernels.sampler import COLUMNS, IN_PROMPT, Stages, sample, seed_bits

# numbers sent with a prompt: its row of the page table, its numbers of cached tokens and of all tokens, its seed, and
# its settings, as bits
TABLE, FIRST, COUNT, SEED, SETTINGS = range(5)
SENT = SETTINGS + COLUMNS


@dataclass(slots=True)
class First:
    """First tokens in transit to the host.

    Attributes:
        room: the host buffer that `record` is a view of.
        record: `[2, slots]` int32, the tokens and whether there was none to draw.
        logits: `[slots, V]`, if any request asked for them.
    """

    texts: Seq[DeviceText]
    room: Tensor
    record: Tensor
    logits: Tensor | None
    ended: torch.cuda.Event | None


class Whole:
    """A pass that prefills prompts with up to `rows` uncached tokens and draws their first tokens; see `Graphs.later`.

    Args:
        tables: the page tables.
        state: of the prompts' slots.
        drafts: whether the MTP modules run too.
        stages: the sampling stages that any sequence needs.
    Attributes:
        inbox: `[B, rows + 1 + SENT]` int64: the uncached tokens of prompts, padded with their last token, and the
            numbers sent with them.
        record: `[2, B]` int32, result, valid until the next pass or step.
        logits: `[B, V]`, likewise.
    """

    def __init__(
        self, runtime: DeviceRuntime, tables: Tensor, state: State, rows: int, drafts: bool, stages: Stages
    ) -> None:
        self.model, self.tables, self.state, self.stages = runtime.model, tables, state, stages
        self._prefill = Prefill(runtime.model, state, rows, drafts)
        device = runtime.model.device
        self.inbox = torch.zeros(state.texts, rows + 1 + SENT, dtype=torch.int64, device=device)
        self.record, self.logits = torch.empty(0), torch.empty(0)
        self._text = torch.arange(state.texts, device=device)
        self.read = self._run if runtime.graphs is None else runtime.graphs.later(self._run)

    def _run(self) -> None:
        state, prefill, settings = self.state, self._prefill, self.state.settings
        ids, sent = self.inbox[:, : prefill.rows + 1], self.inbox[:, prefill.rows + 1 :]
        first, count = sent[:, FIRST].clone(), sent[:, COUNT].clone()
        state.forget()
        state.length.copy_(first)
        state.begun.copy_(first)
        assert state.pages is not None
        torch.index_select(self.tables, 0, sent[:, TABLE].contiguous(), out=state.pages)
        settings.seed.copy_(sent[:, SEED])
        settings.values.copy_(sent[:, SETTINGS:].view(torch.float64))
        if self.stages.penalty and settings.seen is not None:
            settings.seen.zero_().scatter_(1, ids, IN_PROMPT)
        prefill.ids.copy_(ids)
        end = count - first - 1
        prefill.following.copy_(end)
        prefill.run()
        last = prefill.hidden.unflatten(0, (state.texts, prefill.rows))[self._text, end]
        del prefill.hidden  # lets the captured passes reuse this memory
        self.logits = self.model.logits(last)
        self.record = draw(self.logits, state, last, self._text, count, self.stages, self.stages.penalty)


class Reader:
    """Prefills prompts, each into its pages.

    Attributes:
        state: holds the sequences that were prefilled last, in its first slots.
    """

    def __init__(self, runtime: DeviceRuntime, pages: DevicePages) -> None:
        self.runtime, self.pages, device = runtime, pages, runtime.model.device
        self._most = min(READ_TEXTS, pages.most)
        places = pages.one(pages.idle_row).repeat(self._most, 1)
        self.state = State(runtime.model, runtime.max_context, pages.caches, places)
        self._one = self.state.part(0, 1)
        self._text: DeviceText | None = None
        self._read = 0
        self._ids: Tensor | None = None
        self._mail = Mail(self._most * (PREFILL_ROWS[-1] + 1 + SENT), device)
        self._rooms: list[Tensor] = []
        self._constants = Constants(device)
        self._biased: list[int] = []  # slots whose last texts had a logit_bias

    def rows(self, text: DeviceText) -> int | None:
        """Returns the rows of a single pass over the uncached part of a prompt; None if it has to be chunked."""
        return None if text is self._text else next((rows for rows in PREFILL_ROWS if self.fits(text, rows)), None)

    def fits(self, text: DeviceText, rows: int) -> bool:
        """Whether a pass of `rows` rows holds the uncached part of a prompt and writes only to its own pages."""
        lease = text.lease
        if lease.reused < lease.expanded:
            return False
        # penalties count the cached tokens too, which are not sent
        if text.kind.guided or (lease.reused and text.stages.penalty):
            return False
        return len(text.tokens) - lease.reused <= rows <= lease.slots - lease.reused

    def alike(self, texts: Iterable[DeviceText], rows: int, drafts: bool) -> list[DeviceText]:
        """Returns those that can share a pass of `rows` rows; if there are too many, those that need so many first."""
        some = [text for text in texts if text.drafts == drafts and self.fits(text, rows)]
        most, fewer = min(self._most, STEP_ROWS // rows), [size for size in PREFILL_ROWS if size < rows]
        if len(some) > most and fewer:
            some.sort(key=lambda text: self.fits(text, fewer[-1]))
        return some[:most]

    def whole(self, texts: Seq[DeviceText], rows: int, drafts: bool) -> tuple[int, First]:
        """Prefills prompts with up to `rows` uncached tokens in one pass; returns its rows and the first tokens.

        Args:
            drafts: whether the MTP modules run too.
        """
        slots, stages = min(self._most, 1 << (len(texts) - 1).bit_length()), union({text.stages for text in texts})
        if self.runtime.graphs is None:
            slots, rows = len(texts), max(len(text.tokens) - text.lease.reused for text in texts)
        self._set_biases(texts)

        def make() -> Whole:
            return Whole(self.runtime, self.pages.tables, self.state.part(0, slots), rows, drafts, stages)

        one = make() if self.runtime.graphs is None else self.runtime.kept((self, slots, rows, drafts, stages), make)
        letters = [self._letter(text, rows) for text in texts]
        nobody = [0] * (rows + 1) + [self.pages.idle_row, 0, 1, *[0] * (SENT - SEED)]
        self._mail.send(one.inbox, letters + [nobody] * (slots - len(texts)))
        one.read()
        for text in texts:
            text.has_read(len(text.tokens))
        return slots * rows, self._first(texts, one.record, one.logits)

    def chunk(self, texts: Seq[DeviceText], most: int, drafts: bool) -> tuple[int, list[DeviceText], First | None]:
        """Prefills the next chunk of the first prompt, and others in the same pass.

        Args:
            texts: the prompt that has waited longest, then others that may share its last pass.
            most: most rows, if the chunk is attended in the expanded form.
            drafts: whether the MTP modules run too.

        Returns the pass's rows, the sequences it completed, and their first tokens.
        """
        text = texts[0]
        if self._text is not text:
            self._text, self._read, self._ids = text, text.lease.reused, None
            self._biased = [slot for slot in self._biased if slot]
            self._begin(text, 0)
        if self._read < text.lease.expanded:
            return self._long(texts, most, drafts)
        state, prompt = self._one, text.tokens
        if self._ids is None:
            self._ids = state.sent(prompt, torch.int64)
        read = self.runtime.prefill(self, state, len(prompt), self._read, drafts)
        hidden = read(self._ids, self._read)
        self._read += len(hidden)
        text.has_read(self._read)
        if self._read < len(prompt):
            return read.rows, [], None
        self._text = None
        return read.rows, [text], self._draw([text], hidden[-1:])

    def _long(self, texts: Seq[DeviceText], most: int, drafts: bool) -> tuple[int, list[DeviceText], First | None]:
        """Prefills as many rows as a pass may have."""
        text = texts[0]
        rows = min(most, len(text.tokens) - self._read)
        pieces, read, left = [Piece(text.tokens, self._read, rows, text.lease.reused)], [text], most - rows
        if pieces[0].end == len(text.tokens) and not text.kind.guided:
            for other in texts[1:]:
                unread = len(other.tokens) - other.lease.reused
                if len(read) < self._most and unread <= left and not other.kind.guided:
                    self._begin(other, len(read))
                    pieces.append(Piece(other.tokens, other.lease.reused, unread, other.lease.reused))
                    read.append(other)
                    left -= unread
        hidden = read_pieces(self.runtime.model, self.state.part(0, len(read)), pieces, drafts)
        for one, piece in zip(read, pieces, strict=True):
            one.has_read(piece.end)
        self._read = pieces[0].end
        if self._read < len(text.tokens):
            return most - left, [], None
        self._text = None
        lasts = self.state.sent([*accumulate(piece.rows for piece in pieces)], torch.int64) - 1
        return most - left, read, self._draw(read, hidden[lasts])

    def _begin(self, text: DeviceText, slot: int) -> None:
        """Prepares a slot of the state for a prompt."""
        state = self.state.part(slot, 1)
        state.reset(text.params, text.tokens, text.lease.reused)
        if text.stages.bias:
            self._biased = [*{*self._biased, slot}]
        assert state.pages is not None
        state.pages.copy_(self.pages.tables[text.lease.row])

    def _draw(self, texts: Seq[DeviceText], last: Tensor) -> First:
        """Draws the first tokens after prompts, from their last hidden states `[B, D]`."""
        state, model = self.state.part(0, len(texts)), self.runtime.model
        count = state.sent([len(text.tokens) for text in texts], torch.int64)
        raw = logits = model.logits(last.contiguous())
        stages = union([remaining(text.stages, text.kind.guided) for text in texts])
        if texts[0].kind.guided:
            if texts[0].kind.guided == "rows":
                model.ranks.wait()
            logits = guide_first(texts[0], raw, state, self._constants)
        places = torch.arange(len(texts), device=count.device)
        record = draw(logits, state, last, places, count, stages, any(text.stages.penalty for text in texts))
        return self._first(texts, record, raw)

    def drop(self, text: DeviceText) -> None:
        """Drops a sequence whose prefill is not complete."""
        if self._text is text:
            self._text = None

    def done(self, first: First) -> list[list[int]]:
        """Returns the record of first tokens that have arrived; its buffer is reused."""
        self._rooms.append(first.room)
        return first.record[:, : len(first.texts)].tolist()

    def _letter(self, text: DeviceText, rows: int) -> list[int]:
        prompt, params = text.tokens, text.params
        bits = np.array(settings_of(params)).view(np.int64).tolist()
        unread = prompt[text.lease.reused :]
        padding = [prompt[-1]] * (rows + 1 - len(unread))
        return [*unread, *padding, text.lease.row, text.lease.reused, len(prompt), seed_bits(params.known_seed), *bits]

    def _set_biases(self, texts: Seq[DeviceText]) -> None:
        bias = self.state.settings.bias
        assert bias is not None
        for slot in self._biased:
            bias[slot].zero_()
        self._biased = [slot for slot, text in enumerate(texts) if text.stages.bias]
        for slot in self._biased:
            self.state.add_bias(slot, texts[slot].sampler.params)

    def _first(self, texts: Seq[DeviceText], record: Tensor, logits: Tensor) -> First:
        cuda, told = record.is_cuda, any(text.params.logprobs for text in texts)
        room = self._rooms.pop() if self._rooms else torch.empty(2 * self._most, dtype=torch.int32, pin_memory=cuda)
        host = room[: record.numel()].view(record.shape)
        host.copy_(record, non_blocking=True)
        ended = None
        if cuda:
            ended = torch.cuda.Event()
            ended.record()
        # later passes overwrite the logits
        return First(texts, room, host, logits.clone() if told else None, ended)


def draw(logits: Tensor, state: State, last: Tensor, text: Tensor, count: Tensor, stages: Stages, seen: bool) -> Tensor:
    """Draws the first tokens after prompts of `count` `[B]` int64 tokens and starts the state with them.

    Args:
        logits: `[B, V]` of the last hidden states `last` `[B, D]`.
        text: `[B]` 0, 1, ... as int64.
        seen: whether tokens are counted for penalties.

    Returns `[2, B]` int32: the tokens and whether there was none to draw.
    """
    drawn = sample(logits, text.int(), count, state.settings, stages)
    state.start(drawn.tokens[:, 0].long(), last, count, seen)
    return torch.stack((drawn.tokens[:, 0], drawn.failed))
