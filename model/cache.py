"""The latent cache: kv_lora_rank + qk_rope_head_dim values per token and layer, one sequence.

Slots are positions: slot p holds the latent of the token at absolute position p. While a tree is being
verified its nodes live in the slots after the committed ones, in the order in which they were appended;
`commit` then moves the accepted path to the front, and everything else is forgotten by moving `length`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class LatentCache:
    """Latents of one sequence for a stack of layers.

    Args:
        layers: number of layers.
        capacity: slots; the longest context plus the largest tree.
        width: kv_lora_rank + qk_rope_head_dim.
    Attributes:
        length: committed slots.
        slots: per layer `[capacity, width]`.
    """

    def __init__(
        self,
        layers: int,
        capacity: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        # zeros: padded reads multiply unwritten slots by a weight of zero, which a NaN would survive
        self.slots = [
            torch.zeros(capacity, width, dtype=dtype, device=device) for _ in range(layers)
        ]
        self.capacity = capacity
        self.length = 0

    def commit(self, path: Sequence[int]) -> None:
        """Keeps the appended nodes `path` (indices in append order, root first) and drops the rest."""
        start, count = self.length, len(path)
        if list(path) != list(range(count)):
            index = torch.tensor(path, device=self.slots[0].device) + start
            for slots in self.slots:
                slots[start : start + count] = slots[index]
        self.length = start + count

    def rewind(self, length: int) -> None:
        """Forgets every slot from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind to {length}: the cache holds {self.length} tokens")
        self.length = length

    def take(self, other: LatentCache, length: int) -> None:
        """Begins with a copy of another cache's first `length` slots."""
        for own, theirs in zip(self.slots, other.slots, strict=True):
            own[:length] = theirs[:length]
        self.length = length
