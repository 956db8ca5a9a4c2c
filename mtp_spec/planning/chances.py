"""Acceptance rates by depth and rank: all that is known of a tree whose shape is fixed before it is drafted.

On a GPU the host does not see the lead of a draft (`confidence`), only which nodes were accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from mtp_spec.tree import ROOT
from mtp_spec.tree_shape import TreeShape

# priors: the probability of the best child, and of a sibling once the better ones have failed
FIRST_CHANCE, FIRST_SHARE = 0.7, 0.4
# observations remembered for a sequence and for all sequences of a model, and the weight of the latter in a new one
SEQUENCE_MEMORY, MODEL_MEMORY, CARRIED = 40.0, 400.0, 8.0


Key = tuple[int, int]  # depth (1 is below the root) and rank (0 is the best)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a step shows.

    Attributes:
        tries: by depth and rank, how many of these children were accepted and how many could have been: their parent
            was, and no better sibling.
        sequences: number of sequences in the step.
    """

    tries: dict[Key, tuple[int, int]]
    sequences: int

    @classmethod
    def of(cls, shape: TreeShape, paths: Mapping[tuple[int, ...], int]) -> Seen:
        """Returns what accepted paths of nodes, depth 1 first, each with its number of sequences, show of a tree."""
        tries, children = dict[Key, tuple[int, int]](), _children(shape)
        for path, times in paths.items():
            for parent, child in zip((ROOT, *path), (*path, None), strict=True):
                for node, key in children.get(parent, ()):
                    won, tried = tries.get(key, (0, 0))
                    tries[key] = won + times * (node == child), tried + times
                    if node == child:
                        break
        return cls(tries, sum(paths.values()))


@lru_cache
def _children(shape: TreeShape) -> dict[int, list[tuple[int, Key]]]:
    found = dict[int, list[tuple[int, Key]]]()
    for node, parent in enumerate(shape.parents):
        found.setdefault(parent, []).append((node, (shape.depths[node], shape.ranks[node])))
    return found


class Chances:
    """Acceptance rate of the child of each depth and rank, given that its parent was accepted and no better sibling.

    Args:
        memory: observations after which the weight of an old one has fallen to about a third (1/e).
        before: source of the prior for each depth and rank.
    """

    def __init__(self, memory: float, before: Chances | None = None) -> None:
        self._keep, self._before = 1.0 - 1.0 / memory, before
        self._seen: dict[Key, tuple[float, float]] = {}

    def chance(self, depth: int, rank: int) -> float:
        """Returns the probability of the child of this rank at this depth."""
        won, tried = self._seen.get((depth, rank), (0.0, 0.0))
        return (won + CARRIED * self._expected(depth, rank)) / (tried + CARRIED)

    def _expected(self, depth: int, rank: int) -> float:
        if self._before is not None:
            return self._before.chance(depth, rank)
        return FIRST_SHARE if rank else FIRST_CHANCE

    def learn(self, step: Seen) -> None:
        """Learns from a step; its sequences together age older observations by one."""
        for key, (more_won, more_tried) in step.tries.items():
            keep = self._keep ** (more_tried / step.sequences)
            won, tried = self._seen.get(key, (0.0, 0.0))
            self._seen[key] = (won * keep + more_won, tried * keep + more_tried)

    def tokens(self, *shapes: TreeShape) -> list[float]:
        """Returns the expected tokens of a step of each shape, the bonus token included."""
        chances, found = dict[Key, float](), list[float]()
        for shape in shapes:
            reached, left = {ROOT: 1.0}, dict[int, float]()
            for node, parent in enumerate(shape.parents):
                key = shape.depths[node], shape.ranks[node]
                if key not in chances:
                    chances[key] = self.chance(*key)
                open_to = left.get(parent, reached[parent])  # a sibling counts only if the better ones failed
                reached[node] = open_to * chances[key]
                left[parent] = open_to - reached[node]
            found.append(sum(reached.values()))
        return found
