"""Attention of a prompt's rows in the expanded form: every head has keys and values of its own.

For few rows over a long context the absorbed form (`attention`) reads less. For many, it has 3.4 times the arithmetic
with DeepSeek-V3's sizes: 2 (2 C + R) per row, key and head, where this form has 2 (N + R + V), and 2 C (N + V) per key
and head once a pass to expand the latents by `kv_b_proj`. Latents are expanded for as many heads at a time as fit in
`EXPANDED_BYTES`.

A row reads blocks of keys in ascending order from the sequence's first slot on, whatever the pass, so its bits do not
depend on where a prompt is cut. They are not those of the absorbed form: which rows of a prompt are expanded depends on
its length alone (`DeviceModel.expanded_rows`).

Legend: as in `attention`; `T` keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from mtp_spec.kernels import gemm, ordered
from mtp_spec.kernels.checks import expect
from mtp_spec.kernels.direct import enqueue
from mtp_spec.kernels.fp8 import weight_dequant
from mtp_spec.kernels.launching import hopper_module, late, next_power, on_hopper, runs_triton
from mtp_spec.kernels.mla.cache import KEYS, Cache
from mtp_spec.kernels.mla.plan import Head, Plan
from mtp_spec.kernels.mla.reference import rotate

try:
    import triton

    from mtp_spec.kernels.mla import prompt_kernels
except ImportError:  # no Triton for this platform: the reference remains
    triton = None

# rows of a prompt are expanded in runs of this many, beginning at multiples of it: a page of the cache. With
# DeepSeek-V3's heads expanding all latents takes as long as about 25 rows of the absorbed form
EXPANDED_ROWS = 64
EXPANDED_TOKENS = 512  # in prompts of at least this many tokens; shorter ones are bound by launches
EXPANDED_BYTES = 2**30
SHARED = 220 * 1024  # bytes of a program's shared memory for queries, keys and values
PIECE, TILE = 64, 128  # columns of a head read at once; rows of a program
GATHERED = 16  # slots per program when latents are gathered
ONE_SPLIT = gemm.Launch()
TURNED = 32  # row-head pairs per program when queries are rotated


@dataclass(frozen=True, slots=True)
class Span:
    """The rows of one prompt in a pass.

    Attributes:
        first: number of its first row in the pass.
        start: slot of its first row; the host's copy of `plan.length`.
        plan: of all its rows, a chain.
        expanded: how many of them, the first ones, are attended in the expanded form.
        rest: the plan of the others, None if there are none.
    """

    first: int
    start: int
    plan: Plan
    expanded: int
    rest: Plan | None = field(init=False)

    def __post_init__(self) -> None:
        each = self.plan.each
        rest = self.plan.part(self.expanded, each) if self.expanded < each else None
        object.__setattr__(self, "rest", rest)  # every layer needs it

    @property
    def end(self) -> int:
        """Number of the row after its last."""
        return self.first + self.plan.each


Spans = tuple[Span, ...]


def long_rows(spans: Spans) -> tuple[slice, ...]:
    """Returns which rows of a pass are attended in the expanded form."""
    return tuple(slice(span.first, span.first + span.expanded) for span in spans if span.expanded)


def fits(head: Head) -> bool:
    """Whether the kernel takes heads of these sizes."""
    return head.nope % PIECE == 0 and head.nope > 0 and head.rope == PIECE and head.value % PIECE == 0 \
        and head.value <= 256 and head.latent % 16 == 0  # fmt: skip


def available(device: torch.device) -> bool:
    """Whether the kernel runs on a device."""
    return triton is not None and on_hopper(device) and hopper_module("mla.prompt_hopper") is not None


def attend_prompt(
    q: Tensor, kv_b: Tensor, kv_b_scale: Tensor | None, table: Tensor, cache: Cache, plan: Plan, start: int, head: Head,
    out: Tensor,
) -> None:  # fmt: skip
    """Writes the heads' values `[M, H V]` of a sequence's rows, which are in slots `start` and on, to `out`.

    Args:
        q: `[M, H (N + R)]` bf16 or fp16, columns contiguous; its rotated parts are overwritten.
        kv_b: `[H (N + V), C]` as q, or e4m3 with scales `[ceil(H (N + V) / 128), ceil(C / 128)]`.
        table: `[L, 2, R]` float32, `model.rope.rope_table`.
        cache: the cache, which already holds the rows' own latents.
        plan: of one sequence; its pages and offset are used.
        out: `[M, H V]` as q.

    Raises:
        ValueError: sizes that do not fit.
    """
    rows, keys = q.shape[0], start + q.shape[0]
    if plan.sequences != 1 or keys > cache.capacity:
        raise ValueError(f"{plan.sequences} sequences with {keys} of {cache.capacity} slots: one that fits is expected")
    expect("out", out, (rows, head.heads * head.value), head.dtype, beside=q)
    if not runs_triton(q):
        out.copy_(attend_prompt_reference(q, kv_b, kv_b_scale, table, cache, plan, start, head))
        return
    latents, ropes = gathered(cache, plan, keys, head)
    turn(q, table, start + plan.offset, head)
    wide = widened(kv_b, kv_b_scale, head.dtype)
    each, rows_each = _heads_at_once(keys, head), head.nope + head.value
    for first in range(0, head.heads, each):
        count = min(each, head.heads - first)
        part, columns, values = wide, q, out
        if count < head.heads:
            part = wide[first * rows_each : (first + count) * rows_each]
            columns = q[:, first * (head.nope + head.rope) : (first + count) * (head.nope + head.rope)]
            values = out[:, first * head.value :]
        expanded = gemm.bf16_gemm(latents, part, dtype=head.dtype, launch=ONE_SPLIT)
        _attend(columns, expanded, ropes, start, count, head, values)


def gathered(cache: Cache, plan: Plan, keys: int, head: Head) -> tuple[Tensor, Tensor]:
    """Returns latents `[T, C]` and rotated parts `[T, R]` of a sequence's first slots, in 16 bits."""
    device, paged = cache.store.device, plan.pages is not None
    latents = torch.empty(keys, head.latent, dtype=head.dtype, device=device)
    ropes = torch.empty(keys, head.rope, dtype=head.dtype, device=device)
    enqueue(
        prompt_kernels._gather_kernel, (-(-keys // GATHERED),),
        *cache.parts, plan.length if plan.pages is None else plan.pages, cache.base, latents, ropes, keys, PAGED=paged,
        C=head.latent, R=head.rope, BLOCK=KEYS, BYTES=cache.layout.row_bytes, PACKED=cache.layout.packed, ROWS=GATHERED,
        **late(latents),
    )  # fmt: skip
    return latents, ropes


def turn(q: Tensor, table: Tensor, start: int, head: Head) -> None:
    """Rotates the last R columns of every head of q `[M, H (N + R)]` in place; row 0 has position `start`."""
    rows = q.shape[0]
    enqueue(
        prompt_kernels._turn_kernel, (-(-rows * head.heads // TURNED),),
        q, table, rows, head.heads, q.stride(0), start, N=head.nope, R=head.rope, ROWS=TURNED,
        INTERLEAVED=head.interleaved, **late(q),
    )  # fmt: skip


def widened(w: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns w `[N, K]` in 16 bits: as it is, or e4m3 times its scales."""
    if scale is None:
        return w
    out, (n, k) = torch.empty_like(w, dtype=dtype), w.shape
    enqueue(prompt_kernels._widen_kernel, (-(-n // 64), -(-k // 128)), w, scale, out, n, k, BLOCK=64, **late(w))
    return out


def attend_prompt_reference(
    q: Tensor, kv_b: Tensor, kv_b_scale: Tensor | None, table: Tensor, cache: Cache, plan: Plan, start: int, head: Head
) -> Tensor:
    """`attend_prompt` in plain torch, one row at a time; leaves q as it is."""
    _, _, own = next(plan.apart(cache))
    keys = own.read(torch.arange(start + len(q), device=q.device))
    latents, ropes = keys.split((head.latent, head.rope), -1)
    wide = kv_b if kv_b_scale is None else weight_dequant(kv_b, kv_b_scale, dtype=q.dtype)
    expanded = ordered.products(latents.float(), wide.float()).to(q.dtype).unflatten(-1, (head.heads, -1))
    key_nope, value = expanded.float().transpose(0, 1).split((head.nope, head.value), -1)
    nope, rope = q.unflatten(-1, (head.heads, -1)).split((head.nope, head.rope), -1)
    positions = torch.arange(start, start + len(q), device=q.device) + plan.offset
    rope = rotate(rope, table[positions].unsqueeze(1), head.interleaved).to(q.dtype)
    out = []
    for row in range(len(q)):
        seen = slice(0, start + row + 1)
        query = torch.cat((nope[row], rope[row]), -1).float().unsqueeze(1)  # [H, 1, N + R]
        key = torch.cat((key_nope[:, seen], ropes[seen].float().expand(head.heads, -1, -1)), -1)
        weights = ordered.softmax(ordered.products(query, key) * head.scale)
        out.append(ordered.products(weights, value[:, seen].mT).flatten())
    return torch.stack(out).to(q.dtype)


def prompt_bytes(keys: int, rows: int, head: Head) -> int:
    """Returns the bytes that `attend_prompt` needs beside its operands, for up to `keys` slots and `rows` rows."""
    own = head.nope + head.value
    each = keys * (head.latent + head.rope + _heads_at_once(keys, head) * own)
    return 2 * (each + head.heads * own * head.latent + rows * head.heads * head.value)


def _heads_at_once(keys: int, head: Head) -> int:
    return max(1, min(head.heads, EXPANDED_BYTES // (2 * keys * (head.nope + head.value))))


def _attend(q: Tensor, expanded: Tensor, ropes: Tensor, start: int, heads: int, head: Head, out: Tensor) -> None:
    """Writes the values of some heads.

    Args:
        q: `[M, heads (N + R)]`, rotated.
        expanded: `[T, heads (N + V)]`.
        ropes: `[T, R]`.
        out: `[M, .]`, the heads' columns first.
    """
    hopper, rows = hopper_module("mla.prompt_hopper"), q.shape[0]
    assert hopper is not None
    pieces, values = head.nope // PIECE + 1, next_power(head.value)
    block, stages = _blocks(pieces, values)
    tiles = -(-rows // TILE)
    enqueue(
        hopper.attend_prompt_kernel, (tiles * heads,),
        hopper.described(q, PIECE, PIECE), hopper.described(expanded, block, PIECE),
        hopper.described(ropes, block, PIECE), hopper.described(expanded, block, values), out, rows, tiles, heads,
        *hopper.order(heads, tiles), start, out.stride(0), head.scale * math.log2(math.e), PIECES=pieces,
        NOPE=head.nope, V=head.value, WIDE_V=values, BLOCK=block, STAGES=stages, num_warps=4,
    )  # fmt: skip


@lru_cache
def _blocks(pieces: int, values: int) -> tuple[int, int]:
    """Returns keys per block, part of the arithmetic, and blocks in flight."""
    block = 128 if values <= 128 else 64  # sums of 64 rows fill half of the registers
    left = SHARED - 2 * TILE * PIECE * pieces
    return block, max(1, min(4, left // (2 * block * (PIECE * pieces + values))))
