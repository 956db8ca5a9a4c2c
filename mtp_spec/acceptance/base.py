"""The interface of acceptance rules: drawing drafts from a distribution, and judging them against the target's.

All randomness passes through `Choices`, so that a test can replace it by an enumerator and compute the exact
distribution of the output.

Legend: a distribution is over tokens; `p` is the target's and `q` the draft's, both after temperature,
truncation, penalties and bias; `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mtp_spec.tree import TokenTree

Distribution = npt.NDArray[np.float64]  # [V], sums to 1
Drafted = Sequence[Distribution]  # by node, what it was drawn from
Target = Callable[[int], Distribution]  # of the token after a node


class Choices(Protocol):
    """A source of random choices."""

    def pick(self, distribution: Distribution) -> int:
        """Returns a token drawn from a distribution."""
        ...

    def happens(self, chance: float) -> bool:
        """Returns true with this probability."""
        ...


class SeededChoices:
    """Choices of one request: the same seed and the same calls give the same results."""

    def __init__(self, seed: int) -> None:
        # the noise of coupled sampling has the key (seed, 0)
        self._generator = np.random.Generator(np.random.Philox(key=np.array([seed, 1], dtype=np.uint64)))

    def pick(self, distribution: Distribution) -> int:
        mass = np.cumsum(distribution)
        token = int(np.searchsorted(mass, self._generator.random() * mass[-1], side="right"))
        # a number close to the total mass can round past the last token with probability
        return min(token, int(np.flatnonzero(distribution)[-1]))

    def happens(self, chance: float) -> bool:
        return bool(self._generator.random() < chance)


@dataclass(frozen=True, slots=True)
class Proposal:
    """A drafted child.

    Attributes:
        token: its id.
        distribution: that it was drawn from; a point mass if it was not drawn.
    """

    token: int
    distribution: Distribution


@dataclass(frozen=True, slots=True)
class Verdict:
    """Accepted nodes, depth 1 first, and the token that follows them."""

    nodes: list[int]
    token: int


class Rule(Protocol):
    """An acceptance rule.

    Attributes:
        lossless: whether the output has the target's distribution.
        chains_only: whether it judges only chains, not trees.
        samples: whether drafts are drawn from q. Then the choice of nodes to verify must not depend on the drawn tokens
            (DSpark, 2607.05147, appendix A), so trees may not be pruned by them.
    """

    lossless: bool
    chains_only: bool
    samples: bool

    def propose(self, q: Distribution, scores: npt.NDArray[np.float32], width: int, choices: Choices) -> list[Proposal]:
        """Returns up to `width` children with distinct tokens, in the order of their ranks.

        Args:
            scores: `[V]` what q was computed from; also ranks tokens without probability in q.
        """
        ...

    def judge(self, tree: TokenTree, q: Drafted, p: Target, choices: Choices) -> Verdict:
        """Returns the accepted path and the token after it.

        Args:
            q: for each node the distribution it was drawn from.
            p: returns the target's distribution after a node, -1 for the root; called only when needed, as each call
                costs a pass over V.
        """
        ...


def mixed(
    rule: Rule, given: Sequence[int], q: Distribution, scores: npt.NDArray[np.float32], width: int, choices: Choices
) -> list[Proposal]:
    """Returns up to `width` children of a node, of which another drafter has proposed the first.

    A given token is a draft from a point distribution. The rule draws the others from what q leaves for them, and knows
    it, so that siblings differ and each has the distribution it was drawn from.

    Args:
        given: tokens, at most `width`; they must not depend on choices at this node or on its siblings.
    """
    if not given:
        return rule.propose(q, scores, width, choices)
    proposals = [Proposal(token, certain(token, len(q))) for token in given]
    rest, left = q.copy(), scores.copy()
    rest[list(given)], left[list(given)] = 0.0, -np.inf
    mass = float(rest.sum())
    if len(given) == width or mass <= 0.0:
        return proposals
    return proposals + rule.propose(rest / mass, left, width - len(given), choices)


def certain(token: int, vocabulary: int) -> Distribution:
    """Returns the distribution that has one token only."""
    distribution = np.zeros(vocabulary)
    distribution[token] = 1.0
    return distribution


def positive_part(weights: Distribution) -> tuple[Distribution, float]:
    """Returns the positive part of weights and its sum."""
    part = np.maximum(weights, 0.0)
    return part, float(part.sum())


class WithoutReplacement:
    """The drafts of a lossless rule: siblings drawn from q without replacement."""

    lossless = True
    chains_only = False
    samples = True

    def propose(self, q: Distribution, scores: npt.NDArray[np.float32], width: int, choices: Choices) -> list[Proposal]:
        """Returns `width` draws; fewer if the support of q is exhausted."""
        distribution, drawn = q, list[Proposal]()
        while len(drawn) < width:
            token = choices.pick(distribution)
            drawn.append(Proposal(token, distribution))
            rest = distribution.copy()
            rest[token] = 0.0
            mass = float(rest.sum())
            if mass <= 0.0:
                break
            distribution = rest / mass
        return drawn


def best(scores: npt.NDArray[np.float32], width: int) -> list[Proposal]:
    """Returns the tokens with the best scores as certain proposals, the lowest index first among equals."""
    proposals = []
    for token in np.argsort(-scores, kind="stable")[:width]:
        if scores[token] == -np.inf:
            break
        proposals.append(Proposal(int(token), certain(int(token), len(scores))))
    return proposals
