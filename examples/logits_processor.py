"""Rules of one's own about which token may come next: `python examples/logits_processor.py`.

A function sees the ids so far and the logits. An object keeps a state of its own for every path of the draft tree.
Either way the text is that of plain decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

import mtp_spec

lm = mtp_spec.load()
commas = [token for token in range(lm.config.vocab_size) if "," in lm.decode([token])]


def no_comma(ids: list[int], logits: Tensor) -> Tensor:
    """Short sentences: nothing with a comma in it."""
    logits[commas] = -float("inf")
    return logits


class NoRepeat:
    """No run of `size` tokens occurs twice. The state is the ids so far: a tuple, so that branches can share it."""

    def __init__(self, size: int) -> None:
        self.size = size

    def start(self, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        return ()

    def advance(self, state: tuple[int, ...], token: int) -> tuple[int, ...]:
        return (*state, token)

    def apply(self, state: tuple[int, ...], logits: Tensor) -> Tensor:
        before = self.size - 1
        last = state[len(state) - before :]
        for end in range(before, len(state)):
            if state[end - before : end] == last:
                logits[state[end]] = -float("inf")
        return logits


chat = [{"role": "user", "content": "Tell me a story about a fox"}]
processors: list[Any] = [no_comma, NoRepeat(2), [no_comma, NoRepeat(2)]]
for processor in processors:
    plain = lm.chat(chat, logits_processor=processor, max_new_tokens=60, seed=0, speculation=None)
    drafted = lm.chat(chat, logits_processor=processor, max_new_tokens=60, seed=0, speculation=3)
    assert drafted.token_ids == plain.token_ids
    print(f"{drafted.text}\n[{drafted.stats.tokens_per_step:.2f} tokens per step]\n")
