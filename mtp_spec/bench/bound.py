"""The upper bound on the probability that one of a node's drafts is accepted, and how close each rule comes to it.

For every lossless rule, with Y the token that it commits and S the set of drafts,

    Pr(Y in S) <= 1 + p(H) - Pr(S within H)        for every set H of tokens,

because Y is not in S if S is within H and Y outside it. The least right-hand side is reached by an optimal transport
between p and the distribution of S (Hu et al., "Towards Optimal Multi-draft Speculative Decoding", 2502.18779). For
one draft it is 1 - TV(p, q). For two drawn from q without replacement, H consists of the tokens with the largest q / p:
the tests compare that with every H. The best token and one drawn from the rest reach `p(best) + sum of min(p, q')`.

Legend: `p` the target's distribution and `q` the draft's at the root of a step, `[V]`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from mtp_spec.acceptance.accept import Accepted
from mtp_spec.acceptance.base import Distribution
from mtp_spec.sampling.sampler import History, Sampler
from mtp_spec.tree import ROOT, TokenTree

# additional draws of the noise for each root
REDRAWS = 32


def best_single(p: Distribution, q: Distribution) -> float:
    """Returns 1 - TV(p, q)."""
    return float(np.minimum(p, q).sum())


def best_pair(p: Distribution, q: Distribution) -> float:
    """Returns the bound for two drafts drawn from q without replacement."""
    first = int(q.argmax())
    others = q.copy()
    others[first] = 0.0
    rest = float(others.sum())  # 1 - q[first], without its cancellation
    if rest == 0.0:
        return float(p[first])  # there is one draft only
    ratio = np.divide(q, p, out=np.full_like(q, np.inf), where=p > 0.0)
    order = np.argsort(-ratio, kind="stable")
    inside = (order == first).cumsum() * q[first]
    others = others[order]
    sums, odds = others.cumsum(), others / (1.0 - others)
    # x drawn before y, over the pairs of every prefix H: first is x, first is y, neither is
    both = inside / rest * sums + odds.cumsum() * (inside + sums) - (odds * others).cumsum()
    return 1.0 + min(0.0, float((p[order].cumsum() - both).min()))


def best_hybrid(p: Distribution, q: Distribution) -> float:
    """Returns the bound for the best token of q and one drawn from the others."""
    first = int(q.argmax())
    others = q.copy()
    others[first] = 0.0
    rest = float(others.sum())
    return float(p[first]) + (best_single(p, others / rest) if rest > 0.0 else 0.0)


class FirstDepth:
    """Watches a sequence's steps (`sequence.Observer`): accepted drafts of the first depth, and the bound on them.

    Attributes:
        sampler: of the sequence, must be set before its first step.
        nodes: steps seen.
        accepted: those that accepted a draft.
        bound: sum of the bounds.
        redrawn: sum of coupled sampling's acceptance over fresh noise.
    """

    sampler: Sampler

    def __init__(self, rule: str, width: int) -> None:
        self.rule, self.width = rule, width
        self.nodes, self.accepted, self.bound, self.redrawn = 0, 0, 0.0, 0.0
        self._root: Tensor | None = None
        self._random: np.random.Generator | None = None

    def drafted(self, parent: int, row: Tensor) -> None:
        """Keeps the root's row; see `sequence.Observer`."""
        if parent == ROOT:
            self._root = row

    def pruned(self, kept: list[int]) -> None:
        """Does nothing: only the root matters."""

    def verified(self, tree: TokenTree, logits: Tensor, history: History, accepted: Accepted) -> None:
        """Counts a step."""
        sampler = self.sampler
        if not len(tree):
            return
        assert self._root is not None
        target, draft = sampler.process(logits[0], history), self._root
        p, q = sampler.distribution(target, 0), sampler.distribution(draft, 0)
        self.nodes += 1
        self.accepted += len(accepted.nodes) > 0
        if sampler.params.greedy:
            # certain drafts: the bound is what they cover
            self.bound += float(p[[tree.tokens[child] for child in tree.children(ROOT)]].sum())
            self.redrawn += len(accepted.nodes) > 0
            return
        pair = best_hybrid if self.rule == "hybrid" else best_pair
        self.bound += best_single(p, q) if self.width == 1 else pair(p, q)
        if self.rule == "coupled":
            self.redrawn += self._coupled(target.numpy(), draft.numpy())

    def _coupled(self, target: Any, draft: Any) -> float:
        """Returns how often the target's token is among the drafts, over fresh noise."""
        noise = self._noise().gumbel(size=(REDRAWS, len(target)))
        drawn = (target + noise).argmax(1)
        drafts = np.argpartition(-(draft + noise), self.width - 1, axis=1)[:, : self.width]
        return float((drafts == drawn[:, None]).any(1).mean())

    def _noise(self) -> np.random.Generator:
        if self._random is None:
            self._random = np.random.default_rng(self.sampler.params.known_seed)
        return self._random
