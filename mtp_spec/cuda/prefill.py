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
from mtp_spec.cuda.pages import READ_SEQUENCES, STEP_ROWS, DevicePages
from mtp_spec.cuda.prompts import Piece, read_pieces
from mtp_spec.cuda.runtime import DeviceRuntime
from mtp_spec.cuda.sequence import DeviceSequence
from mtp_spec.cuda.state import PREFILL_ROWS, Mail, State, settings_of, union
from mtp_spec.cuda.step import Prefill
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

    sequences: Seq[DeviceSequence]
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
        self.inbox = torch.zeros(state.sequences, rows + 1 + SENT, dtype=torch.int64, device=device)
        self.record, self.logits = torch.empty(0), torch.empty(0)
        self._sequence = torch.arange(state.sequences, device=device)
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
        last = prefill.hidden.unflatten(0, (state.sequences, prefill.rows))[self._sequence, end]
        del prefill.hidden  # lets the captured passes reuse this memory
        self.logits = self.model.logits(last)
        self.record = draw(self.logits, state, last, self._sequence, count, self.stages, self.stages.penalty)


class Reader:
    """Prefills prompts, each into its pages.

    Attributes:
        state: holds the sequences that were prefilled last, in its first slots.
    """

    def __init__(self, runtime: DeviceRuntime, pages: DevicePages) -> None:
        self.runtime, self.pages, device = runtime, pages, runtime.model.device
        self._most = min(READ_SEQUENCES, pages.most)
        places = pages.one(pages.idle_row).repeat(self._most, 1)
        self.state = State(runtime.model, runtime.max_context, pages.caches, places)
        self._one = self.state.part(0, 1)
        self._sequence: DeviceSequence | None = None
        self._read = 0
        self._ids: Tensor | None = None
        self._mail = Mail(self._most * (PREFILL_ROWS[-1] + 1 + SENT), device)
        self._rooms: list[Tensor] = []
        self._constants = Constants(device)
        self._biased: list[int] = []  # slots whose last sequences had a logit_bias

    def rows(self, sequence: DeviceSequence) -> int | None:
        """Returns the rows of a single pass over the uncached part of a prompt; None if it has to be chunked."""
        return (
            None
            if sequence is self._sequence
            else next((rows for rows in PREFILL_ROWS if self.fits(sequence, rows)), None)
        )

    def fits(self, sequence: DeviceSequence, rows: int) -> bool:
        """Whether a pass of `rows` rows holds the uncached part of a prompt and writes only to its own pages."""
        lease = sequence.lease
        if lease.reused < lease.expanded:
            return False
        # penalties count the cached tokens too, which are not sent
        if sequence.kind.guided or (lease.reused and sequence.stages.penalty):
            return False
        return len(sequence.tokens) - lease.reused <= rows <= lease.slots - lease.reused

    def alike(self, sequences: Iterable[DeviceSequence], rows: int, drafts: bool) -> list[DeviceSequence]:
        """Returns those that can share a pass of `rows` rows; if there are too many, those that need so many first."""
        some = [sequence for sequence in sequences if sequence.drafts == drafts and self.fits(sequence, rows)]
        most, fewer = min(self._most, STEP_ROWS // rows), [size for size in PREFILL_ROWS if size < rows]
        if len(some) > most and fewer:
            some.sort(key=lambda sequence: self.fits(sequence, fewer[-1]))
        return some[:most]

    def whole(self, sequences: Seq[DeviceSequence], rows: int, drafts: bool) -> tuple[int, First]:
        """Prefills prompts with up to `rows` uncached tokens in one pass; returns its rows and the first tokens.

        Args:
            drafts: whether the MTP modules run too.
        """
        slots, stages = (
            min(self._most, 1 << (len(sequences) - 1).bit_length()),
            union({sequence.stages for sequence in sequences}),
        )
        if self.runtime.graphs is None:
            slots, rows = len(sequences), max(len(sequence.tokens) - sequence.lease.reused for sequence in sequences)
        self._set_biases(sequences)

        def make() -> Whole:
            return Whole(self.runtime, self.pages.tables, self.state.part(0, slots), rows, drafts, stages)

        one = make() if self.runtime.graphs is None else self.runtime.kept((self, slots, rows, drafts, stages), make)
        letters = [self._letter(sequence, rows) for sequence in sequences]
        nobody = [0] * (rows + 1) + [self.pages.idle_row, 0, 1, *[0] * (SENT - SEED)]
        self._mail.send(one.inbox, letters + [nobody] * (slots - len(sequences)))
        one.read()
        for sequence in sequences:
            sequence.has_read(len(sequence.tokens))
        return slots * rows, self._first(sequences, one.record, one.logits)

    def chunk(
        self, sequences: Seq[DeviceSequence], most: int, drafts: bool
    ) -> tuple[int, list[DeviceSequence], First | None]:
        """Prefills the next chunk of the first prompt, and others in the same pass.

        Args:
            sequences: the prompt that has waited longest, then others that may share its last pass.
            most: most rows, if the chunk is attended in the expanded form.
            drafts: whether the MTP modules run too.

        Returns the pass's rows, the sequences it completed, and their first tokens.
        """
        sequence = sequences[0]
        if self._sequence is not sequence:
            self._sequence, self._read, self._ids = sequence, sequence.lease.reused, None
            self._biased = [slot for slot in self._biased if slot]
            self._begin(sequence, 0)
        if self._read < sequence.lease.expanded:
            return self._long(sequences, most, drafts)
        state, prompt = self._one, sequence.tokens
        if self._ids is None:
            self._ids = state.sent(prompt, torch.int64)
        read = self.runtime.prefill(self, state, len(prompt), self._read, drafts)
        hidden = read(self._ids, self._read)
        self._read += len(hidden)
        sequence.has_read(self._read)
        if self._read < len(prompt):
            return read.rows, [], None
        self._sequence = None
        return read.rows, [sequence], self._draw([sequence], hidden[-1:])

    def _long(
        self, sequences: Seq[DeviceSequence], most: int, drafts: bool
    ) -> tuple[int, list[DeviceSequence], First | None]:
        """Prefills as many rows as a pass may have."""
        sequence = sequences[0]
        rows = min(most, len(sequence.tokens) - self._read)
        pieces, read, left = [Piece(sequence.tokens, self._read, rows, sequence.lease.reused)], [sequence], most - rows
        if pieces[0].end == len(sequence.tokens) and not sequence.kind.guided:
            for other in sequences[1:]:
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
        if self._read < len(sequence.tokens):
            return most - left, [], None
        self._sequence = None
        lasts = self.state.sent([*accumulate(piece.rows for piece in pieces)], torch.int64) - 1
        return most - left, read, self._draw(read, hidden[lasts])

    def _begin(self, sequence: DeviceSequence, slot: int) -> None:
        """Prepares a slot of the state for a prompt."""
        state = self.state.part(slot, 1)
        state.reset(sequence.params, sequence.tokens, sequence.lease.reused)
        if sequence.stages.bias:
            self._biased = [*{*self._biased, slot}]
        assert state.pages is not None
        state.pages.copy_(self.pages.tables[sequence.lease.row])

    def _draw(self, sequences: Seq[DeviceSequence], last: Tensor) -> First:
        """Draws the first tokens after prompts, from their last hidden states `[B, D]`."""
        state, model = self.state.part(0, len(sequences)), self.runtime.model
        count = state.sent([len(sequence.tokens) for sequence in sequences], torch.int64)
        raw = logits = model.logits(last.contiguous())
        stages = union([remaining(sequence.stages, sequence.kind.guided) for sequence in sequences])
        if sequences[0].kind.guided:
            if sequences[0].kind.guided == "rows":
                model.ranks.wait()
            logits = guide_first(sequences[0], raw, state, self._constants)
        places = torch.arange(len(sequences), device=count.device)
        record = draw(
            logits, state, last, places, count, stages, any(sequence.stages.penalty for sequence in sequences)
        )
        return self._first(sequences, record, raw)

    def drop(self, sequence: DeviceSequence) -> None:
        """Drops a sequence whose prefill is not complete."""
        if self._sequence is sequence:
            self._sequence = None

    def done(self, first: First) -> list[list[int]]:
        """Returns the record of first tokens that have arrived; its buffer is reused."""
        self._rooms.append(first.room)
        return first.record[:, : len(first.sequences)].tolist()

    def _letter(self, sequence: DeviceSequence, rows: int) -> list[int]:
        prompt, params = sequence.tokens, sequence.params
        bits = np.array(settings_of(params)).view(np.int64).tolist()
        unread = prompt[sequence.lease.reused :]
        padding = [prompt[-1]] * (rows + 1 - len(unread))
        return [
            *unread,
            *padding,
            sequence.lease.row,
            sequence.lease.reused,
            len(prompt),
            seed_bits(params.known_seed),
            *bits,
        ]

    def _set_biases(self, sequences: Seq[DeviceSequence]) -> None:
        bias = self.state.settings.bias
        assert bias is not None
        for slot in self._biased:
            bias[slot].zero_()
        self._biased = [slot for slot, sequence in enumerate(sequences) if sequence.stages.bias]
        for slot in self._biased:
            self.state.add_bias(slot, sequences[slot].sampler.params)

    def _first(self, sequences: Seq[DeviceSequence], record: Tensor, logits: Tensor) -> First:
        cuda, told = record.is_cuda, any(sequence.params.logprobs for sequence in sequences)
        room = self._rooms.pop() if self._rooms else torch.empty(2 * self._most, dtype=torch.int32, pin_memory=cuda)
        host = room[: record.numel()].view(record.shape)
        host.copy_(record, non_blocking=True)
        ended = None
        if cuda:
            ended = torch.cuda.Event()
            ended.record()
        # later passes overwrite the logits
        return First(sequences, room, host, logits.clone() if told else None, ended)


def draw(
    logits: Tensor, state: State, last: Tensor, sequence: Tensor, count: Tensor, stages: Stages, seen: bool
) -> Tensor:
    """Draws the first tokens after prompts of `count` `[B]` int64 tokens and starts the state with them.

    Args:
        logits: `[B, V]` of the last hidden states `last` `[B, D]`.
        sequence: `[B]` 0, 1, ... as int64.
        seen: whether tokens are counted for penalties.

    Returns `[2, B]` int32: the tokens and whether there was none to draw.
    """
    drawn = sample(logits, sequence.int(), count, state.settings, stages)
    state.start(drawn.tokens[:, 0].long(), last, count, seen)
    return torch.stack((drawn.tokens[:, 0], drawn.failed))
