"""What several tests of the GPU model ask of it: texts side by side, and logits processors."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from torch import Tensor

from device_models import FEW, SAMPLING
from lms import assert_same
from mtp_spec.api import LM
from mtp_spec.sampling.processors import Masking
from mtp_spec.speculation import Speculation

WAYS: list[dict[str, Any]] = [*SAMPLING, {"top_k": 4, "logit_bias": FEW}]
SHAPES: list[Any] = [None, None, 1, 3, 3, Speculation(branching=(3, 2, 1)), Speculation(branching=(2, 2), budget=5)]


def wishes(count: int, seed: int, shapes: list[Any] = SHAPES) -> list[tuple[list[int], dict[str, Any]]]:
    """Random prompts and options."""
    dice = random.Random(seed)
    return [([dice.randrange(160) for _ in range(dice.choice((1, 3, 17, 20)))],
             {"max_new_tokens": dice.randrange(1, 9), "seed": dice.randrange(9), "logprobs": dice.choice((0, 0, 2)),
              "speculation": dice.choice(shapes), **dice.choice(WAYS)}) for _ in range(count)]  # fmt: skip


def check(lm: LM, asked: list[tuple[list[int], dict[str, Any]]]) -> None:
    """Submits all of them and compares each with itself alone."""
    handles = [lm.submit(prompt, **options) for prompt, options in asked]
    for handle, (prompt, options) in zip(handles, asked, strict=True):
        assert_same(handle.result(300), lm.generate(prompt, **options))


class Steps:
    """Counts its tokens, and changes rows by that; `check` knows what may be in a text."""

    def start(self, prompt_ids: Any) -> int:
        return 0

    def advance(self, state: int, token: int) -> int:
        return state + 1

    def apply(self, state: int, logits: Tensor) -> Tensor:
        logits[state % 3 :: 3] -= 4.0
        logits[state % 5] = -float("inf")
        return logits

    def check(self, ids: list[int], first: int = 0) -> None:
        assert all(token != (first + i) % 5 for i, token in enumerate(ids))


class Turns(Masking, Steps):
    """Removes other tokens at every place."""

    def mask(self, state: int) -> Any:
        return np.packbits([token % 4 != state % 4 for token in range(160)], bitorder="little")

    def apply(self, state: int, logits: Tensor) -> Tensor:
        logits[state % 4 :: 4] = -float("inf")
        return logits

    def check(self, ids: list[int], first: int = 0) -> None:
        assert all(token % 4 != (first + i) % 4 for i, token in enumerate(ids))
