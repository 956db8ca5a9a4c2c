"""The exact distribution of what a step commits, over a small vocabulary: every random choice is branched on.

Drafts and verdicts go through the sampler and `accept_by_rule`, as in the engine; the distribution that they are
compared with is plain decoding's, its history made anew for every context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtp_spec import SamplingParams
from mtp_spec.acceptance import Choices, Rule
from mtp_spec.acceptance.accept import accept_by_rule
from mtp_spec.acceptance.base import Distribution, mixed
from mtp_spec.sampling.sampler import Sampler
from mtp_spec.tree import ROOT, TokenTree

VOCAB = 3
PROMPT = [1, 0, 1]
Context = tuple[int, ...]
Rows = Callable[[Context], Tensor]
# children of a node, from the tokens of its own path; what siblings turned out to be must not matter
Widths = Callable[[Context], int]


def random_rows(seed: int, kind: str = "full", vocab: int = VOCAB) -> Rows:
    """Logits for every context: of all tokens, of all but one, or of one alone."""

    @lru_cache(None)
    def rows(context: Context) -> Tensor:
        generator = np.random.default_rng([seed, len(context), *context])
        weights = generator.dirichlet(np.full(vocab, 0.7))
        if kind == "truncated":
            weights[generator.integers(vocab)] = 0.0
        elif kind == "certain":
            weights = np.eye(vocab)[generator.integers(vocab)]
        with np.errstate(divide="ignore"):
            return torch.from_numpy(np.log(weights)).float()

    return rows


def fixed(branching: Sequence[int]) -> Widths:
    return lambda path: branching[len(path)] if len(path) < len(branching) else 0


class Toy:
    """A target and a drafter, both a row of logits for every context, with one way of sampling; `given` are the tokens
    that another drafter proposes after a path."""

    def __init__(
        self, p: Rows, q: Rows, vocab: int = VOCAB, given: Callable[[Context], list[int]] = lambda path: [],
        **options: Any,
    ) -> None:  # fmt: skip
        self.vocab, self.p, self.q, self.given = vocab, p, q, given
        self.sampler = Sampler(SamplingParams(**{"temperature": 1.0, **options}), vocab)
        self.target = lru_cache(None)(lambda context: self._distribution(p, context))
        self.draft = lru_cache(None)(lambda context: self._distribution(q, context))

    @cached_property
    def start(self) -> Any:
        return self.sampler.history(PROMPT)

    def _distribution(self, rows: Rows, context: Context) -> Distribution:
        history = self.sampler.history(PROMPT)
        for token in context:
            history = history.child(token)
        return self.sampler.distribution(self.sampler.process(rows(context), history), len(PROMPT) + len(context))

    def step(self, rule: Rule, widths: Widths, choices: Choices) -> Context:
        """Drafts a tree and judges it as the engine does; returns the tokens committed."""
        tree, distributions, level = TokenTree(), list[Distribution](), [ROOT]
        while level:
            above, level = level, []
            for parent in above:
                path = tuple(tree.path_tokens(parent))
                if not (width := widths(path)):
                    continue
                row = self.sampler.process(self.q(path), self.start.extend(path))
                distribution = self.sampler.distribution(row, 0)
                given = self.given(path)[:width]
                for rank, proposal in enumerate(mixed(rule, given, distribution, row.numpy(), width, choices)):
                    level.append(tree.add(parent, proposal.token, rank))
                    distributions.append(proposal.distribution)
        rows = torch.stack([self.p(tuple(tree.path_tokens(node))) for node in range(ROOT, len(tree))])
        out = accept_by_rule(
            rule, choices, tree, distributions, rows, self.sampler, self.start, len(PROMPT), lambda _: False
        )
        tokens = tuple(drawn.token for drawn in out.drawn)
        assert tokens[:-1] == tuple(tree.path_tokens(out.nodes[-1]) if out.nodes else ())
        return tokens


class Branching:
    """Choices that follow a script and then always the first possibility; the others are noted for later."""

    def __init__(self, script: Sequence[int]) -> None:
        self.script, self.taken, self.weight = script, list[int](), 1.0
        self.others: list[list[int]] = []

    def _choose(self, chances: Sequence[float]) -> int:
        possible = [i for i, chance in enumerate(chances) if chance > 0.0]
        step = len(self.taken)
        choice = self.script[step] if step < len(self.script) else possible[0]
        if step >= len(self.script):
            self.others += [[*self.taken, other] for other in possible[1:]]
        self.weight *= chances[choice]
        self.taken.append(choice)
        return choice

    def pick(self, distribution: Distribution) -> int:
        return self._choose(distribution.tolist())

    def happens(self, chance: float) -> bool:
        assert -1e-12 <= chance <= 1 + 1e-12
        return self._choose((chance, 1.0 - chance)) == 0


def every_outcome(run: Callable[[Choices], Any]) -> Iterator[tuple[float, Any]]:
    """Yields the probability and the result of every way in which a run's choices can fall."""
    scripts: list[list[int]] = [[]]
    while scripts:
        choices = Branching(scripts.pop())
        outcome = run(choices)
        scripts += choices.others
        yield choices.weight, outcome


def error_and_length(rule: Rule, shape: Sequence[int] | Widths, toy: Toy, depth: int = 0) -> tuple[float, float]:
    """Returns the total variation between the output's distribution and plain decoding's, and the mean tokens a step.

    Args:
        shape: children by depth, or a function of the path; `depth` is then the most there may be.
    """
    widths = shape if callable(shape) else fixed(shape)
    length = (depth if callable(shape) else len(shape)) + 1
    committed: dict[Context, float] = {}
    for weight, tokens in every_outcome(lambda choices: toy.step(rule, widths, choices)):
        committed[tokens] = committed.get(tokens, 0.0) + weight
    assert sum(committed.values()) == pytest.approx(1.0, abs=1e-12)
    distribution: dict[Context, float] = dict.fromkeys(product(range(toy.vocab), repeat=length), 0.0)
    for tokens, weight in committed.items():
        # what the step left open is drawn by plain decoding
        for rest in product(range(toy.vocab), repeat=length - len(tokens)):
            whole = (*tokens, *rest)
            distribution[whole] += weight * chance(toy, whole, len(tokens))
    error = sum(abs(share - chance(toy, whole)) for whole, share in distribution.items()) / 2
    return error, sum(weight * len(tokens) for tokens, weight in committed.items())


def chance(toy: Toy, tokens: Context, known: int = 0) -> float:
    """The probability under plain decoding that a text goes on with these tokens, the first `known` given."""
    product_ = 1.0
    for i in range(known, len(tokens)):
        if product_ == 0.0:
            return 0.0  # what follows cannot be asked for: nothing may be left there
        product_ *= float(toy.target(tokens[:i])[tokens[i]])
    return product_
