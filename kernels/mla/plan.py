"""Parameters of attention's launches: head sizes, the rows of a pass, and how a context is split.

Legend: as in `attention`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtp_spec.kernels.mla.cache import Cache, Layout

# Positions per split, and where larger ones begin: short splits fill the GPU at short contexts, long ones limit the
# number of parts at long contexts. A pass of few tiles takes as long as its longest split, so where a row is at most
# one tile, short splits go on for longer. Part of the arithmetic.
SPLIT_SIZES = (128, 512, 1024, 2048)
SPLIT_ENDS, SPLIT_ENDS_ONE_TILE = (1024, 16384, 65536), (1024, 32768, 65536)
TILE = 64  # node-head pairs per program, wgmma's rows


@dataclass(frozen=True, slots=True)
class Head:
    """Sizes of the attention: see the legend."""

    heads: int
    nope: int
    rope: int
    latent: int
    value: int
    scale: float  # of the scores
    interleaved: bool = True
    power_of_two: bool = False  # scales of quantised operands ("ue8m0")
    dtype: torch.dtype = torch.bfloat16  # of activations and cache

    @property
    def width(self) -> int:
        """W."""
        return self.latent + self.rope

    def layout(self, packed: bool = False) -> Layout:
        """Returns the layout of a cache for these sizes."""
        return Layout(self.latent, self.rope, packed, self.dtype)

    @property
    def split_ends(self) -> tuple[int, int, int]:
        """Positions up to which splits have each of SPLIT_SIZES but the last."""
        return SPLIT_ENDS_ONE_TILE if self.padded <= TILE else SPLIT_ENDS

    @property
    def padded(self) -> int:
        """Heads per row of queries, padded so that tiles of node-head pairs begin and end with a head."""
        power = 1 << (self.heads - 1).bit_length()
        return power if power <= TILE else -(-self.heads // TILE) * TILE


@dataclass(frozen=True, slots=True)
class Plan:
    """Positions, slots and ancestors of the rows of one pass; on the device, so that a captured pass reads new values.

    A pass has the rows of B sequences, E of each, one sequence after another; their trees have one shape.

    Attributes:
        length: `[B]` int32, committed slots L of each sequence.
        depths: `[E]` int32: a sequence's row e has position offset + L + depths[e].
        slots: `[E]` int32: row e is written to slot L + slots[e].
        ancestors: `[E, A]` int32: column d holds the number (as in `slots`) of row e's ancestor at depth d, column
            depths[e] its own. None for a chain: depths and slots rise by one from row to row.
        deepest: the largest depth.
        offset: position of slot 0.
        pages: `[B, P]` int32, where each sequence's slots are: the first row, within a layer, of every `KEYS` of them.
            None for one sequence with its own cache of contiguous slots.
    """

    length: Tensor
    depths: Tensor
    slots: Tensor
    ancestors: Tensor | None
    deepest: int
    offset: int = 0
    pages: Tensor | None = None

    @property
    def rows(self) -> int:
        """M = B E."""
        return self.sequences * self.each

    @property
    def sequences(self) -> int:
        """B."""
        return self.length.shape[0]

    @property
    def each(self) -> int:
        """E."""
        return self.depths.shape[0]

    def part(self, begin: int, end: int) -> Plan:
        """Returns the plan of every sequence's rows begin .. end - 1."""
        ancestors, deepest = self.ancestors, self.deepest
        if ancestors is None:
            deepest -= self.each - end
        else:
            ancestors = ancestors[begin:end]
        return replace(self, depths=self.depths[begin:end], slots=self.slots[begin:end], ancestors=ancestors,
                       deepest=deepest)  # fmt: skip

    def some(self, begin: int, end: int) -> Plan:
        """Returns the plan of all rows of sequences begin .. end - 1."""
        pages = None if self.pages is None else self.pages[begin:end]
        return replace(self, length=self.length[begin:end], pages=pages)

    def apart(self, cache: Cache) -> Iterator[tuple[slice, Plan, Cache]]:
        """Yields each sequence's rows in the pass, and its own plan and cache."""
        for sequence in range(self.sequences):
            alone, pages = self.some(sequence, sequence + 1), None if self.pages is None else self.pages[sequence]
            yield slice(sequence * self.each, (sequence + 1) * self.each), alone, replace(cache, pages=pages)


def chain(length: Tensor, rows: int, offset: int = 0) -> Plan:
    """Returns the plan of rows that follow the committed slots and each other."""
    order = torch.arange(rows, dtype=torch.int32, device=length.device)
    return Plan(length, order, order, None, rows - 1, offset)


def split_of(position: int, ends: Sequence[int]) -> int:
    """Returns the split that a position belongs to; `kernels.split_of` on the device.

    Args:
        ends: `Head.split_ends`.
    """
    split = begin = 0
    for end, size in zip(ends, SPLIT_SIZES, strict=False):
        if position < end:
            return split + (position - begin) // size
        split, begin = split + (end - begin) // size, end
    return split + (position - begin) // SPLIT_SIZES[-1]
