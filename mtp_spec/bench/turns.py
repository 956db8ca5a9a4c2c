"""Several ways to generate, timed in turn on each prompt: what `bench speed` and `bench plan` share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from mtp_spec.api import LM
from mtp_spec.stats import GenerationStats

WARM_TOKENS = 8
NOISE_TOKENS = 24


class Written(NamedTuple):
    """A text and its wall-clock seconds, prompt included; `stats` is empty where another library wrote it."""

    ids: list[int]
    seconds: float
    stats: GenerationStats

    @property
    def pace(self) -> float:
        """Seconds a token."""
        return self.seconds / max(1, len(self.ids))


# prompt ids and options of sampling -> the text
Generate = Callable[[list[int], dict[str, Any]], Written]


def ours(lm: LM, speculation: Any) -> Generate:
    """Returns this library's way with a speculation; ranks that share the model are told the first one's time."""

    def generate(ids: list[int], options: dict[str, Any]) -> Written:
        start = time.perf_counter()
        out = lm.generate(ids, speculation=speculation, **options)
        (took,) = lm.model.ranks.first((time.perf_counter() - start,))
        return Written(out.token_ids, took, out.stats)

    return generate


def warm_up(ways: Mapping[str, Generate], prompts: Sequence[list[int]], options: Mapping[str, Any]) -> None:
    """Writes a few tokens after the shortest and the longest prompt: compiling, capturing and measuring are no part of
    a text's time."""
    for ids in (min(prompts, key=len), max(prompts, key=len)):
        for way in ways.values():
            way(ids, {**options, "max_new_tokens": WARM_TOKENS})


def in_turn(ways: Mapping[str, Generate], number: int, ids: list[int], options: dict[str, Any]) -> dict[str, Written]:
    """Returns each way's text. Another one goes first for each number, so that none always finds warm caches."""
    names, first = list(ways), number % len(ways)
    return {name: ways[name](ids, options) for name in names[first:] + names[:first]}


def noise(lm: LM, number: int) -> list[int]:
    """Returns a prompt of random tokens, of which no draft can make sense."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(lm.config.vocab_size, (NOISE_TOKENS,), generator=generator).tolist()
