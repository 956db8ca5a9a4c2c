"""Times several ways to generate in turn on each prompt, for `bench speed` and `bench plan`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from mtp_spec.api import LM
from mtp_spec.cuda.kinds import PLANNED_DEPTH
from mtp_spec.cuda.pool import GROUPS, SLOTS
from mtp_spec.cuda.runtime import KEPT
from mtp_spec.cuda.state import PREFILL_ROWS, prefill_rows
from mtp_spec.errors import OptionError
from mtp_spec.stats import GenerationStats

WARM_TOKENS = 8
NOISE_TOKENS = 24
# captured work on a GPU: prefill passes with and without drafting, the steps of "auto", and its transitions
OTHERS = 2 * len(PREFILL_ROWS) + PLANNED_DEPTH + 4


class Written(NamedTuple):
    """A text and its wall-clock seconds, prompt included; `stats` is empty for other libraries."""

    ids: list[int]
    seconds: float
    stats: GenerationStats

    @property
    def pace(self) -> float:
        """Seconds per token."""
        return self.seconds / max(1, len(self.ids))


# prompt ids and options of sampling -> the text
Generate = Callable[[list[int], dict[str, Any]], Written]


def ours(lm: LM, speculation: Any) -> Generate:
    """Returns this library's way with a speculation; ranks that share the model use the first one's time."""

    def generate(ids: list[int], options: dict[str, Any]) -> Written:
        start = settled(lm)
        out = lm.generate(ids, speculation=speculation, **options)
        (took,) = lm.model.ranks.first((time.perf_counter() - start,))
        return Written(out.token_ids, took, out.stats)

    return generate


def settled(lm: LM) -> float:
    """Returns the time once a GPU has finished the previous text, including a superfluous last step."""
    if lm.model.device.type == "cuda":
        torch.cuda.synchronize(lm.model.device)
    return time.perf_counter()


def prefills(lm: LM, ids: Sequence[int]) -> frozenset[int]:
    """Returns the rows of the captured passes that a prompt takes; none if nothing is captured."""
    if not lm.backend.captured:
        return frozenset()
    return frozenset(prefill_rows(len(ids) - first) for first in range(0, len(ids), PREFILL_ROWS[-1]))


def check_kept(lm: LM, ways: int, batch: int = 1) -> None:
    """Rejects more ways than a GPU can keep captured, as they would be captured again for every text.

    Args:
        batch: batch size, for which steps of 1, 2, 4, ... sequences are captured.
    """
    # of each size a way keeps its steps and a table of their times
    most = min((KEPT - OTHERS) // (2 * (1 + _halvings(batch))), max(GROUPS, SLOTS // lm.max_batch))
    if lm.backend.captured and ways > most:
        beside = f" in batches of {batch}" if batch > 1 else ""
        raise OptionError(
            f"{ways} ways to draft in turn, and a GPU keeps the captured steps of {most}{beside}: ask "
            "for fewer shapes or rules at a time"
        )


def warm_tokens(lm: LM, texts: int) -> list[int]:
    """Returns the warm-up length of each sequence in a batch: on a GPU they end one after another, so that steps are
    captured for every number of sequences."""
    if not lm.backend.captured:
        return [WARM_TOKENS] * texts
    return [WARM_TOKENS * (1 + _halvings(texts) - number.bit_length()) for number in range(texts)]


def _halvings(texts: int) -> int:
    return (texts - 1).bit_length()


def warm_up(lm: LM, ways: Mapping[str, Generate], prompts: Sequence[list[int]], options: Mapping[str, Any]) -> None:
    """Generates a few tokens for a prompt of each kind, so that compiling, capturing and measuring are not timed."""
    for ids in {prefills(lm, ids): ids for ids in prompts}.values():
        for way in ways.values():
            way(ids, {**options, "max_new_tokens": WARM_TOKENS})


def in_turn(ways: Mapping[str, Generate], number: int, ids: list[int], options: dict[str, Any]) -> dict[str, Written]:
    """Returns each way's text. The first way changes with `number`, so that none always finds warm caches."""
    names, first = list(ways), number % len(ways)
    return {name: ways[name](ids, options) for name in names[first:] + names[:first]}


def noise(lm: LM, number: int) -> list[int]:
    """Returns a prompt of random tokens, after which drafts are hardly ever right."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(lm.config.vocab_size, (NOISE_TOKENS,), generator=generator).tolist()


def shared_tokens(text: list[int], other: list[int]) -> int:
    """Returns the length of the common prefix."""
    pairs = zip(text, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(other)))
