"""Multi-head latent attention over a cache, for the rows of a decode, draft, verify or prefill pass.

DeepSeek-V2 (2405.04434, section 2.1) in the absorbed form: queries and values live in the latent space, so a token
takes C + R cached numbers, whatever the number of heads. One pass over the cache serves every node of a tree: rows are
(node, head) pairs, the context is split over the multiprocessors, and a node sees the committed slots and its own
ancestors. Five launches: prepare (norms, rotation, cache write), absorb, attend, combine, up.

How a context is split depends only on positions (`kernels.split_of`), so a row's bits are those of plain decoding.

Legend: `B` sequences, `E` rows of each, `M` = B E rows, `H` heads, `N` qk_nope_head_dim, `R` qk_rope_head_dim, `C`
kv_lora_rank, `W` = C + R, `V` v_head_dim, `A` columns of the ancestor table, `S` splits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mtp_spec.kernels.checks import expect
from mtp_spec.kernels.direct import described, enqueue
from mtp_spec.kernels.fp8 import BLOCK, E4M3, E4M3_MAX
from mtp_spec.kernels.launching import (
    MULTIPROCESSORS,
    hopper_module,
    interpreted,
    late,
    next_power,
    on_hopper,
    runs_triton,
    shared_memory,
)
from mtp_spec.kernels.mla.cache import KEYS, TAIL, Cache
from mtp_spec.kernels.mla.plan import TILE, Head, Plan, split_of
from mtp_spec.kernels.mla.reference import absorb_reference, attend_reference, prepare_reference, up_reference
from mtp_spec.kernels.quant import Operand, quant
from mtp_spec.kernels.workspace import Workspace

try:
    import triton

    from mtp_spec.kernels.mla import kernels, row_kernels
except ImportError:  # no Triton for this platform: the references remain
    triton = None

PARTS_BYTES = 256 * 2**20  # memory limit for partial results; more rows are attended in several turns
FULL = 0.9  # share of the multiprocessors that a turn should use
PARTS, PEAKS_AND_SUMS = Workspace(torch.bfloat16), Workspace(torch.float32)
COMBINED, COLUMNS = 16, 256  # splits read at once when they are added, and columns per program
# Tiles of node-head pairs up to which Hopper's programs have equally many keys each and load blocks in pieces; the
# second number is for caches of LONG tokens and more. On an H200, of chains over 16,384 to 131,072 keys: 1 and 2 tiles
# 1.02 to 1.33 times as fast, in the median 1.10; 4 tiles 0.89 to 1.31, 1.07; 6 and 8 tiles 0.82 to 1.20, 1.09 and
# 0.98; 10 tiles 0.95 to 1.24, 1.03; 16 tiles 0.96 to 1.12, 0.98. Not part of the arithmetic.
FEW_TILES, FEW_TILES_LONG, LONG = 4, 8, 16384
WARPS = 8  # per program of `attend`, except Hopper's; not part of the arithmetic
# except on Hopper: tiles in flight and keys per step, by the shared memory per program that they need
STEPS = ((220 * 1024, 2, KEYS), (120 * 1024, 1, KEYS // 2), (0, 1, KEYS // 4))
GATHERED = 16  # keys per program when tails are put in order
ROW_TILE = 16  # rows of the small products per head
WEIGHT_WARPS = 8  # per program of those, which holds its weights
# shared memory that such a program of `up` needs beside its weights: 34 KiB, on Hopper 52 with Triton 3.9
BESIDE_WEIGHTS = 60 * 1024


def prepare(
    down: Tensor,
    q_norm: Tensor | None,
    kv_norm: Tensor,
    table: Tensor,
    cache: Cache,
    plan: Plan,
    head: Head,
    eps: float,
    quantise: bool = True,
) -> Operand | None:
    """Writes the rows' latents to the cache; returns the query's latent `[M, Q]`, if it has one.

    Args:
        down: `[M, Q + W]` bf16 or fp16, output of the fused down-projection; without query LoRA Q = H (N + R).
        q_norm: `[Q]`, or None without query LoRA.
        kv_norm: `[C]`.
        table: `[L, 2, R]` float32, `model.rope.rope_table`.
        quantise: return the query's latent as e4m3 with scales, else in the dtype of `down`.
    """
    rows, columns = down.shape
    q_rank = columns - head.width
    _check_cache(cache, head)
    if not runs_triton(down):
        return prepare_reference(down, q_norm, kv_norm, table, cache, plan, head, eps, quantise)
    lora = q_norm is not None
    out = down.new_empty(rows if lora else 0, q_rank, dtype=E4M3 if quantise else down.dtype)
    scales = down.new_empty(rows if lora and quantise else 0, -(-q_rank // BLOCK), dtype=torch.float32)
    enqueue(
        row_kernels._prepare_kernel, (rows, 2 if lora else 1),
        down, kv_norm if q_norm is None else q_norm, kv_norm, table, *_where(plan), plan.depths, plan.slots, out,
        scales, *cache.parts, cache.base, plan.offset, eps, plan.each, PAGED=plan.pages is not None, A_ROWS=q_rank,
        C=head.latent, R=head.rope, BLOCK=KEYS,
        WIDE_A=max(BLOCK, next_power(q_rank)), WIDE_C=max(BLOCK, next_power(head.latent)),
        WIDE_R=next_power(head.rope), BYTES=cache.layout.row_bytes, LORA=lora, QUANTISE=quantise,
        PACKED=cache.layout.packed, INTERLEAVED=head.interleaved, POWER=head.power_of_two, LARGEST=E4M3_MAX,
        **late(down),
    )  # fmt: skip
    if not lora:
        return None
    return (out, scales) if quantise else out


def absorb(q: Tensor, kv_b: Tensor, kv_b_scale: Tensor | None, table: Tensor, plan: Plan, head: Head) -> Tensor:
    """Returns queries in the latent space `[M, head.padded, W]`, dtype as q: q_nope @ W_UK, then the rotated q_rope.

    Heads past H pad `attend`'s tiles; their contents are arbitrary.

    Args:
        q: `[M, H (N + R)]` bf16 or fp16, columns contiguous.
        kv_b: `[H (N + V), C]` as q, or e4m3 with scales `[ceil(H (N + V) / 128), ceil(C / 128)]`.
    """
    if not runs_triton(q):
        return absorb_reference(q, kv_b, kv_b_scale, table, plan, head)
    rows = q.shape[0]
    out = q.new_empty(rows, head.padded, head.width)
    enqueue(
        row_kernels._absorb_kernel, (head.heads, -(-head.latent // BLOCK) + 1),
        q, kv_b, kv_b if kv_b_scale is None else kv_b_scale, table, plan.length, plan.depths, out, rows, q.stride(0),
        plan.offset, head.padded, plan.each, PAGED=plan.pages is not None, N=head.nope, V=head.value, C=head.latent,
        R=head.rope,
        WIDE_N=max(16, next_power(head.nope)), WIDE_R=next_power(head.rope), ROWS=ROW_TILE,
        PACKED=kv_b_scale is not None, INTERLEAVED=head.interleaved, WIDE=interpreted(),
        num_warps=WEIGHT_WARPS, **late(q),
    )  # fmt: skip
    return out


def up(
    context: Tensor, kv_b: Tensor, kv_b_scale: Tensor | None, head: Head, quantise: bool = True,
    out: Tensor | None = None,
) -> Operand:  # fmt: skip
    """Returns the heads' values `[M, H V]`: context @ W_UV.T.

    Args:
        context: `[M, H, C]` bf16 or fp16.
        quantise: return e4m3 with scales `[M, ceil(H V / 128)]`, else the dtype of `context`.
        out: written and returned, if given; not with `quantise`.
    """
    rows, columns = context.shape[0], head.heads * head.value
    if out is not None:
        assert not quantise
        expect("out", out, (rows, columns), context.dtype, beside=context)
    if not runs_triton(context):
        found = up_reference(context, kv_b, kv_b_scale, head, quantise)
        return found if out is None or isinstance(found, tuple) else out.copy_(found)
    whole = quantise and head.value % BLOCK == 0
    if out is None:
        out = context.new_empty(rows, columns, dtype=E4M3 if whole else context.dtype)
    scales = context.new_empty(rows if whole else 0, -(-columns // BLOCK), dtype=torch.float32)
    # a whole block of the next product's scales, or half of one, so that twice as many programs read
    values = BLOCK if whole else BLOCK // 2
    held = values * head.latent * context.element_size() + BESIDE_WEIGHTS <= shared_memory(context.device)
    enqueue(
        row_kernels._up_kernel, (head.heads, -(-head.value // values)),
        context, kv_b, kv_b if kv_b_scale is None else kv_b_scale, out, scales, rows, head.heads, N=head.nope,
        V=head.value, C=head.latent, VALUES=values, CHUNK=min(128, max(16, next_power(head.latent))),
        ROWS=ROW_TILE, PACKED=kv_b_scale is not None, QUANTISE=whole, POWER=head.power_of_two, LARGEST=E4M3_MAX,
        WIDE=interpreted(), HELD=held, num_warps=WEIGHT_WARPS, **late(context),
    )  # fmt: skip
    if whole:
        return out, scales
    return quant(out, head.power_of_two) if quantise else out


def attend(q: Tensor, cache: Cache, plan: Plan, head: Head) -> Tensor:
    """Returns the attention-weighted latents `[M, H, C]`, dtype as q.

    Args:
        q: `[M, head.padded, W]` bf16 or fp16, from `absorb`.
        cache: the cache, which already holds the rows' own latents.

    Raises:
        ValueError: wrong shapes, or sizes that are not powers of two.
    """
    _check(q, cache, plan, head)
    if not runs_triton(q):
        return attend_reference(q, cache, plan, head)
    out = q.new_empty(plan.rows, head.heads, head.latent)
    splits = split_of(cache.capacity - 1, head.split_ends) + 1
    turns = list(_turns(plan, head, splits))
    pairs = splits * max(part.sequences * _pairs(part.each, head) for _, part in turns)
    parts = PARTS.room(q.device, pairs * head.latent).view(head.dtype)
    numbers = PEAKS_AND_SUMS.room(q.device, 2 * pairs)
    for rows, part in turns:
        own = (q, out) if part is plan else (q[rows], out[rows])
        _attend(*own, cache, part, head, parts, numbers, splits)
    return out


def room_bytes(capacity: int, head: Head, rows: int, sequences: int = 1) -> int:
    """Returns the bytes that `attend` keeps for passes of up to `rows` rows of `sequences` sequences over caches of
    `capacity` slots."""
    splits = split_of(capacity - 1, head.split_ends) + 1
    pairs = min(_pairs(rows, head) + (sequences - 1) * TILE, max(_at_once(splits, head) + TILE, _pairs(1, head)))
    return splits * pairs * (2 * head.latent + 8)


def _attend(
    q: Tensor, out: Tensor, cache: Cache, plan: Plan, head: Head, parts: Tensor, numbers: Tensor, splits: int
) -> None:
    each, paged = _pairs(plan.each, head), plan.pages is not None
    padded = plan.sequences * each
    peaks, totals = (numbers.narrow(0, place * splits * padded, splits * padded) for place in range(2))
    if plan.ancestors is not None:
        words = cache.words.shape[1]
        enqueue(
            kernels._gather_kernel, (plan.rows, TAIL // GATHERED),
            cache.words, *_where(plan), plan.depths, plan.ancestors, cache.base, cache.spare, plan.ancestors.stride(0),
            plan.each, PAGED=paged, BLOCK=KEYS, WORDS=words, TAIL=TAIL, CHUNK=GATHERED,
            WIDE=next_power(words), **late(q),
        )  # fmt: skip
    flat = q.view(-1, head.width)
    given = (*_where(plan), plan.depths, peaks, totals, cache.base, cache.spare, plan.each, padded, plan.deepest,
             head.scale * math.log2(math.e), plan.sequences)  # fmt: skip
    sizes = {"PAGED": paged, "HEADS": head.padded, "C": head.latent, "ROWS": TILE, "BLOCK": KEYS, "TAIL": TAIL,
             "CHAIN": plan.ancestors is None, "END1": head.split_ends[1]} | late(q)  # fmt: skip
    tiles = padded // TILE
    packed = cache.layout.packed
    hopper = hopper_module("mla.hopper") if on_hopper(q.device) and not packed else None
    if hopper is not None and hopper.fits(head.latent, head.rope):
        programs = min(splits, max(1, MULTIPROCESSORS // tiles))
        enqueue(
            hopper.attend_kernel,
            (tiles * programs,),
            *hopper.descriptors(flat, cache.store, head),
            parts,
            *given,
            programs,
            R=head.rope,
            FEW=tiles <= (FEW_TILES_LONG if cache.capacity >= LONG else FEW_TILES),
            **sizes,
        )
    else:
        sums = parts[: splits * padded * head.latent].view(-1, head.latent)
        latents, ropes, scales = cache.parts
        # one scale's latents at a time: all of them would not fit into the registers together with the sums
        width = min(head.latent, BLOCK) if packed else head.latent
        stages, block = next(step for least, *step in STEPS if shared_memory(q.device) >= least)
        enqueue(
            kernels._attend_kernel, (tiles * splits,),
            described(flat, TILE, width), described(flat, TILE, head.rope),
            described(latents, block, width), described(ropes, block, head.rope), described(sums, TILE, width),
            scales, *given, WIDTH=width, BYTES=cache.layout.row_bytes, STAGES=stages, PACKED=packed, PAGE=KEYS,
            WIDE=interpreted(), num_warps=WARPS, **sizes | {"BLOCK": block},
        )  # fmt: skip
    columns = min(head.latent, COLUMNS)
    enqueue(
        kernels._combine_kernel, (plan.rows, head.heads, head.latent // columns),
        parts, peaks, totals, plan.length, plan.depths, out, padded, plan.each, each, PAGED=paged,
        HEADS=head.padded, C=head.latent,
        COLUMNS=columns, CHUNK=COMBINED, END1=head.split_ends[1], num_warps=1, **late(q),
    )  # fmt: skip


def _check_cache(cache: Cache, head: Head) -> None:
    layout, store = cache.layout, cache.store
    if (layout.latent, layout.rope, layout.dtype) != (head.latent, head.rope, head.dtype):
        raise ValueError(f"a cache for {layout.latent} + {layout.rope} numbers, heads of {head.latent} + {head.rope}")
    if (*store.shape[1:], store.dtype) != layout.row or not store.is_contiguous():
        columns, dtype = layout.row
        raise ValueError(f"cache {tuple(store.shape)} {store.dtype}: a contiguous [rows, {columns}] {dtype} expected")


def _check(q: Tensor, cache: Cache, plan: Plan, head: Head) -> None:
    _check_cache(cache, head)
    if q.shape != (plan.rows, head.padded, head.width) or q.dtype != head.dtype or not q.is_contiguous():
        raise ValueError(f"q {tuple(q.shape)} {q.dtype}: a contiguous [{plan.rows}, {head.padded}, {head.width}] "
                         f"{head.dtype} expected")  # fmt: skip
    if plan.pages is not None:
        expect("pages", plan.pages, (plan.sequences, cache.capacity // KEYS), torch.int32, beside=q)
    if cache.capacity % KEYS or (plan.pages is None and cache.base + cache.capacity > cache.spare):
        raise ValueError(f"capacity {cache.capacity}: a multiple of {KEYS} expected, with room for tails behind it")
    if plan.ancestors is not None:
        if plan.deepest > KEYS:
            raise ValueError(f"a tree of depth {plan.deepest}: at most {KEYS}")
        if cache.spare + plan.rows * TAIL > cache.store.shape[0]:
            raise ValueError(f"{plan.rows} rows: the cache has room for {(cache.store.shape[0] - cache.spare) // TAIL}")
    sizes = (head.latent, head.rope)
    if any(size < 16 or size & (size - 1) for size in sizes):
        raise ValueError(f"kv_lora_rank {head.latent}, qk_rope_head_dim {head.rope}: powers of two from 16 expected")


def _where(plan: Plan) -> tuple[Tensor, Tensor, int]:
    """Returns lengths, pages and pages per sequence, as kernels take them; without pages these are unused."""
    return (plan.length, plan.length, 0) if plan.pages is None else (plan.length, plan.pages, plan.pages.shape[1])


def _pairs(rows: int, head: Head) -> int:
    """Returns the number of node-head pairs, in whole tiles."""
    return -(-rows * head.padded // TILE) * TILE


def _at_once(splits: int, head: Head) -> int:
    """Returns the number of node-head pairs whose partial results fit."""
    return PARTS_BYTES // (splits * head.latent * 2)


def _turns(plan: Plan, head: Head, splits: int) -> Iterator[tuple[slice, Plan]]:
    """Yields parts of a pass whose partial results fit: some sequences at once, or some rows of one."""
    fit, each = _at_once(splits, head), _pairs(plan.each, head)
    if fit >= each * plan.sequences:
        yield slice(0, plan.rows), plan
        return
    tiles = filling(max(1, fit // TILE))
    sequences = max(1, tiles // (each // TILE))
    rows = plan.each if fit >= each else max(1, tiles * TILE // head.padded)
    for first in range(0, plan.sequences, sequences):
        some = plan.some(first, min(first + sequences, plan.sequences))
        for begin in range(0, plan.each, rows):
            end = min(begin + rows, plan.each)
            start = first * plan.each + begin
            yield slice(start, start + some.sequences * (end - begin)), some.part(begin, end)


def filling(most: int) -> int:
    """Returns how many tiles are attended in a turn, up to `most`: each has equally many programs, so 74 tiles would
    leave 58 multiprocessors idle, and 66 leave none."""
    if most > MULTIPROCESSORS:
        return most // MULTIPROCESSORS * MULTIPROCESSORS
    if most * (MULTIPROCESSORS // most) >= FULL * MULTIPROCESSORS:
        return most
    return MULTIPROCESSORS // -(-MULTIPROCESSORS // most)
