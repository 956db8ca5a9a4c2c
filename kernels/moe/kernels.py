"""The experts' products as Triton kernels, in FP8 or 16 bits; imported by `layer` if Triton is available.

One program handles one slot (an expert with up to TOKENS of its pairs) and one stretch of the expert's outputs, so
every expert's weights are read once. Operands are swapped as in `gemm`: wgmma's 64 rows are weights, tokens are the
narrow side. Sums leave the tensor core every 128 of K and go on in float32. A pair's arithmetic does not depend on the
other pairs: lanes without a pair are zero, read nothing and are not stored.

Legend: `M` rows, `P` pairs, `D` channels, `I` expert width, `K` experts per row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mtp_spec.kernels.launching import EARLY, prefetch, pull
from mtp_spec.kernels.quant import block_scaled


@triton.jit
def _slot_pairs(order, first, count, TOKENS: tl.constexpr):
    """Returns the slot's pairs [TOKENS] and which lanes are real."""
    lane = tl.arange(0, TOKENS)
    real = lane < count
    return tl.load(order + first + tl.where(real, lane, 0)).to(tl.int64), real


@triton.jit
def _times(w, a, total, WIDE: tl.constexpr):
    """Returns total + w @ a.T of 16-bit tiles."""
    if WIDE:  # the interpreter cannot multiply bfloat16
        w = w.to(tl.float32)
        a = a.to(tl.float32)
    return tl.dot(w, a.T, total)


@triton.jit
def _gate_up_kernel(
    w_desc,  # [E * 2I, D] e4m3, bf16 or fp16, tiles [TILE, 128]
    w,  # the same, to be pulled into the cache
    w_scale,  # [E, 2 * ceil(I / 128), blocks] float32, used with SCALED
    x,  # [M, D] as w
    x_scale,  # [M, blocks] float32, used with SCALED
    order,
    slot_expert,
    slot_first,
    slot_count,
    hidden,  # [P, I] as w
    hidden_scale,  # [P, ceil(I / 128)] float32, used with SCALED
    wide,  # [P, I] float32, used with SCALED and tiles of 64
    arrivals,  # [slots * ceil(I / 128)] int32, zero before and after
    inner,
    channels,
    blocks,
    per_row,
    slots,
    experts,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN: tl.constexpr,
    SHARED: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
    POWER: tl.constexpr,
    LARGEST: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """hidden = silu(gate) * up, quantised if SCALED; a program has the same TILE columns of gate and up."""
    if PDL:
        if SHARED > 0 and AHEAD > 0:
            # Every row chooses the shared experts, the last ones, so their weights are prefetched before the gate has
            # chosen. Each program has a stretch of them, each of four threads a part of it.
            part = tl.program_id(0).to(tl.int64) * 4 + tl.arange(0, 128) // 32
            size: tl.constexpr = w.dtype.element_ty.primitive_bitwidth // 8
            first_one = (experts - SHARED).to(tl.int64) * 2 * inner * channels + part * (AHEAD * 4096 // size)
            left = (experts.to(tl.int64) * 2 * inner * channels - first_one) * size
            wanted = (left > 0) & (tl.arange(0, 128) % 32 == 0)
            prefetch(w + tl.where(wanted, first_one, 0), tl.minimum(left, AHEAD * 4096).to(tl.int32), wanted)
        gdc_wait()
        gdc_launch_dependents()  # not earlier: the next kernel reads the slots before it waits
    tiles = tl.cdiv(inner, TILE)
    # from the last slot down: shared experts, which are in the cache, come first
    slot, tile = slots - 1 - tl.program_id(0) // tiles, tl.program_id(0) % tiles
    expert, first, count = tl.load(slot_expert + slot), tl.load(slot_first + slot), tl.load(slot_count + slot)
    if count == 0:
        return
    pair, real = _slot_pairs(order, first, count, TOKENS)
    token = pair // per_row
    inner_blocks = tl.cdiv(inner, 128)
    gate_scale = w_scale + (expert.to(tl.int64) * 2 * inner_blocks + tile * TILE // 128) * blocks
    up_scale = gate_scale + inner_blocks.to(tl.int64) * blocks
    gate_row = expert * 2 * inner + tile * TILE
    places = tl.arange(0, 128)
    rows = x + token[:, None] * channels + places[None, :]
    gate = tl.zeros((TILE, TOKENS), dtype=tl.float32)
    up = tl.zeros((TILE, TOKENS), dtype=tl.float32)
    for block in tl.range(0, blocks, num_stages=STAGES, loop_unroll_factor=UNROLL):
        w_gate = w_desc.load([gate_row, block * 128])
        w_up = w_desc.load([gate_row + inner, block * 128])
        if EVEN:
            a = tl.load(rows + block * 128, mask=real[:, None], other=0.0)
        else:
            inside = real[:, None] & (block * 128 + places < channels)[None, :]
            a = tl.load(rows + block * 128, mask=inside, other=0.0)
        if SCALED:
            scale = tl.load(x_scale + token * blocks + block, mask=real, other=0.0)
            gate += tl.dot(w_gate, a.T) * (scale * tl.load(gate_scale + block))[None, :]
            up += tl.dot(w_up, a.T) * (scale * tl.load(up_scale + block))[None, :]
        else:
            gate = _times(w_gate, a, gate, WIDE)
            up = _times(w_up, a, up, WIDE)
    values = tl.trans(gate / (1 + tl.exp(-gate)) * up)  # [TOKENS, TILE]
    if not SCALED:
        column = tile * TILE + tl.arange(0, TILE)
        kept = real[:, None] & (column < inner)[None, :]
        tl.store(hidden + pair[:, None] * inner + column[None, :], values.to(hidden.dtype.element_ty), mask=kept)
    elif TILE == 128:
        column = tile * 128 + places
        _store_hidden(values, column, hidden, hidden_scale, pair, real, inner, inner_blocks, tile, POWER, LARGEST)
    else:
        # two programs share a block of 128: the last to finish quantises it
        column = tile * TILE + tl.arange(0, TILE)
        kept = real[:, None] & (column < inner)[None, :]
        tl.store(wide + pair[:, None] * inner + column[None, :], values, mask=kept)
        tl.debug_barrier()  # all threads' stores come before the one thread's arrival
        half = tile // 2
        others = tl.minimum(tiles - half * 2, 2) - 1
        counter = arrivals + slot * inner_blocks + half
        if tl.atomic_add(counter, 1, sem="acq_rel") == others:
            tl.debug_barrier()
            whole = half * 128 + places
            there = real[:, None] & (whole < inner)[None, :]
            both = tl.load(wide + pair[:, None] * inner + whole[None, :], mask=there, other=0.0, volatile=True)
            _store_hidden(both, whole, hidden, hidden_scale, pair, real, inner, inner_blocks, half, POWER, LARGEST)
            tl.store(counter, 0)


@triton.jit
def _store_hidden(
    values, column, hidden, hidden_scale, pair, real, inner, inner_blocks, block,
    POWER: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Quantises values [TOKENS, 128], one block of each pair."""
    values = tl.where((column < inner)[None, :], values, 0.0)
    quantised, scale = block_scaled(values, LARGEST, POWER)
    kept = real[:, None] & (column < inner)[None, :]
    tl.store(hidden + pair[:, None] * inner + column[None, :], quantised.to(hidden.dtype.element_ty), mask=kept)
    tl.store(hidden_scale + pair * inner_blocks + block, scale, mask=real)


@triton.jit
def _down_kernel(
    w_desc,  # [E * D, I] e4m3, bf16 or fp16, tiles [TILE, 128]
    w,  # the same, to be pulled into the cache
    w_scale,  # [E, ceil(D / 128), blocks] float32, used with SCALED
    hidden,  # [P, I] as w
    hidden_scale,  # [P, blocks] float32, used with SCALED
    order,
    slot_expert,
    slot_first,
    slot_count,
    weights,  # [M, K] float32
    parts,  # [P, D] as out
    arrivals,  # [M * ceil(D / TILE)] int32, zero before and after
    out,  # [M, D]
    inner,
    channels,
    blocks,
    slots,
    experts,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN: tl.constexpr,
    PER_ROW: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """parts[pair] = down of the pair's expert @ hidden[pair], rounded; the last of a row's pairs to end adds them."""
    tiles = tl.cdiv(channels, TILE)
    slot, tile = slots - 1 - tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if PDL:
        gdc_launch_dependents()
        if AHEAD > 0 and tl.program_id(0) < EARLY:
            # The slots were written two launches ago, and only a prefetch depends on them here. Volatile, so that no
            # line stays in the L1 cache.
            if tl.load(slot_count + slot, volatile=True) > 0:
                early = tl.minimum(tl.maximum(tl.load(slot_expert + slot, volatile=True), 0), experts - 1)
                pull(w, early * channels + tile * TILE, 0, experts * channels, inner, TILE, AHEAD)
        gdc_wait()
    expert, first, count = tl.load(slot_expert + slot), tl.load(slot_first + slot), tl.load(slot_count + slot)
    if count == 0:
        return
    pair, real = _slot_pairs(order, first, count, TOKENS)
    scale_row = w_scale + (expert.to(tl.int64) * tl.cdiv(channels, 128) + tile * TILE // 128) * blocks
    first_row = expert * channels + tile * TILE
    places = tl.arange(0, 128)
    rows = hidden + pair[:, None] * inner + places[None, :]
    total = tl.zeros((TILE, TOKENS), dtype=tl.float32)
    for block in tl.range(0, blocks, num_stages=STAGES, loop_unroll_factor=UNROLL):
        w_tile = w_desc.load([first_row, block * 128])
        if EVEN:
            a = tl.load(rows + block * 128, mask=real[:, None], other=0.0)
        else:
            inside = real[:, None] & (block * 128 + places < inner)[None, :]
            a = tl.load(rows + block * 128, mask=inside, other=0.0)
        if SCALED:
            scale = tl.load(hidden_scale + pair * blocks + block, mask=real, other=0.0) * tl.load(scale_row + block)
            total += tl.dot(w_tile, a.T) * scale[None, :]
        else:
            total = _times(w_tile, a, total, WIDE)
    column = tile * TILE + tl.arange(0, TILE)
    inside = (column < channels)[None, :]
    part = tl.trans(total).to(parts.dtype.element_ty)  # [TOKENS, TILE]
    tl.store(parts + pair[:, None] * channels + column[None, :], part, mask=real[:, None] & inside)
    tl.debug_barrier()  # all threads' stores must precede the arrivals
    row = pair // PER_ROW
    counter = arrivals + row * tiles + tile
    last = real & (tl.atomic_add(counter, 1, mask=real, sem="acq_rel") == PER_ROW - 1)
    if tl.max(last.to(tl.int32), axis=0) > 0:
        tl.debug_barrier()
        mask = last[:, None] & inside
        summed = tl.zeros((TOKENS, TILE), dtype=tl.float32)
        for one in tl.static_range(PER_ROW):
            its = row * PER_ROW + one
            part = tl.load(parts + its[:, None] * channels + column[None, :], mask=mask, other=0.0, volatile=True)
            summed += tl.load(weights + its, mask=last, other=0.0)[:, None] * part.to(tl.float32)
        places_out = row[:, None] * channels + column[None, :]
        tl.store(out + places_out, summed.to(out.dtype.element_ty), mask=mask)
        tl.store(counter, 0, mask=last)
