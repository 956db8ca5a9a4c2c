"""The latent cache: kv_lora_rank + qk_rope_head_dim values per token and layer, in pages.

Slots are positions: slot p holds the latent of the token at absolute position p. While a draft tree is verified, its
nodes occupy the slots after the committed ones, in the order in which they were appended; `commit` then moves the
accepted path to the front and sets `length` so that the rest is dropped.

A sequence has a list of pages, in any order, in memory that it shares with other sequences. Contiguous pages are read
in place; others are gathered for each forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int64]
# slots per page: one attention block
PAGE = 64


def pages_for(tokens: int) -> int:
    """Returns the number of pages that `tokens` tokens need."""
    return -(-tokens // PAGE)


class LatentCache:
    """Latents of one sequence for a stack of layers.

    Args:
        layers: per layer the shared memory `[pages * PAGE, width]`.
        pages: numbers of this sequence's pages, in order of position.
        length: slots already filled.
    Attributes:
        length: committed slots.
        capacity: slots in all: the longest context plus the largest tree.
        slots: per layer `[capacity, width]` in order of position if the pages are contiguous, else the whole memory.
    """

    def __init__(self, layers: Sequence[Tensor], pages: Sequence[int], length: int = 0) -> None:
        self.capacity, self.length, self._begin = len(pages) * PAGE, length, 0
        self.slots = list(layers)
        self._address: Tensor | None = None
        self._places: tuple[IntArray, IntArray] | None = None
        first = pages[0] if pages else 0
        if list(pages) == list(range(first, first + len(pages))):
            self.slots = [slots[first * PAGE : first * PAGE + self.capacity] for slots in layers]
        else:
            starts = torch.tensor(pages, device=layers[0].device) * PAGE
            self._address = (starts[:, None] + torch.arange(PAGE, device=starts.device)).flatten()

    @classmethod
    def alone(
        cls, layers: int, capacity: int, width: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> LatentCache:
        """Returns an empty cache of at least `capacity` slots that shares no memory."""
        pages = pages_for(capacity)
        # zeros, because padded reads multiply unwritten slots by zero, and 0 * NaN is NaN
        memory = [torch.zeros(pages * PAGE, width, dtype=dtype, device=device) for _ in range(layers)]
        return cls(memory, range(pages))

    def places(self) -> tuple[IntArray, IntArray]:
        """Returns the address of each layer's memory and the first slot of each page, int64."""
        if self._places is None:
            addresses = np.array([slots.data_ptr() for slots in self.slots], np.int64)
            pages = np.arange(0, self.capacity, PAGE) if self._address is None else self._address[::PAGE].numpy()
            self._places = addresses, np.ascontiguousarray(pages, np.int64)
        return self._places

    def put(self, layer: int, start: int, rows: Tensor, reach: int) -> Tensor:
        """Writes rows to the slots from `start` on; returns at least the first `reach` slots, in order of position."""
        slots = self.slots[layer]
        if self._address is None:
            slots[start : start + len(rows)] = rows
            return slots
        slots[self._address[start : start + len(rows)]] = rows
        return slots[self._address[:reach]]

    def read(self, layer: int, length: int) -> Tensor:
        """Returns the first slots `[length, width]`."""
        slots = self.slots[layer]
        return slots[:length] if self._address is None else slots[self._address[:length]]

    def commit(self, path: Sequence[int]) -> None:
        """Keeps the appended nodes `path` (indices in append order, root first) and drops the rest."""
        start, count = self.length, len(path)
        if list(path) != list(range(count)):
            index = torch.tensor(path, device=self.slots[0].device) + start
            to: slice | Tensor = slice(start, start + count)
            if self._address is not None:
                index, to = self._address[index], self._address[to]
            for slots in self.slots:
                slots[to] = slots[index]
        self.length = start + count

    def clean(self, count: int) -> None:
        """Zeros `count` slots after the committed ones: masked slots are multiplied by zero and must not be NaN."""
        for slots in self.slots:
            if self._address is None:
                slots[self.length : self.length + count] = 0
            else:
                slots[self._address[self.length : self.length + count]] = 0

    def first_unsound(self, slots: Sequence[int]) -> tuple[int, int] | None:
        """Returns the first layer where one of these slots holds NaN or infinity, and the index of the first such."""
        for layer in range(len(self.slots)):
            sound = self.read(layer, max(slots, default=-1) + 1)[list(slots)].isfinite().all(-1)
            if not bool(sound.all()):
                return layer, int((~sound).nonzero()[0])
        return None

    def rewind(self, length: int) -> None:
        """Forgets every slot from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind to {length}: the cache holds {self.length} tokens")
        self.length = length

    def restart(self, position: int) -> None:
        """Empties the cache; slot 0 becomes the first slot of the page that held `position`.

        Other sequences may read the pages before it, so those are left unchanged.
        """
        moved = position // PAGE * PAGE - self._begin
        self._places = None
        if self._address is None:
            self.slots = [slots[moved:] for slots in self.slots]
        else:
            self._address = self._address[moved:]
        self._begin, self.capacity, self.length = self._begin + moved, self.capacity - moved, 0

    def take(self, other: LatentCache, length: int) -> None:
        """Starts from a copy of another cache's first `length` slots."""
        for layer in range(len(self.slots)):
            self.put(layer, 0, other.read(layer, length), 0)
        self.length = length
