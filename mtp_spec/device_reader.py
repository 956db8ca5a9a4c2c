"""Reads the prompts of texts side by side on a GPU, chunk by chunk, and draws their first tokens.

The host does not wait for a first token either: it looks at it when the text has taken its first step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_spec.device_engine import DeviceRuntime, SharedDecoder
from mtp_spec.device_lanes import Lanes
from mtp_spec.device_state import State
from mtp_spec.kernels.sampler import sample


@dataclass(slots=True)
class First:
    """A first token on its way to the host: `[2]` int32, the token and whether there was none."""

    text: SharedDecoder
    record: Tensor
    logits: Tensor
    ended: torch.cuda.Event | None


class Reader:
    """Reads prompts, one after another, each into its lane."""

    def __init__(self, runtime: DeviceRuntime, lanes: Lanes) -> None:
        self.runtime, device = runtime, runtime.model.device
        self.state = State(runtime.model, runtime.max_context, lanes.caches,
                           torch.zeros(1, dtype=torch.int32, device=device))  # fmt: skip
        self.text: SharedDecoder | None = None
        self._read, self._ids = 0, torch.empty(0)

    def read(self, text: SharedDecoder, drafts: bool) -> tuple[int, First | None]:
        """Reads the next chunk; returns its rows, and at the prompt's end the first token, which the state then has.

        Args:
            drafts: for the MTP modules too.
        """
        state, prompt, model = self.state, text.tokens, self.runtime.model
        if self.text is not text:
            self.text, self._read = text, 0
            state.reset(text.sampler.params, prompt)
            assert state.lanes is not None
            state.lanes.fill_(text.lane.first)
            self._ids = state.sent(prompt, torch.int64)
        chunk = self.runtime.prefill(state, len(prompt), self._read, drafts)
        hidden = chunk(self._ids, self._read)
        self._read += len(hidden)
        if self._read < len(prompt):
            return chunk.rows, None
        last = hidden[-1:]
        logits = model.logits(last)
        request = torch.zeros(1, dtype=torch.int32, device=logits.device)
        position = torch.full((1,), len(prompt), dtype=torch.int64, device=logits.device)
        drawn = sample(logits, request, position, state.settings, text.stages)
        state.start(drawn.tokens[:, 0].long(), last, len(prompt), text.stages.penalty)
        cuda = logits.is_cuda
        host = torch.empty(2, dtype=torch.int32, pin_memory=cuda)
        host.copy_(torch.cat((drawn.tokens[0], drawn.failed)), non_blocking=True)
        ended = None
        if cuda:
            ended = torch.cuda.Event()
            ended.record()
        self.text = None
        return chunk.rows, First(text, host, logits, ended)
