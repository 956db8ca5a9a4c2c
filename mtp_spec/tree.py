"""The tree of drafted tokens that one verify pass checks.

Nodes are numbered in the order they were added, so a parent always comes before its children. The root is the last
committed token: it is not a node, its number is -1 and its depth 0. Tokens and structure only: no logits, no cache.

Legend: N nodes, D depth of the tree.
"""

from __future__ import annotations

from collections.abc import Sequence

ROOT = -1
MODULES = "mtp"  # the source of what the MTP modules draft


def path_to(node: int, parents: Sequence[int]) -> list[int]:
    """Nodes from depth 1 down to the node itself; empty for the root."""
    nodes = []
    while node != ROOT:
        nodes.append(node)
        node = parents[node]
    nodes.reverse()
    return nodes


class TokenTree:
    """Drafted tokens with their parents, depths (1 = child of the root), ranks (0 = best sibling) and sources."""

    __slots__ = ("_children", "depths", "parents", "ranks", "sources", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.ranks: list[int] = []
        self.sources: list[str] = []
        self._children: dict[int, dict[int, int]] = {ROOT: {}}

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def depth(self) -> int:
        """Depth of the deepest node; 0 for a tree without nodes."""
        return max(self.depths, default=0)

    def add(self, parent: int, token: int, rank: int, source: str = MODULES) -> int:
        """Number of the new node.

        Args:
            source: name of the drafter that proposed it.

        Raises:
            ValueError: the parent does not exist, or it already has a child with this token (a repeated sibling can
                never be accepted, and under rejection sampling it changes the distribution).
        """
        if not ROOT <= parent < len(self.tokens):
            raise ValueError(f"parent {parent} does not exist: the tree has nodes -1 (root) to {len(self.tokens) - 1}")
        siblings = self._children[parent]
        if token in siblings:
            raise ValueError(f"node {parent} already has a child with token {token}: siblings must differ")
        node = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(1 if parent == ROOT else self.depths[parent] + 1)
        self.ranks.append(rank)
        self.sources.append(source)
        siblings[token] = node
        self._children[node] = {}
        return node

    def children(self, node: int) -> list[int]:
        """Child nodes in the order they were added."""
        return list(self._children[node].values())

    def child(self, node: int, token: int) -> int | None:
        """The child that carries this token, or None: one step of the exact-match walk."""
        return self._children[node].get(token)

    def path(self, node: int) -> list[int]:
        """Nodes from depth 1 down to the node itself; empty for the root."""
        return path_to(node, self.parents)

    def path_tokens(self, node: int) -> list[int]:
        """Tokens along ``path(node)``."""
        return [self.tokens[step] for step in self.path(node)]

    def part(self, nodes: Sequence[int]) -> TokenTree:
        """Returns the tree of these nodes only, given in ascending order; each node's parent must be among them."""
        tree, numbers = TokenTree(), {ROOT: ROOT}
        for node in nodes:
            parent = numbers[self.parents[node]]
            numbers[node] = tree.add(parent, self.tokens[node], self.ranks[node], self.sources[node])
        return tree

    def is_chain(self) -> bool:
        """Whether every node has at most one child, the root included."""
        return self.depth == len(self)
