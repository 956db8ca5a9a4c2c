"""Reads the prompts of texts side by side on a GPU and draws their first tokens.

Short prompts are read whole, several in a pass; a long one chunk by chunk, between the steps of other texts. The host
does not wait for a first token either: it looks at it when the text has taken its first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_spec.device_engine import DeviceRuntime, SharedDecoder
from mtp_spec.device_lanes import READ_TEXTS, STEP_ROWS, Lanes
from mtp_spec.device_state import PREFILL_ROWS, State, union
from mtp_spec.device_step import Prefill
from mtp_spec.kernels.sampler import sample


@dataclass(slots=True)
class First:
    """First tokens on their way to the host: `[2, B]` int32, the tokens and whether there was none; logits `[B, V]`."""

    texts: Sequence[SharedDecoder]
    record: Tensor
    logits: Tensor
    ended: torch.cuda.Event | None


class Reader:
    """Reads prompts, each into its lane.

    Attributes:
        state: has the texts that were read last, in its first slots.
    """

    def __init__(self, runtime: DeviceRuntime, lanes: Lanes) -> None:
        self.runtime, self.lanes, device = runtime, lanes, runtime.model.device
        places = torch.full((READ_TEXTS,), lanes.idle, dtype=torch.int32, device=device)
        self.state = State(runtime.model, runtime.max_context, lanes.caches, places)
        self._one = self.state.part(0, 1)
        self._text: SharedDecoder | None = None
        self._read, self._ids = 0, torch.empty(0)

    def rows(self, text: SharedDecoder) -> int | None:
        """Returns the rows of a pass that reads the whole prompt; None where it is to be read in chunks."""
        fitting = (rows for rows in PREFILL_ROWS if len(text.tokens) <= rows <= self._one.caches[0].capacity)
        return None if text is self._text else next(fitting, None)

    def together(self, rows: int) -> int:
        """Returns how many prompts of up to so many tokens are read in one pass."""
        return min(READ_TEXTS, STEP_ROWS // rows)

    def whole(self, texts: Sequence[SharedDecoder], rows: int, drafts: bool) -> tuple[int, First]:
        """Reads prompts of up to `rows` tokens in one pass; returns its rows, and the first tokens.

        Args:
            drafts: for the MTP modules too.
        """
        slots = 1 << (len(texts) - 1).bit_length()
        if self.runtime.graphs is None:
            slots, rows = len(texts), max(len(text.tokens) for text in texts)
        state, idle = self.state.part(0, slots), slots - len(texts)
        for slot, text in enumerate(texts):
            state.part(slot, 1).reset(text.sampler.params, text.tokens)
        assert state.lanes is not None
        state.lanes.copy_(state.sent([*(text.lane.first for text in texts), *[self.lanes.idle] * idle], torch.int32))

        def make() -> Prefill:
            return Prefill(self.runtime.model, state, rows, drafts, self.runtime.graphs)

        read = self.runtime.kept((self, slots, rows, drafts), make) if self.runtime.graphs is not None else make()
        prompts = [*(text.tokens for text in texts), *[[0]] * idle]
        last = read.whole(prompts)
        return slots * rows, self._draw(state, texts, last, [len(prompt) for prompt in prompts])

    def chunk(self, text: SharedDecoder, drafts: bool) -> tuple[int, First | None]:
        """Reads the next chunk of a prompt; returns its rows, and at the prompt's end the first token."""
        state, prompt = self._one, text.tokens
        if self._text is not text:
            self._text, self._read = text, 0
            state.reset(text.sampler.params, prompt)
            assert state.lanes is not None
            state.lanes.fill_(text.lane.first)
            self._ids = state.sent(prompt, torch.int64)
        read = self.runtime.prefill(state, len(prompt), self._read, drafts)
        hidden = read(self._ids, self._read)
        self._read += len(hidden)
        if self._read < len(prompt):
            return read.rows, None
        self._text = None
        return read.rows, self._draw(state, [text], hidden[-1:], [len(prompt)])

    def _draw(self, state: State, texts: Sequence[SharedDecoder], last: Tensor, lengths: list[int]) -> First:
        """Draws the tokens after prompts whose last hidden states are `[B, D]`, with which the state starts."""
        logits, stages = self.runtime.model.logits(last), union([text.stages for text in texts])
        request = torch.arange(len(last), dtype=torch.int32, device=last.device)
        position = state.sent(lengths, torch.int64)
        drawn = sample(logits, request, position, state.settings, stages)
        state.start(drawn.tokens[:, 0].long(), last, position, stages.penalty)
        host = torch.empty(2, len(last), dtype=torch.int32, pin_memory=last.is_cuda)
        host.copy_(torch.stack((drawn.tokens[:, 0], drawn.failed)), non_blocking=True)
        ended = None
        if last.is_cuda:
            ended = torch.cuda.Event()
            ended.record()
        return First(texts, host, logits, ended)
