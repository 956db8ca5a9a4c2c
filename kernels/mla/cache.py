"""The latent cache of multi-head latent attention: bfloat16 or float16, or packed with FP8 latents.

A packed row is laid out as in FlashMLA's FP8 cache of DeepSeek-V3.2: latents in e4m3, a float32 scale for every 128 of
them, and the rotated part in bfloat16, because its errors would grow with the distance of two tokens. Scales are powers
of two, so a latent is restored in bfloat16 without a second rounding. It is rounded once, when it is written; decode,
verify and draft all read the same number.

Legend: `C` kv_lora_rank, `R` qk_rope_head_dim, `W` = C + R.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mtp_spec.kernels.fp8 import BLOCK, E4M3, act_quant

KEYS = 64  # keys a block
TAIL = 2 * KEYS  # slots for a node's last keys: committed slots past the last whole block, and its ancestors
ALIGNED = 16  # bytes, to which TMA wants every part of a row
WORD = torch.int32


@dataclass(frozen=True, slots=True)
class Layout:
    """Layout of a token's row: C latents and R numbers of the rotated part."""

    latent: int
    rope: int
    packed: bool = False
    dtype: torch.dtype = torch.bfloat16  # of the unpacked parts

    @property
    def width(self) -> int:
        """W."""
        return self.latent + self.rope

    @property
    def row_bytes(self) -> int:
        """Bytes per token and layer."""
        if not self.packed:
            return 2 * self.width
        return self.latent + -(-4 * self.blocks // ALIGNED) * ALIGNED + 2 * self.rope

    @property
    def blocks(self) -> int:
        """Number of scales in a packed row."""
        return -(-self.latent // BLOCK)

    @property
    def row(self) -> tuple[int, torch.dtype]:
        """Columns and dtype of a store."""
        return (self.row_bytes, torch.uint8) if self.packed else (self.width, self.dtype)

    def empty(self, rows: int, device: torch.device | str) -> Tensor:
        """Returns a store of zeros."""
        columns, dtype = self.row
        return torch.zeros(rows, columns, dtype=dtype, device=device)


@dataclass(frozen=True)
class Cache:
    """The latents of one layer inside the store of all layers.

    Unwritten rows must hold finite numbers: whole blocks are read and masked afterwards.

    Attributes:
        store: `[rows, W]` bf16 or fp16, or `[rows, layout.row_bytes]` uint8.
        base: the layer's first row.
        capacity: rows of a sequence, a multiple of 64.
        spare: first of the rows, `TAIL` per node, where a tree's last keys are put in order; all layers share them.
        pages: `[capacity / KEYS]` int32, where a sequence's slots are (`mla.Plan`); None: contiguous from `base` on.
    """

    store: Tensor
    base: int
    capacity: int
    spare: int
    layout: Layout
    pages: Tensor | None = None

    @property
    def slots(self) -> Tensor:
        """The sequence's slots `[capacity, .]` in the layer; a copy if they are in pages."""
        if self.pages is None:
            return self.store[self.base : self.base + self.capacity]
        return self.store[self.rows(torch.arange(self.capacity, device=self.store.device))]

    def rows(self, slots: Tensor) -> Tensor:
        """Returns the numbers of the store's rows for slots `[n]` int64."""
        if self.pages is None:
            return self.base + slots
        return self.base + self.pages.long()[slots // KEYS] + slots % KEYS

    @property
    def words(self) -> Tensor:
        """The store `[rows, row_bytes / 4]` int32, for copies that need not know what a row holds."""
        return self.store.view(WORD)

    @property
    def latents(self) -> Tensor:
        """The store's latents `[rows, C]` bf16, fp16 or e4m3."""
        latents = self.store[:, : self.layout.latent]
        return latents.view(E4M3) if self.layout.packed else latents

    @property
    def scales(self) -> Tensor:
        """A packed store's scales `[rows, ceil(C / 128)]` float32."""
        first = self.layout.latent // 4
        return self.store.view(torch.float32)[:, first : first + self.layout.blocks]

    @property
    def ropes(self) -> Tensor:
        """The store's rotated parts `[rows, R]` bf16 or fp16."""
        return self.store.view(self.layout.dtype)[:, -self.layout.rope :]

    @cached_property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, rotated parts and scales of the store, as kernels take them; without scales the last is unused."""
        return self.latents, self.ropes, self.scales if self.layout.packed else self.ropes

    def write(self, slots: Tensor, rows: Tensor) -> None:
        """Writes rows `[n, W]` to slots `[n]` int64 of the layer, rounded to its dtype."""
        at, latent = self.rows(slots), rows[:, : self.layout.latent]
        if self.layout.packed:
            quantised, self.scales[at] = act_quant(latent, power_of_two=True)
            # as bytes: not every index operation supports e4m3
            self.store[at, : self.layout.latent] = quantised.view(torch.uint8)
        else:
            self.latents[at] = latent.to(self.layout.dtype)
        self.ropes[at] = rows[:, self.layout.latent :].to(self.layout.dtype)

    def read(self, slots: Tensor) -> Tensor:
        """Returns the contents of slots `[n]` int64 of the layer, `[n, W]` bf16 or fp16."""
        at = self.rows(slots)
        if not self.layout.packed:
            return self.store[at]
        scales = self.scales[at].repeat_interleave(BLOCK, 1)[:, : self.layout.latent]
        latents = self.store[at, : self.layout.latent].view(E4M3).float() * scales
        return torch.cat((latents.to(self.layout.dtype), self.ropes[at]), 1)


def new_caches(
    layers: int, capacity: int, nodes: int, layout: Layout, device: torch.device | str, pages: int | None = None
) -> list[Cache]:
    """Returns empty caches of some layers with room for `capacity` tokens and passes of up to `nodes` rows of trees.

    Args:
        pages: pages per layer, of `KEYS` rows each, that sequences share; None: memory for one sequence.
    """
    capacity = whole_blocks(capacity)
    apart = capacity if pages is None else pages * KEYS
    store = layout.empty(layers * apart + nodes * TAIL, device)
    return [Cache(store, layer * apart, capacity, layers * apart, layout) for layer in range(layers)]


def cache_bytes(layers: int, capacity: int, nodes: int, layout: Layout, pages: int | None = None) -> int:
    """Returns the bytes that `new_caches` allocates."""
    apart = whole_blocks(capacity) if pages is None else pages * KEYS
    return (layers * apart + nodes * TAIL) * layout.row_bytes


def whole_blocks(tokens: int) -> int:
    """Returns tokens rounded up to whole blocks of keys."""
    return -(-tokens // KEYS) * KEYS
