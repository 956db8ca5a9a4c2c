"""Multi-head latent attention (DeepSeek-V2, 2405.04434 section 2.1), absorbed.

Legend: `M` rows, `H` heads, `N` qk_nope_head_dim, `R` qk_rope_head_dim, `C` kv_lora_rank,
`W` = C + R cache width, `T` cached tokens, `V` v_head_dim.

Scores and values live in the latent space, so a token costs W cached values, whatever the number of heads.
`model.training` has the expanded form, over whole sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_spec.model.cache import PAGE, LatentCache
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.distributed.group import ALONE, Ranks
from mtp_spec.model.layers import LATENT_NORM_EPS, Linear, RMSNorm
from mtp_spec.model.rope import apply_rope, softmax_scale

# Contexts are read in whole blocks of this many slots, the rest masked: vector lanes and loop tails then treat
# a row's numbers alike, whatever the number of rows in the batch. The number of blocks is part of the arithmetic too,
# so a row always reads as many as it would alone.
CONTEXT_BLOCK = PAGE


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Cache slots, positions and visible context of the rows of one forward pass.

    Row m is written to slot `start + m`. It sees the first `runs[m]` slots and then those of `more[m]`, which it reads
    in this order.

    Attributes:
        table: `rope_table`.
        positions: of each row.
        exact: whether rows must match plain decoding to the last bit; drafts need not.
    """

    table: Tensor
    start: int
    positions: Sequence[int]
    runs: Sequence[int]
    more: Sequence[Sequence[int]] = ()
    exact: bool = True

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(self.positions)

    def row(self, row: int) -> RowPlan:
        """Returns the plan of one row by itself."""
        one = slice(row, row + 1)
        return RowPlan(self.table, self.start + row, self.positions[one], self.runs[one], self.more[one], self.exact)

    def masks(self) -> Masks:
        """Returns the same for attention by torch."""
        device, count = self.table.device, self.count
        lengths = [run + (len(self.more[row]) if self.more else 0) for row, run in enumerate(self.runs)]
        positions = torch.tensor(list(self.positions), device=device)
        rope = self.table[positions].unsqueeze(1)
        if not self.more:
            size = padded(max(lengths))
            visible = torch.arange(size) < torch.tensor(lengths)[:, None]
            return Masks(self.start, rope, _additive(visible, device), None, tuple(map(padded, lengths)))
        if not self.exact:
            visible = torch.arange(padded(self.start + count)) < torch.tensor(self.runs)[:, None]
            for row, slots in enumerate(self.more):
                visible[row, list(slots)] = True
            return Masks(self.start, rope, _additive(visible, device), None, None)
        size = padded(max(lengths))
        gather = torch.zeros(count, size, dtype=torch.long)
        for row, run in enumerate(self.runs):
            gather[row, :run] = torch.arange(run)
            gather[row, run : lengths[row]] = torch.tensor(list(self.more[row]), dtype=torch.long)
        visible = torch.arange(size) < torch.tensor(lengths)[:, None]
        return Masks(self.start, rope, _additive(visible, device), gather.to(device), tuple(map(padded, lengths)))


@dataclass(frozen=True, slots=True)
class Masks:
    """A `RowPlan` as tensors, computed once and shared by every layer.

    Attributes:
        rope: `[M, 1, 2, R]` angles of the rows' positions.
        mask: `[M, 1, 1, P]` float32, 0 for visible slots and -inf for the others; P a multiple of the block.
        gather: None when slots are in position order (a chain). For a tree: `[M, P]` the slots of each row's
            ancestors in position order (padded with slot 0), and `mask` refers to these.
        sizes: slots that each row reads, whole blocks; None if all read P.
    """

    start: int
    rope: Tensor
    mask: Tensor
    gather: Tensor | None
    sizes: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class JointPlan:
    """The rows of several sequences in one forward pass, one sequence after another.

    Attributes:
        parts: each sequence's cache and the plan of its rows.
    """

    parts: tuple[tuple[LatentCache, RowPlan], ...]

    @classmethod
    def of(cls, *parts: tuple[LatentCache, RowPlan]) -> JointPlan:
        return cls(parts)

    @property
    def counts(self) -> list[int]:
        """Rows of each sequence."""
        return [plan.count for _, plan in self.parts]

    def masks(self) -> JointMasks:
        """Returns the same for attention by torch."""
        parts = tuple((cache, plan.masks()) for cache, plan in self.parts)
        ropes = [plan.rope for _, plan in parts]
        return JointMasks(parts, ropes[0] if len(ropes) == 1 else torch.cat(ropes), self.counts)


@dataclass(frozen=True, slots=True)
class JointMasks:
    """A `JointPlan` as tensors.

    Attributes:
        rope: `[M, 1, 2, R]` angles of all rows.
        counts: rows of each sequence.
    """

    parts: tuple[tuple[LatentCache, Masks], ...]
    rope: Tensor
    counts: Sequence[int]


def padded(length: int) -> int:
    """Returns `length` rounded up to whole context blocks."""
    return -(-length // CONTEXT_BLOCK) * CONTEXT_BLOCK


def plan_rows(table: Tensor, start: int, parents: Sequence[int], offset: int = 0) -> RowPlan:
    """Returns the plan of rows appended at slot `start`.

    Args:
        table: `rope_table`.
        parents: for each row the row it follows, -1 for one that follows the committed context directly.
        offset: position of slot 0 (MTP caches begin at a later position than the main one).
    A tree's rows see the first `start` slots and their own ancestors, in position order: every row is computed as plain
    decoding would.
    """
    count = len(parents)
    if list(parents) == list(range(-1, count - 1)):
        return RowPlan(table, start, range(start + offset, start + offset + count), range(start + 1, start + count + 1))
    lines: list[tuple[int, ...]] = []
    for row, parent in enumerate(parents):
        lines.append((*(lines[parent] if parent >= 0 else ()), start + row))
    positions = [start + offset + len(line) - 1 for line in lines]
    return RowPlan(table, start, positions, [start] * count, lines)


def plan_drafts(
    table: Tensor, start: int, committed: int, position: int, ancestors: Sequence[Sequence[int]]
) -> RowPlan:
    """Returns the plan of one level of a draft tree: rows at one position, appended at slot `start`.

    Args:
        committed: slots that every row sees.
        ancestors: for each row the slots at or after `committed` that it sees besides its own.
    """
    count = len(ancestors)
    more = [(*slots, start + row) for row, slots in enumerate(ancestors)]
    return RowPlan(table, start, [position] * count, [committed] * count, more, exact=False)


def _additive(visible: Tensor, device: torch.device) -> Tensor:
    mask = torch.zeros(visible.shape, dtype=torch.float32)
    return mask.masked_fill_(~visible, float("-inf"))[:, None, None].to(device)


class MLA(nn.Module):
    """One attention layer. Parameters keep the checkpoint's names; the two down-projections are fused.

    Heads and outputs are divided among the ranks; latents and their cache are replicated.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str, ranks: Ranks = ALONE
    ) -> None:
        super().__init__()
        self.config, self.ranks = config, ranks
        heads, hidden = ranks.share(config.num_attention_heads, "num_attention_heads"), config.hidden_size
        self.heads, self.latent, self.rope_dim = heads, config.kv_lora_rank, config.qk_rope_head_dim
        self.nope, self.v_dim = config.qk_nope_head_dim, config.v_head_dim
        self.scale = softmax_scale(config)
        q_rows = heads * config.qk_head_dim
        self.q_rank = config.q_lora_rank
        # [q_a (or the whole q without query LoRA); kv_a]: one product reads both
        self.a_rows = q_rows if self.q_rank is None else self.q_rank
        kv_rows = self.latent + self.rope_dim
        self.a_proj = Linear(self.a_rows + kv_rows, hidden, dtype, device)
        self.q_a_layernorm: RMSNorm | None = None
        if self.q_rank is not None:
            self.q_a_layernorm = RMSNorm(self.q_rank, LATENT_NORM_EPS, dtype, device)
            self.q_b_proj = Linear(q_rows, self.q_rank, dtype, device)
        self.kv_a_layernorm = RMSNorm(self.latent, LATENT_NORM_EPS, dtype, device)
        kv_b_rows = heads * (self.nope + self.v_dim)
        self.kv_b_proj = Linear(kv_b_rows, self.latent, dtype, device)
        columns = config.num_attention_heads * self.v_dim
        self.o_proj = Linear(ranks.share(hidden, "hidden_size"), columns, dtype, device)

    def project(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns q_nope `[..., H, N]`, q_rope `[..., H, R]`, latent row `[..., W]` of rows x `[..., D]`."""
        down = self.a_proj(x)
        q, latent, k_rope = down.split((self.a_rows, self.latent, self.rope_dim), dim=-1)
        if self.q_a_layernorm is not None:
            q = self.q_b_proj(self.q_a_layernorm(q))
        q = q.unflatten(-1, (self.heads, -1))
        q_nope, q_rope = q.split((self.nope, self.rope_dim), dim=-1)
        turned = apply_rope(torch.cat((q_rope, k_rope.unsqueeze(-2)), dim=-2), rope, self.config.rope_interleave)
        row = torch.cat((self.kv_a_layernorm(latent), turned[..., self.heads, :]), dim=-1)
        return q_nope, turned[..., : self.heads, :], row

    def absorbed(self) -> tuple[Tensor, Tensor]:
        """Returns the two halves of kv_b_proj as the absorbed form multiplies them, `[H, N, C]` and `[H, C, V]`."""
        kv_b = self.kv_b_proj.weight.view(self.heads, self.nope + self.v_dim, self.latent)
        return kv_b[:, : self.nope], kv_b[:, self.nope :].transpose(1, 2)

    def rows(self, x: Tensor, layer: int, plan: JointMasks) -> Tensor:
        """Absorbed form: appends the rows x `[M, D]` to this layer of their caches and returns their outputs."""
        q_nope, q_rope, row = self.project(x, plan.rope)
        w_uk, w_vu = self.absorbed()
        q_latent = by_head(q_nope, w_uk)  # [M, H, C]
        q = torch.cat((q_latent, q_rope), dim=-1)  # [M, H, W]
        return self._out(by_head(self._attend_each(q, row, layer, plan), w_vu))

    def _out(self, values: Tensor) -> Tensor:
        """Returns the outputs `[..., D]` of this rank's heads' values `[..., H, V]`."""
        return self.ranks.gather(self.o_proj(self.ranks.gather(values.flatten(-2))))

    def _attend_each(self, q: Tensor, row: Tensor, layer: int, plan: JointMasks) -> Tensor:
        """Attends for each sequence separately over its own context; everything else is one product for the batch."""
        if len(plan.parts) == 1:
            return self._attend_one(q, row, layer, *plan.parts[0])
        counts = list(plan.counts)
        pieces = zip(q.split(counts), row.split(counts), plan.parts, strict=True)
        return torch.cat([self._attend_one(own_q, own_row, layer, *part) for own_q, own_row, part in pieces])

    def _attend_one(self, q: Tensor, row: Tensor, layer: int, cache: LatentCache, plan: Masks) -> Tensor:
        slots = cache.put(layer, plan.start, row, max(plan.mask.shape[-1], plan.start + len(row)))
        whole = self.config.num_attention_heads
        if self.heads == whole:
            return attend(q, slots, plan, self.latent, self.scale)
        # the routine depends on the number of heads, in float32 and, on some processors, in bfloat16: put this rank's
        # heads at their places in the full set, so that the bits match a single process
        own = self.ranks.own(whole)
        room = q.new_zeros(q.shape[0], whole, q.shape[2])
        room[:, own] = q
        return attend(room, slots, plan, self.latent, self.scale)[:, own]

    def checkpoint_slots(self, prefix: str) -> dict[str, Tensor]:
        a = "q_proj" if self.q_rank is None else "q_a_proj"
        slots: dict[str, Tensor] = {
            f"{prefix}.{a}.weight": self.a_proj.weight[: self.a_rows],
            f"{prefix}.kv_a_proj_with_mqa.weight": self.a_proj.weight[self.a_rows :],
            f"{prefix}.kv_a_layernorm.weight": self.kv_a_layernorm.weight,
            f"{prefix}.kv_b_proj.weight": self.kv_b_proj.weight,
            f"{prefix}.o_proj.weight": self.o_proj.weight,
        }
        if self.q_a_layernorm is not None:
            slots[f"{prefix}.q_a_layernorm.weight"] = self.q_a_layernorm.weight
            slots[f"{prefix}.q_b_proj.weight"] = self.q_b_proj.weight
        return slots


def by_head(x: Tensor, weight: Tensor) -> Tensor:
    """Returns each head's own product, `[M, H, B]` of x `[M, H, A]` and weight `[H, A, B]`."""
    return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)


def attend(q: Tensor, slots: Tensor, plan: Masks, latent: int, scale: float) -> Tensor:
    """Returns the attention-weighted latents `[M, H, C]` of queries q `[M, H, W]` over cached slots.

    Every row is a separate batch entry: its heads share the latents, and its arithmetic is that of a row alone. A row
    of a tree sees only its own ancestors. They are gathered in position order, so that the sum over the context adds
    the same numbers in the same order as plain decoding does; a chain's slots are in that order.
    """
    if plan.sizes is None or min(plan.sizes) == plan.mask.shape[-1]:
        return _attend(q, slots, plan.mask, plan.gather, scale)[..., :latent]
    out = q.new_empty(*q.shape[:2], latent)
    for size in set(plan.sizes):
        rows = [row for row, own in enumerate(plan.sizes) if own == size]
        gather = None if plan.gather is None else plan.gather[rows, :size]
        out[rows] = _attend(q[rows], slots, plan.mask[rows, ..., :size], gather, scale)[..., :latent]
    return out


def _attend(q: Tensor, slots: Tensor, mask: Tensor, gather: Tensor | None, scale: float) -> Tensor:
    """Returns `[M, H, W]`: latents are keys and values at once; the rope part of the values is ignored."""
    rows, _, width = q.shape
    size = mask.shape[-1]
    keys = slots[:size].expand(rows, 1, size, width) if gather is None else slots[gather].unsqueeze(1)
    if q.device.type != "cpu":  # where the mask has the queries' type
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(q.unsqueeze(1), keys, keys, attn_mask=mask, scale=scale)[:, 0]
