"""Estimates the probability that a draft is accepted from its lead over the runner-up.

Under coupled sampling the target draws the argmax of its own row plus the same noise. If the draft's best score leads
by a wide margin, a target that differs a little picks the same token; with a small lead it is a toss-up. The lead is in
units of the noise (logits over temperature). How much it says depends on temperature, text and depth, so the weights
are learned online: by a logistic regression with forgetting, which starts from the weights that the model's earlier
sequences have learned. Drafts never change the text, so neither does learning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

# leads are clipped here: a larger one says no more and would dominate the fit
MOST_LEAD = 6.0
# prior weights (constant, lead, second depth and later, third depth and later), and their precision
WEIGHTS, SURENESS = (-0.4, 1.3, 0.0, 0.0), (4.0, 8.0, 8.0, 8.0)
# observations remembered for a sequence and for all sequences of a model, and the weight of the latter in a new one
SEQUENCE_MEMORY, MODEL_MEMORY, CARRIED = 150.0, 1500.0, 30.0
# siblings: prior probability of each once the better ones have failed, and its weight in observations
SHARE, SHARE_SEEN, RANKS = 0.5, 8.0, 3


@dataclass(frozen=True, slots=True)
class Judged:
    """The outcome at an accepted node: the lead, depth and number of its children; the accepted one's rank or None."""

    lead: float
    depth: int
    width: int
    accepted: int | None


class Confidence:
    """Acceptance of drafts and siblings.

    Args:
        memory: observations after which the weight of an old one has fallen to about a third (1/e).
    """

    def __init__(self, memory: float = MODEL_MEMORY) -> None:
        self._keep = 1.0 - 1.0 / memory
        self._weights: Vector = np.array(WEIGHTS)
        self._precision: Vector = np.diag(SURENESS)
        self._seen = 0.0
        self._shares = [[SHARE * SHARE_SEEN, SHARE_SEEN] for _ in range(RANKS)]

    def for_sequence(self) -> Confidence:
        """Returns the estimate that a new sequence starts from."""
        text = Confidence(SEQUENCE_MEMORY)
        text._weights = self._weights.copy()
        text._precision = self._precision * (CARRIED / max(CARRIED, self._seen))
        text._shares = [[SHARE_SEEN * won / tried, SHARE_SEEN] for won, tried in self._shares]
        return text

    def chance(self, lead: float, depth: int) -> float:
        """Returns the probability that the best child at this depth is accepted, if its parent is."""
        return 1.0 / (1.0 + exp(-float(self._weights @ _features(lead, depth))))

    def share(self, rank: int) -> float:
        """Returns the probability that the sibling of this rank (1 or more) is accepted once the better ones failed."""
        won, tried = self._shares[min(rank, RANKS) - 1]
        return won / tried

    def learn(self, outcomes: Sequence[Judged]) -> None:
        """Learns from the outcomes of one step."""
        if not outcomes:
            return
        seen = np.stack([_features(one.lead, one.depth) for one in outcomes])
        accepted = np.array([one.accepted == 0 for one in outcomes], dtype=np.float64)
        expected = 1.0 / (1.0 + np.exp(-(seen @ self._weights)))
        keep = self._keep ** len(outcomes)
        self._seen = self._seen * keep + len(outcomes)
        # the prior is not forgotten: it keeps the matrix regular
        start = np.diag(SURENESS)
        weight = expected * (1.0 - expected)
        self._precision = start + (self._precision - start) * keep + (seen * weight[:, None]).T @ seen
        self._weights = self._weights + np.linalg.solve(self._precision, seen.T @ (accepted - expected))
        for one in outcomes:
            for rank in range(1, min(one.width, RANKS + 1)):
                if one.accepted is not None and one.accepted < rank:
                    break
                counts = self._shares[rank - 1]
                counts[0] = counts[0] * self._keep + (one.accepted == rank)
                counts[1] = counts[1] * self._keep + 1.0


def _features(lead: float, depth: int) -> Vector:
    return np.array((1.0, min(lead, MOST_LEAD), float(depth >= 2), float(depth >= 3)))
