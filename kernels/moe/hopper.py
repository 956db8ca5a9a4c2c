"""The experts' products of many rows for Hopper, in Gluon; see `gemm_hopper`, whose ring of buffers they use.

Pairs are sorted by expert, so that a slot's inputs are adjacent rows and are copied by TMA; rows past the slot's end
belong to the next expert and are computed but not stored. A warpgroup without a pair skips its products.

A tile is 128 pairs by 256 outputs: 128 columns of gate and of up, or 256 of down. A warpgroup has two sums of 64 by 128
and one product in flight; while it adds that, the tensor core works for the other warpgroup.

Legend: as in `kernels`; a slot has up to 128 pairs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mtp_spec.kernels.gemm_hopper import STEP, described, load_tile, next_stage, seen_as, stages
from mtp_spec.kernels.quant import block_scaled as _block_scaled

__all__ = ["STEP", "described", "down_kernel", "gate_up_kernel", "stages"]
block_scaled = gluon.jit(_block_scaled.fn)


@gluon.jit
def _copy_in(
    x_desc, w_desc, buffers, bars, slot_expert, slot_first, slot_count, sizes, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warpgroup: a tile's inputs and 256 rows of weights, in boxes `apart` rows from each other."""
    x_tiles, w_tiles = buffers
    full, free = bars
    slots, tiles, k_steps, outputs, apart, first_column = sizes
    width: gl.constexpr = w_desc.block_shape[0]
    boxes: gl.constexpr = 256 // width
    bytes: gl.constexpr = x_desc.block_type.nbytes + w_desc.block_type.nbytes * boxes
    K: gl.constexpr = x_desc.block_shape[1]
    stage, phase = 0, 1
    for number in range(gl.program_id(0), slots * tiles, gl.num_programs(0)):
        slot, tile = number // tiles, number % tiles
        if gl.load(slot_count + slot) > 0:
            first = gl.load(slot_first + slot)
            w_row = gl.load(slot_expert + slot) * outputs + first_column + tile * width
            for step in range(k_steps):
                mbarrier.wait(free.index(stage), phase)
                bar = full.index(stage)
                mbarrier.expect(bar, bytes)
                load_tile(x_desc, [first, step * K], bar, x_tiles.index(stage))
                for box in gl.static_range(boxes):
                    load_tile(w_desc, [w_row + box * apart, step * K], bar, w_tiles.index(boxes * stage + box))
                stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _summed(
    x_tiles, w_tiles, bars, stage, phase, x_scales, w_scales, apart, steps, layout: gl.constexpr,
    OWN: gl.constexpr, STAGES: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """Sums a warpgroup's 64 pairs by 2 times 128 columns over K; returns both sums and the next buffer.

    Args:
        x_scales: of the pairs, pointers `[64]`, used with SCALED like those that follow.
        w_scales: of the first 128 columns; of the others, `apart` further.
    """
    full, free = bars
    total = gl.zeros([64, 128], gl.float32, layout)
    other = gl.zeros([64, 128], gl.float32, layout)
    part = gl.zeros([64, 128], gl.float32, layout)  # carried, so that all parts have the same registers
    if SCALED:
        rows, scale, scale_other = gl.load(x_scales), gl.load(w_scales), gl.load(w_scales + apart)
    for step in range(steps):
        mbarrier.wait(full.index(stage), phase)
        x = x_tiles.index(2 * stage + OWN)
        w, w_other = w_tiles.index(2 * stage).permute((1, 0)), w_tiles.index(2 * stage + 1).permute((1, 0))
        if SCALED:
            part = warpgroup_mma(x, w, part, use_acc=False, is_async=True)
            later = gl.minimum(step + 1, steps - 1)
            next_rows, next_scale = gl.load(x_scales + later), gl.load(w_scales + later)
            next_other = gl.load(w_scales + apart + later)
            part = warpgroup_mma_wait(0, deps=[part])
            # waiting for nothing: the compilers add a part only after the next one has begun otherwise, which then
            # cannot have its registers
            total = warpgroup_mma_wait(0, deps=[total + part * gl.expand_dims(rows * scale, 1)])
            part = warpgroup_mma(x, w_other, part, use_acc=False, is_async=True)
            part = warpgroup_mma_wait(0, deps=[part])
            mbarrier.arrive(free.index(stage), count=1)
            other = warpgroup_mma_wait(0, deps=[other + part * gl.expand_dims(rows * scale_other, 1)])
            rows, scale, scale_other = next_rows, next_scale, next_other
        else:
            total = warpgroup_mma(x, w, total, is_async=True)
            other = warpgroup_mma(x, w_other, other, is_async=True)
            total, other = warpgroup_mma_wait(0, deps=[total, other])
            mbarrier.arrive(free.index(stage), count=1)
        stage, phase = next_stage(stage, phase, STAGES)
    return total, other, stage, phase


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
            gate, up, stage, phase = _summed(
                x_tiles, w_tiles, bars, stage, phase, x_scales, w_scales, inner_blocks * k_steps, k_steps, layout, OWN,
                STAGES, SCALED,
            )  # fmt: skip
            values = gate / (1 + gl.exp(-gate)) * up
            if SCALED:
                column = tile * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, values.type.layout))
                row = gl.arange(0, 64, layout=gl.SliceLayout(1, values.type.layout))
                values = gl.where(gl.expand_dims(column < inner, 0), values, 0.0)
                values, scale = block_scaled(values, LARGEST, POWER)
                gl.store(hidden_scale + (first + row).to(gl.int64) * inner_blocks + tile, scale, mask=row < count)
            out.store(values.to(hidden.dtype.element_ty))
            row = gl.arange(0, 64, layout=gl.SliceLayout(1, tidy))
            column = tile * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, tidy))
            at = gl.expand_dims((first + row).to(gl.int64) * inner, 1) + gl.expand_dims(column, 0)
            kept = gl.expand_dims(row < count, 1) & gl.expand_dims(column < inner, 0)
            gl.store(hidden + at, out.load(tidy), mask=kept)
        elif count > -OWN * 64:
            stage, phase = _skip(stage, phase, bars, k_steps, STAGES)


@gluon.jit
def _store_parts(total, out, parts, places, real, first_column, columns, tidy: gl.constexpr):
    """Stores 128 columns of 64 pairs' outputs, 16 bytes a thread."""
    out.store(total.to(out.dtype))
    column = first_column + gl.arange(0, 128, layout=gl.SliceLayout(0, tidy))
    at = gl.expand_dims(places, 1) + gl.expand_dims(column, 0)
    kept = gl.expand_dims(real, 1) & gl.expand_dims(column < columns, 0)
    gl.store(parts + at, out.load(tidy), mask=kept)


@gluon.jit
def _down(
    w_scale, hidden_scale, order, parts, buffers, outs, bars, slot_expert, slot_first, slot_count, sizes, columns,
    OWN: gl.constexpr, STAGES: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """A multiplying warpgroup: parts[pair] = down of the pair's expert @ hidden, of 64 pairs."""
    x_tiles, w_tiles = buffers
    slots, tiles, k_steps, channels, _, first_column = sizes
    deep: gl.constexpr = 32 if SCALED else 16
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, deep])
    each: gl.constexpr = 128 // outs.dtype.primitive_bitwidth
    tidy: gl.constexpr = gl.BlockedLayout([1, each], [each // 4, 128 // each], [4, 1], [1, 0])
    out = outs.index(OWN)
    stage, phase = 0, 0
    for number in range(gl.program_id(0), slots * tiles, gl.num_programs(0)):
        slot, tile = number // tiles, number % tiles
        count = gl.load(slot_count + slot) - OWN * 64
        if count > 0:
            first = gl.load(slot_first + slot) + OWN * 64
            expert = gl.load(slot_expert + slot)
            lane = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
            x_scales = hidden_scale + (first + gl.where(lane < count, lane, 0)).to(gl.int64) * k_steps
            blocks, block = gl.cdiv(channels, 128), first_column // 128 + tile * 2
            w_scales = w_scale + (expert.to(gl.int64) * blocks + block) * k_steps
            apart = gl.where(block + 1 < blocks, k_steps, 0)
            total, other, stage, phase = _summed(
                x_tiles, w_tiles, bars, stage, phase, x_scales, w_scales, apart, k_steps, layout, OWN, STAGES, SCALED,
            )  # fmt: skip
            own = gl.arange(0, 64, layout=gl.SliceLayout(1, tidy))
            places = gl.load(order + first + own, mask=own < count, other=0).to(gl.int64) * columns
            _store_parts(total, out, parts, places, own < count, tile * 256, columns, tidy)
            _store_parts(other, out, parts, places, own < count, tile * 256 + 128, columns, tidy)
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
    x_desc,  # [P, D] e4m3, bf16 or fp16, sorted by expert, tiles [128, 128 bytes]
    w_desc,  # [E * 2I, D] likewise
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
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [STAGES, 128, K], x_desc.layout)
    w_tiles = gl.allocate_shared_memory(w_desc.dtype, [2 * STAGES, 128, K], w_desc.layout)
    halves = seen_as(x_tiles, x_desc.dtype, [2 * STAGES, 64, K], x_desc.layout)  # of the two warpgroups
    kind: gl.constexpr = hidden.dtype.element_ty
    outs = gl.allocate_shared_memory(kind, [2, 64, 128], gl.NVMMASharedLayout.get_default_for([64, 128], kind))
    bars = _bars(STAGES)
    buffers, sizes = (x_tiles, w_tiles), (slots, gl.cdiv(inner, 128), k_steps, 2 * inner, inner, 0)
    gl.warp_specialize(
        [
            (_copy_in, (x_desc, w_desc, buffers, bars, slot_expert, slot_first, slot_count, sizes, STAGES)),
            (_gate_up, (w_scale, x_scale, hidden, hidden_scale, (halves, w_tiles), outs, bars, slot_expert, slot_first,
                        slot_count, sizes, inner, pairs, 0, STAGES, SCALED, POWER, LARGEST)),
            (_gate_up, (w_scale, x_scale, hidden, hidden_scale, (halves, w_tiles), outs, bars, slot_expert, slot_first,
                        slot_count, sizes, inner, pairs, 1, STAGES, SCALED, POWER, LARGEST)),
        ],
        [4, 4],
        [240, 240],
    )  # fmt: skip


@gluon.jit(do_not_specialize=["slots"])
def down_kernel(
    x_desc,  # [P, I] e4m3, bf16 or fp16, sorted by expert, tiles [128, 128 bytes]
    w_desc,  # [E * D, I] likewise, tiles [256, 128 bytes]
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
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [STAGES, 128, K], x_desc.layout)
    w_tiles = gl.allocate_shared_memory(w_desc.dtype, [STAGES, 256, K], w_desc.layout)
    halves = seen_as(x_tiles, x_desc.dtype, [2 * STAGES, 64, K], x_desc.layout)  # of the two warpgroups
    pieces = seen_as(w_tiles, w_desc.dtype, [2 * STAGES, 128, K], w_desc.layout)
    kind: gl.constexpr = parts.dtype.element_ty
    outs = gl.allocate_shared_memory(kind, [2, 64, 128], gl.NVMMASharedLayout.get_default_for([64, 128], kind))
    bars = _bars(STAGES)
    buffers, sizes = (x_tiles, w_tiles), (slots, gl.cdiv(columns, 256), k_steps, channels, 0, first_column)
    gl.warp_specialize(
        [
            (_copy_in, (x_desc, w_desc, buffers, bars, slot_expert, slot_first, slot_count, sizes, STAGES)),
            (_down, (w_scale, x_scale, order, parts, (halves, pieces), outs, bars, slot_expert, slot_first, slot_count,
                     sizes, columns, 0, STAGES, SCALED)),
            (_down, (w_scale, x_scale, order, parts, (halves, pieces), outs, bars, slot_expert, slot_first, slot_count,
                     sizes, columns, 1, STAGES, SCALED)),
        ],
        [4, 4],
        [240, 240],
    )  # fmt: skip
