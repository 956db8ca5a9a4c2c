"""The topology of a captured tree, and the constant tensors that captured work reads.

A tree's shape is fixed when its step is captured: node by node, parents before children. With a budget the nodes with
the smallest sum of ranks are kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_spec.speculation import Speculation
from mtp_spec.tree import path_to


@dataclass(frozen=True, slots=True)
class Shape:
    """A tree's topology: for each node its parent (-1 the root), depth and rank among its siblings."""

    parents: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()

    @classmethod
    def of(cls, speculation: Speculation | None) -> Shape:
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

    @property
    def depth(self) -> int:
        return max(self.depths, default=0)

    @property
    def rows(self) -> int:
        """Rows of a pass that verifies it: the root and the nodes."""
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


class Constants:
    """Tensors that live as long as captured work: a graph reads them again, and nothing may be copied while it is
    captured."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: dict[str, Tensor] = {}

    def integers(self, values: Iterable[int]) -> Tensor:
        """Returns them as int32."""
        return self._constant(list(values), torch.int32)

    def places(self, values: Iterable[int]) -> Tensor:
        """Returns them as int64, to index with."""
        return self._constant(list(values), torch.int64)

    def table(self, paths: list[list[int]]) -> Tensor:
        """Returns `[M, A]` int32, each row a path padded with -1."""
        most = max(len(path) for path in paths)
        return self._constant([path + [-1] * (most - len(path)) for path in paths], torch.int32)

    def flags(self, values: list[list[bool]]) -> Tensor:
        """Returns them as bool."""
        return self._constant(values, torch.bool)

    def _constant(self, values: object, dtype: torch.dtype) -> Tensor:
        name = f"{values} {dtype}"
        if name not in self._held:
            self._held[name] = torch.tensor(values, dtype=dtype).to(self.device)
        return self._held[name]
