"""The topology of a tree whose shape is fixed before it is drafted, as in a captured step.

Nodes are numbered parents before children. With a budget the nodes with the smallest sum of ranks are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from mtp_spec.speculation import Speculation
from mtp_spec.tree import path_to


@dataclass(frozen=True, slots=True)
class TreeShape:
    """A tree's topology: for each node its parent (-1 the root), depth and rank among its siblings."""

    parents: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()

    @classmethod
    def of(cls, speculation: Speculation | None) -> TreeShape:
        """Returns the topology that `speculation` asks for."""
        nodes: list[tuple[int, int, int, int]] = []  # parent, depth, rank, sum of ranks on the path
        level: list[int] = [-1]
        for depth, width in enumerate(() if speculation is None else speculation.branching, start=1):
            worth = {node: 0 if node < 0 else nodes[node][3] for node in level}
            children = [(worth[node] + rank, node, rank) for node in level for rank in range(width)]
            if speculation is not None and speculation.budget is not None:
                children = sorted(sorted(children)[: speculation.room(depth, len(nodes))], key=lambda child: child[1:])
            level = list(range(len(nodes), len(nodes) + len(children)))
            nodes += [(node, depth, rank, total) for total, node, rank in children]
        columns = list(zip(*nodes, strict=True)) or [(), (), (), ()]
        return cls(columns[0], columns[1], columns[2])

    @classmethod
    def chain(cls, depth: int) -> TreeShape:
        """Returns a chain of any depth."""
        return cls(tuple(range(-1, depth - 1)), tuple(range(1, depth + 1)), (0,) * depth)

    @property
    def depth(self) -> int:
        return max(self.depths, default=0)

    @property
    def rows(self) -> int:
        """Number of rows of the pass that verifies it: the root and the nodes."""
        return len(self.parents) + 1

    @property
    def is_chain(self) -> bool:
        return self.depth == len(self.parents)

    def path(self, node: int) -> list[int]:
        """Returns the nodes from depth 1 to the node itself."""
        return path_to(node, self.parents)

    def level(self, depth: int) -> list[int]:
        """Returns the nodes of one depth."""
        return [node for node, own in enumerate(self.depths) if own == depth]

    def with_children(self, depth: int) -> list[int]:
        """Returns the nodes of one depth that have children; the root is -1."""
        return sorted({self.parents[node] for node in self.level(depth + 1)})
