"""Acceptance rates by depth and rank: all that is known of a tree whose shape is fixed before it is drafted.

On a GPU the host does not see the lead of a draft (`confidence`), only which nodes were accepted.
"""

from __future__ import annotations

from collections.abc import Sequence

from mtp_spec.tree import ROOT
from mtp_spec.tree_shape import TreeShape

# priors: the probability of the best child, and of a sibling once the better ones have failed
FIRST_CHANCE, FIRST_SHARE = 0.7, 0.4
# observations remembered for a sequence and for all sequences of a model, and the weight of the latter in a new one
TEXT_MEMORY, MODEL_MEMORY, CARRIED = 40.0, 400.0, 8.0


class Chances:
    """Acceptance rate of the child of each depth and rank, given that its parent was accepted and no better sibling.

    Args:
        memory: observations after which the weight of an old one has fallen to about a third (1/e).
        before: source of the prior for each depth and rank.
    """

    def __init__(self, memory: float, before: Chances | None = None) -> None:
        self._keep, self._before = 1.0 - 1.0 / memory, before
        self._seen: dict[tuple[int, int], tuple[float, float]] = {}

    def chance(self, depth: int, rank: int) -> float:
        """Returns the probability of the child of this rank (0 is the best) at this depth (1 is below the root)."""
        won, tried = self._seen.get((depth, rank), (0.0, 0.0))
        return (won + CARRIED * self._expected(depth, rank)) / (tried + CARRIED)

    def _expected(self, depth: int, rank: int) -> float:
        if self._before is not None:
            return self._before.chance(depth, rank)
        return FIRST_SHARE if rank else FIRST_CHANCE

    def learn(self, shape: TreeShape, path: Sequence[int], times: int = 1, texts: int = 1) -> None:
        """Learns from an accepted path of nodes, depth 1 first.

        Args:
            times: number of sequences with this path.
            texts: number of sequences in the step; together they age older observations by one.
        """
        keep = self._keep ** (times / texts)
        for parent in (ROOT, *path):
            for node, its_parent in enumerate(shape.parents):
                if its_parent != parent:
                    continue
                key, accepted = (shape.depths[node], shape.ranks[node]), node in path
                won, tried = self._seen.get(key, (0.0, 0.0))
                self._seen[key] = (won * keep + accepted * times, tried * keep + times)
                if accepted:
                    break

    def tokens(self, shape: TreeShape) -> float:
        """Returns the expected tokens of a step, the bonus token included."""
        reached, left = {ROOT: 1.0}, dict[int, float]()
        for node, parent in enumerate(shape.parents):
            open_to = left.get(parent, reached[parent])  # a sibling counts only if the better ones failed
            reached[node] = open_to * self.chance(shape.depths[node], shape.ranks[node])
            left[parent] = open_to - reached[node]
        return sum(reached.values())
