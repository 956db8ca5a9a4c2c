"""The experts' products of many rows for Hopper, in Gluon; see `gemm_hopper`, whose ring of buffers they use.

Pairs are sorted by expert, so that a slot's inputs are adjacent rows and are copied by TMA; rows past the slot's end
belong to the next expert and are computed but not stored. A warpgroup without a pair skips its products.

Legend: as in `kernels`; a slot has up to 128 pairs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
)

from mtp_spec.kernels.gemm_hopper import STEP, described, load_tile, next_stage, seen_as, stages, summed
from mtp_spec.kernels.quant import block_scaled as _block_scaled

__all__ = ["STEP", "described", "down_kernel", "gate_up_kernel", "stages"]
block_scaled = gluon.jit(_block_scaled.fn)


@gluon.jit
def _copy_in(
    x_desc, w_desc, buffers, bars, slot_expert, slot_first, slot_count, sizes,
    STAGES: gl.constexpr, K: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """The copying warpgroup: a tile's inputs and weights; of HALVES == 2, both halves of its columns one by one, each
    64 of gate and 64 of up, which are `apart` rows from each other."""
    x_tiles, w_tiles = buffers
    full, free = bars
    slots, tiles, k_steps, outputs, apart, first_column = sizes
    bytes: gl.constexpr = x_desc.block_type.nbytes * 2 + w_desc.block_type.nbytes * HALVES
    stage, phase = 0, 1
    for number in range(gl.program_id(0), slots * tiles, gl.num_programs(0)):
        slot, tile = number // tiles, number % tiles
        if gl.load(slot_count + slot) > 0:
            first = gl.load(slot_first + slot)
            w_row = gl.load(slot_expert + slot) * outputs + first_column + tile * 128
            for half in gl.static_range(HALVES):
                for step in range(k_steps):
                    mbarrier.wait(free.index(stage), phase)
                    bar = full.index(stage)
                    mbarrier.expect(bar, bytes)
                    load_tile(x_desc, [first, step * K], bar, x_tiles.index(2 * stage))
                    load_tile(x_desc, [first + 64, step * K], bar, x_tiles.index(2 * stage + 1))
                    for part in gl.static_range(HALVES):
                        load_tile(w_desc, [w_row + half * 64 + part * apart, step * K], bar,
                                  w_tiles.index(HALVES * stage + part))  # fmt: skip
                    stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _skip(stage, phase, bars, steps, STAGES: gl.constexpr):
    """Frees the buffers of a tile unread; returns the next buffer."""
    full, free = bars
    for _ in range(steps):
        mbarrier.wait(full.index(stage), phase)
        mbarrier.arrive(free.index(stage), count=1)
        stage, phase = next_stage(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def _activated(total):
    """Returns silu(gate) * up `[64, 64]` of gate and up beside each other `[64, 128]`."""
    gate, up = gl.split(gl.permute(gl.reshape(total, [64, 2, 64]), [0, 2, 1]))
    return gate / (1 + gl.exp(-gate)) * up


@gluon.jit
def _gate_up(
    w_scale, x_scale, hidden, hidden_scale, buffers, outs, bars, slot_expert, slot_first, slot_count, sizes, inner,
    pairs, OWN: gl.constexpr, STAGES: gl.constexpr, SCALED: gl.constexpr, POWER: gl.constexpr, LARGEST: gl.constexpr,
):  # fmt: skip
    """A multiplying warpgroup: hidden = silu(gate) * up, quantised if SCALED, of 64 pairs."""
    x_tiles, w_tiles = buffers
    slots, tiles, k_steps, _, _, _ = sizes
    deep: gl.constexpr = 32 if SCALED else 16
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, deep])
    tidy: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    stage, phase = 0, 0
    inner_blocks = gl.cdiv(inner, 128)
    out = outs.index(OWN)
    for number in range(gl.program_id(0), slots * tiles, gl.num_programs(0)):
        slot, tile = number // tiles, number % tiles
        count = gl.load(slot_count + slot) - OWN * 64
        if count > 0:
            first = gl.load(slot_first + slot) + OWN * 64
            expert = gl.load(slot_expert + slot)
            rows = gl.minimum(first + gl.arange(0, 64, layout=gl.SliceLayout(1, layout)), pairs - 1)
            x_scales = x_scale + rows.to(gl.int64) * k_steps
            w_scales = w_scale + (expert.to(gl.int64) * 2 * inner_blocks + tile) * k_steps
            for half in gl.static_range(2):
                total, stage, phase = summed(
                    x_tiles, w_tiles, bars, stage, phase, x_scales, w_scales, inner_blocks * k_steps, k_steps, layout,
                    OWN, STAGES, SCALED, 2,
                )  # fmt: skip
                out.slice(half * 64, 64, dim=1).store(_activated(total))
            values = out.load(tidy)
            row = gl.arange(0, 64, layout=gl.SliceLayout(1, tidy))
            column = tile * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, tidy))
            if SCALED:
                values = gl.where(gl.expand_dims(column < inner, 0), values, 0.0)
                values, scale = block_scaled(values, LARGEST, POWER)
                gl.store(hidden_scale + (first + row).to(gl.int64) * inner_blocks + tile, scale, mask=row < count)
            at = gl.expand_dims((first + row).to(gl.int64) * inner, 1) + gl.expand_dims(column, 0)
            kept = gl.expand_dims(row < count, 1) & gl.expand_dims(column < inner, 0)
            gl.store(hidden + at, values.to(hidden.dtype.element_ty), mask=kept)
        elif count > -OWN * 64:
            stage, phase = _skip(stage, phase, bars, 2 * k_steps, STAGES)


@gluon.jit
def _down(
    w_scale, hidden_scale, order, parts, buffers, bars, slot_expert, slot_first, slot_count, sizes, columns,
    OWN: gl.constexpr, STAGES: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """A multiplying warpgroup: parts[pair] = down of the pair's expert @ hidden, of 64 pairs."""
    x_tiles, w_tiles = buffers
    slots, tiles, k_steps, channels, _, first_column = sizes
    deep: gl.constexpr = 32 if SCALED else 16
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, deep])
    stage, phase = 0, 0
    for number in range(gl.program_id(0), slots * tiles, gl.num_programs(0)):
        slot, tile = number // tiles, number % tiles
        count = gl.load(slot_count + slot) - OWN * 64
        if count > 0:
            first = gl.load(slot_first + slot) + OWN * 64
            expert = gl.load(slot_expert + slot)
            lane = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
            real = lane < count
            pair = gl.load(order + first + lane, mask=real, other=0)
            x_scales = hidden_scale + (first + gl.where(real, lane, 0)).to(gl.int64) * k_steps
            scale_row = expert.to(gl.int64) * gl.cdiv(channels, 128) + first_column // 128 + tile
            w_scales = w_scale + scale_row * k_steps
            total, stage, phase = summed(
                x_tiles, w_tiles, bars, stage, phase, x_scales, w_scales, 0, k_steps, layout, OWN, STAGES, SCALED,
            )  # fmt: skip
            column = tile * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, layout))
            at = gl.expand_dims(pair.to(gl.int64) * columns, 1) + gl.expand_dims(column, 0)
            gl.store(parts + at, total.to(parts.dtype.element_ty), mask=gl.expand_dims(real, 1) & gl.expand_dims(column < columns, 0))
        elif count > -OWN * 64:
            stage, phase = _skip(stage, phase, bars, k_steps, STAGES)


@gluon.jit
def _bars(STAGES: gl.constexpr):
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    return full, free


@gluon.jit(do_not_specialize=["pairs", "slots"])
def gate_up_kernel(
    x_desc,  # [P, D] e4m3, bf16 or fp16, sorted by expert, tiles [64, 128 bytes]
    w_desc,  # [E * 2I, D] likewise, tiles [64, 128 bytes]
    w_scale,  # [E, 2 * ceil(I / 128), blocks] float32, used with SCALED
    x_scale,  # [P, blocks] float32, sorted, used with SCALED
    slot_expert,
    slot_first,
    slot_count,
    hidden,  # [P, I] as x, sorted
    hidden_scale,  # [P, ceil(I / 128)] float32, used with SCALED
    pairs,
    slots,
    inner,
    k_steps,
    STAGES: gl.constexpr,
    SCALED: gl.constexpr,
    POWER: gl.constexpr,
    LARGEST: gl.constexpr,
):
    """hidden = silu(gate) * up of every pair, quantised if SCALED; a tile has 128 columns of gate and 128 of up."""
    K: gl.constexpr = x_desc.block_shape[1]
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES, 64, K], x_desc.layout)
    w_tiles = gl.allocate_shared_memory(w_desc.dtype, [2 * STAGES, 64, K], w_desc.layout)
    whole = seen_as(w_tiles, w_desc.dtype, [STAGES, 128, K], w_desc.layout)  # gate and up beside each other
    outs = gl.allocate_shared_memory(gl.float32, [2, 64, 128], gl.SwizzledSharedLayout(4, 2, 8, [1, 0]))
    bars = _bars(STAGES)
    buffers, sizes = (x_tiles, w_tiles), (slots, gl.cdiv(inner, 128), k_steps, 2 * inner, inner, 0)
    gl.warp_specialize(
        [
            (_copy_in, (x_desc, w_desc, buffers, bars, slot_expert, slot_first, slot_count, sizes, STAGES, K, 2)),
            (_gate_up, (w_scale, x_scale, hidden, hidden_scale, (x_tiles, whole), outs, bars, slot_expert, slot_first,
                        slot_count, sizes, inner, pairs, 0, STAGES, SCALED, POWER, LARGEST)),
            (_gate_up, (w_scale, x_scale, hidden, hidden_scale, (x_tiles, whole), outs, bars, slot_expert, slot_first,
                        slot_count, sizes, inner, pairs, 1, STAGES, SCALED, POWER, LARGEST)),
        ],
        [4, 4],
        [240, 240],
    )  # fmt: skip


@gluon.jit(do_not_specialize=["slots"])
def down_kernel(
    x_desc,  # [P, I] e4m3, bf16 or fp16, sorted by expert, tiles [64, 128 bytes]
    w_desc,  # [E * D, I] likewise, tiles [128, 128 bytes]
    w_scale,  # [E, ceil(D / 128), blocks] float32, used with SCALED
    x_scale,  # [P, blocks] float32, sorted, used with SCALED
    order,
    slot_expert,
    slot_first,
    slot_count,
    parts,  # [P, columns], by number of the pair
    slots,
    channels,
    first_column,  # a multiple of 128
    columns,
    k_steps,
    STAGES: gl.constexpr,
    SCALED: gl.constexpr,
):
    """parts[pair] = some outputs of down of the pair's expert @ hidden, rounded."""
    K: gl.constexpr = x_desc.block_shape[1]
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES, 64, K], x_desc.layout)
    w_tiles = gl.allocate_shared_memory(w_desc.dtype, [STAGES, 128, K], w_desc.layout)
    bars = _bars(STAGES)
    buffers, sizes = (x_tiles, w_tiles), (slots, gl.cdiv(columns, 128), k_steps, channels, 0, first_column)
    gl.warp_specialize(
        [
            (_copy_in, (x_desc, w_desc, buffers, bars, slot_expert, slot_first, slot_count, sizes, STAGES, K, 1)),
            (_down, (w_scale, x_scale, order, parts, buffers, bars, slot_expert, slot_first, slot_count, sizes,
                     columns, 0, STAGES, SCALED)),
            (_down, (w_scale, x_scale, order, parts, buffers, bars, slot_expert, slot_first, slot_count, sizes,
                     columns, 1, STAGES, SCALED)),
        ],
        [4, 4],
        [240, 240],
    )  # fmt: skip
