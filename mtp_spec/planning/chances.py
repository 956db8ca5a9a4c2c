"""How often drafts of each depth and rank are accepted: what is known of a tree that is fixed before it is drafted.

On a GPU the host does not see how far a draft leads (`confidence`), only which nodes were accepted.
"""

from __future__ import annotations

from collections.abc import Sequence

from mtp_spec.tree import ROOT
from mtp_spec.tree_shape import TreeShape

# before anything was seen: the chance of a best child, and of a sibling once the better ones have failed
FIRST_CHANCE, FIRST_SHARE = 0.7, 0.4
# observations that a text remembers, that a model's texts remember, and what the latter count for in a new text
TEXT_MEMORY, MODEL_MEMORY, CARRIED = 40.0, 400.0, 8.0


class Chances:
    """How often the child of each depth and rank was accepted, once its parent was and its better siblings were not.

    Args:
        memory: observations after which an old one counts for a third.
        before: what is expected of a depth and rank that were not seen yet.
    """

    def __init__(self, memory: float, before: Chances | None = None) -> None:
        self._keep, self._before = 1.0 - 1.0 / memory, before
        self._seen: dict[tuple[int, int], tuple[float, float]] = {}

    def chance(self, depth: int, rank: int) -> float:
        """Returns the probability of the child of this rank (0 the best) at this depth (1 the root's children)."""
        won, tried = self._seen.get((depth, rank), (0.0, 0.0))
        return (won + CARRIED * self._expected(depth, rank)) / (tried + CARRIED)

    def _expected(self, depth: int, rank: int) -> float:
        if self._before is not None:
            return self._before.chance(depth, rank)
        return FIRST_SHARE if rank else FIRST_CHANCE

    def learn(self, shape: TreeShape, path: Sequence[int], times: int = 1, texts: int = 1) -> None:
        """Takes the nodes of an accepted path, depth 1 first.

        Args:
            times: texts of which it was the path.
            texts: those that took the step: all of them are one observation
                as far as it is to be forgotten.
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
            open_to = left.get(parent, reached[parent])  # siblings follow their betters
            reached[node] = open_to * self.chance(shape.depths[node], shape.ranks[node])
            left[parent] = open_to - reached[node]
        return sum(reached.values())
