"""How well drafts do on prompts that were not trained on: tokens per step and acceptance by depth, domain by domain.

Texts are generated as users generate them, with the chain's real caches and the acceptance rule that keeps the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from itertools import islice
from typing import Any

import numpy as np

from mtp_spec.api import LM
from mtp_spec.stats import GenerationStats

RESAMPLES = 1000
WHOLE = "all domains"


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts of one domain at one temperature.

    Attributes:
        tokens, steps: of each text, tokens committed by verify steps, and these steps.
        rates: by depth, the share of drafts accepted, given that the depth before was.
    """

    domain: str
    temperature: float
    tokens: tuple[int, ...]
    steps: tuple[int, ...]
    rates: tuple[float, ...]

    @property
    def tokens_per_step(self) -> float:
        return sum(self.tokens) / max(1, sum(self.steps))

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_per_step": self.tokens_per_step}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Texts:
        return cls(
            values["domain"], values["temperature"], tuple(values["tokens"]), tuple(values["steps"]),
            tuple(values["rates"]),
        )  # fmt: skip


def measure(
    lm: LM, prompts: Mapping[str, Sequence[list[int]]], depth: int, temperatures: Sequence[float], tokens: int,
    seed: int,
) -> list[Texts]:  # fmt: skip
    """Returns how drafts did, by domain and temperature.

    Args:
        prompts: ids by domain.
        depth: of the chain; 0 decodes plainly.
        tokens: most new tokens of a text.
    """
    found, whole = list[Texts](), [ids for own in prompts.values() for ids in own]
    for temperature in temperatures:
        outs = iter(lm.generate(whole, max_new_tokens=tokens, temperature=temperature, seed=seed,
                                speculation=depth or None))  # fmt: skip
        for domain, own in prompts.items():
            stats = [out.stats for out in islice(outs, len(own)) if out.stats.steps]
            merged = reduce(GenerationStats.merge, stats, GenerationStats())
            rates = tuple(round(rate, 4) for rate in merged.accepted_per_depth["conditional"])
            each = [(one.step_tokens, one.steps) for one in stats] or [(0, 0)]
            tokens_of, steps_of = zip(*each, strict=True)
            found.append(Texts(domain, temperature, tokens_of, steps_of, rates))
    return found


@dataclass(frozen=True, slots=True)
class Comparison:
    """Tokens per step before and after, of one domain or all, at one temperature; `low` and `high` bound the ratio
    with 95 % confidence (bootstrap over texts)."""

    domain: str
    temperature: float
    before: float
    after: float
    low: float
    high: float

    @property
    def lost(self) -> bool:
        return self.after < self.before


def compare(before: Sequence[Texts], after: Sequence[Texts]) -> list[Comparison]:
    """Returns a comparison of each domain at each temperature, and of all domains together at each."""
    pairs = [(one, next(other for other in after if (other.domain, other.temperature) == (one.domain, one.temperature)))
             for one in before]  # fmt: skip
    found = [_compared(one.domain, one.temperature, [one], [other]) for one, other in pairs]
    for temperature in dict.fromkeys(one.temperature for one in before):
        some = [pair for pair in pairs if pair[0].temperature == temperature]
        if len(some) > 1:
            found.append(_compared(WHOLE, temperature, [one for one, _ in some], [other for _, other in some]))
    return found


def _compared(domain: str, temperature: float, before: Sequence[Texts], after: Sequence[Texts]) -> Comparison:
    numbers = [np.array([[count for one in some for count in getattr(one, name)] for name in ("tokens", "steps")])
               for some in (before, after)]  # fmt: skip
    one, other = (float(rows[0].sum() / max(1, rows[1].sum())) for rows in numbers)
    random, count = np.random.default_rng(0), min(rows.shape[1] for rows in numbers)
    picks = random.integers(count, size=(RESAMPLES, count))  # the same texts before and after
    sums = [np.maximum(rows[:, picks].sum(-1), 1) for rows in numbers]
    ratios = (sums[1][0] / sums[1][1]) / (sums[0][0] / sums[0][1])
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Comparison(domain, temperature, one, other, float(low), float(high))
