"""Products of many rows for Hopper, in Gluon: two multiplying warpgroups, fed by a third.

A tile is 128 rows by 128 outputs; each multiplying warpgroup has 64 of the rows. The third copies tiles of both
operands into a ring of buffers by TMA. One warpgroup promotes sums to float32 while the tensor core works for the
other. A program walks tiles until none is left.

The arithmetic is that of `gemm._gemm_kernel`: blocks of 128 of K in ascending order, each summed in the tensor core,
scaled and added in float32, and parts of K (`splits`) added in ascending order. That kernel multiplies weights by rows
and this one rows by weights; the tensor core's sum of an output is the same (`tests/kernels/test_many_rows.py`).

Legend: as in `gemm`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mtp_spec.kernels.direct import Tiles, enqueue

# Triton 3.6's names, and the later ones
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_tile = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_buffer = gl.shared_memory_descriptor
seen_as = _buffer.reinterpret if hasattr(_buffer, "reinterpret") else _buffer._reinterpret

ROWS, OUTPUTS = 128, 128  # a tile's
HALF = ROWS // 2  # rows of a warpgroup
STEP = 128  # bytes of K in a buffer
BAND = 16  # tiles of rows that programs walk together, so that they find both operands in the cache
# from so many parts of K on, sums of FP8 products stay in registers: fewer are faster with two products underway
KEPT_SPLITS = 4
SHARED = 226 * 1024  # bytes of shared memory for buffers
MOST_STAGES = 6
KINDS = {torch.float8_e4m3fn: gl.float8e4nv, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16,
         torch.float32: gl.float32}  # fmt: skip


def described(x: Tensor, rows: int, columns: int) -> Tiles:
    """Returns a matrix in tiles of `rows` by `columns`."""
    return Tiles(x, rows, columns, _descriptor)


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], _layout(rows, columns, x.dtype))


@lru_cache  # made at every launch otherwise
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], KINDS[dtype])


def stages(steps: int, kept: int) -> int:
    """Returns how many steps of `steps` bytes fit beside `kept` bytes."""
    return min(MOST_STAGES, (SHARED - kept) // steps)


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """Returns the next buffer of the ring, and its phase."""
    wrapped = stage + 1 == STAGES
    return gl.where(wrapped, 0, stage + 1), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def _stage_before(stage, STAGES: gl.constexpr):
    """Returns the buffer before one; a variable that a loop sets to `stage` is not carried by Triton 3.6's compiler if
    it begins as the same number."""
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def _tile_at(number, row_tiles, column_tiles, BAND: gl.constexpr):
    """Returns a tile's place: bands of rows; within a band, column after column."""
    band = number // (BAND * column_tiles)
    within = number - band * (BAND * column_tiles)
    rows = gl.minimum(row_tiles - band * BAND, BAND)
    return band * BAND + within % rows, within // rows


@gluon.jit
def _copy_in(
    a_desc, w_desc, buffers, bars, sizes, STAGES: gl.constexpr, K: gl.constexpr, BAND: gl.constexpr,
):  # fmt: skip
    """The copying warpgroup: loads every tile as soon as its buffer is free."""
    a_tiles, w_tiles = buffers
    full, free = bars
    row_tiles, column_tiles, k_steps = sizes
    bytes: gl.constexpr = a_desc.block_type.nbytes * 2 + w_desc.block_type.nbytes
    stage, phase = 0, 1
    for number in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row, column = _tile_at(number, row_tiles, column_tiles, BAND)
        for step in range(k_steps):
            mbarrier.wait(free.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, bytes)
            for group in gl.static_range(2):
                load_tile(a_desc, [row * 128 + group * 64, step * K], bar, a_tiles.index(2 * stage + group))
            load_tile(w_desc, [column * 128, step * K], bar, w_tiles.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _part(x_tiles, w_tiles, stage, layout: gl.constexpr, OWN: gl.constexpr):
    """Starts the product of one step of K."""
    w = w_tiles.index(stage).permute((1, 0))
    zero = gl.zeros([64, 128], gl.float32, layout)
    return warpgroup_mma(x_tiles.index(2 * stage + OWN), w, zero, use_acc=False, is_async=True)


@gluon.jit
def _scales(x_scales, w_scales, apart, step, HALVES: gl.constexpr):
    """Returns the scales of one step: of rows, and of the columns' first and second half."""
    first = gl.load(w_scales + step)
    return gl.load(x_scales + step), first, gl.load(w_scales + apart + step) if HALVES == 2 else first


@gluon.jit
def _added(total, part, scales, HALVES: gl.constexpr):
    """Returns total + part times its scales."""
    rows, first, second = scales
    if HALVES == 1:
        return total + part * gl.expand_dims(rows * first, 1)
    column = gl.arange(0, 128, layout=gl.SliceLayout(0, total.type.layout))
    scale = gl.where(gl.expand_dims(column < 64, 0), gl.expand_dims(rows * first, 1), gl.expand_dims(rows * second, 1))
    return total + part * scale


@gluon.jit
def summed(
    x_tiles, w_tiles, bars, stage, phase, x_scales, w_scales, apart, steps, layout: gl.constexpr,
    OWN: gl.constexpr, STAGES: gl.constexpr, SCALED: gl.constexpr, HALVES: gl.constexpr = 1,
):  # fmt: skip
    """Sums a warpgroup's 64 rows by 128 columns over some steps of K, at least one; returns sums and the next buffer.

    The second of two parts is started before the first is scaled and added, so that the tensor core has work.

    Args:
        x_scales: of the rows, pointers `[64]`, used with SCALED like those that follow.
        w_scales: of the columns; of their second half, with HALVES == 2, `apart` further.
    """
    full, free = bars
    total = gl.zeros([64, 128], gl.float32, layout)
    if SCALED:
        for pair in range(steps // 2):
            mbarrier.wait(full.index(stage), phase)
            even = _part(x_tiles, w_tiles, stage, layout, OWN)
            even_scales = _scales(x_scales, w_scales, apart, 2 * pair, HALVES)
            after, phase = next_stage(stage, phase, STAGES)
            mbarrier.wait(full.index(after), phase)
            odd = _part(x_tiles, w_tiles, after, layout, OWN)
            odd_scales = _scales(x_scales, w_scales, apart, 2 * pair + 1, HALVES)
            even = warpgroup_mma_wait(1, deps=[even])
            mbarrier.arrive(free.index(stage), count=1)
            total = _added(total, even, even_scales, HALVES)
            odd = warpgroup_mma_wait(0, deps=[odd])
            mbarrier.arrive(free.index(after), count=1)
            total = _added(total, odd, odd_scales, HALVES)
            stage, phase = next_stage(after, phase, STAGES)
        if steps % 2 == 1:
            mbarrier.wait(full.index(stage), phase)
            even = _part(x_tiles, w_tiles, stage, layout, OWN)
            even_scales = _scales(x_scales, w_scales, apart, steps - 1, HALVES)
            even = warpgroup_mma_wait(0, deps=[even])
            mbarrier.arrive(free.index(stage), count=1)
            total = _added(total, even, even_scales, HALVES)
            stage, phase = next_stage(stage, phase, STAGES)
    else:
        for step in range(steps):
            mbarrier.wait(full.index(stage), phase)
            w = w_tiles.index(stage).permute((1, 0))
            total = warpgroup_mma(x_tiles.index(2 * stage + OWN), w, total, is_async=True)
            total = warpgroup_mma_wait(1, deps=[total])
            mbarrier.arrive(free.index(_stage_before(stage, STAGES)), count=1, pred=step > 0)
            stage, phase = next_stage(stage, phase, STAGES)
        total = warpgroup_mma_wait(0, deps=[total])
        mbarrier.arrive(free.index(_stage_before(stage, STAGES)), count=1)
    return total, stage, phase


@gluon.jit
def _summed_one(
    x_tiles, w_tiles, bars, stage, phase, x_scales, w_scales, steps, layout: gl.constexpr, OWN: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """As `summed` with SCALED, with one part at a time: the other warpgroup keeps the tensor core at work."""
    full, free = bars
    total = gl.zeros([64, 128], gl.float32, layout)
    part = gl.zeros([64, 128], gl.float32, layout)
    rows, column = gl.load(x_scales), gl.load(w_scales)
    for step in range(steps):
        mbarrier.wait(full.index(stage), phase)
        w = w_tiles.index(stage).permute((1, 0))
        part = warpgroup_mma(x_tiles.index(2 * stage + OWN), w, part, use_acc=False, is_async=True)
        after = gl.minimum(step + 1, steps - 1)
        later, column_later = gl.load(x_scales + after), gl.load(w_scales + after)
        part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(free.index(stage), count=1)
        # the wait, for nothing, keeps the assembler from adding later, which would take more registers
        total = warpgroup_mma_wait(0, deps=[_added(total, part, (rows, column, column), 1)])
        rows, column = later, column_later
        stage, phase = next_stage(stage, phase, STAGES)
    return total, stage, phase


@gluon.jit
def _multiply(
    given, OWN: gl.constexpr, STAGES: gl.constexpr, K: gl.constexpr, BAND: gl.constexpr, SPLITS: gl.constexpr,
    SCALED: gl.constexpr, KEPT: gl.constexpr,
):  # fmt: skip
    """A multiplying warpgroup: 64 rows of each tile."""
    out_desc, a_scale, w_scale, m, buffers, outs, held, bars, sizes = given
    a_tiles, w_tiles = buffers
    row_tiles, column_tiles, k_steps = sizes
    deep: gl.constexpr = 32 if SCALED else 16
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, deep])
    stage, phase = 0, 0
    each = gl.cdiv(gl.cdiv(k_steps * K, 128), SPLITS) * (128 // K)
    out = outs.index(OWN * outs.shape[0] // 2)
    for number in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row, column = _tile_at(number, row_tiles, column_tiles, BAND)
        first_row = row * 128 + OWN * 64
        rows = gl.minimum(first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, layout)), m - 1)
        a_scales = a_scale + rows.to(gl.int64) * k_steps
        w_scales = w_scale + column * k_steps
        tma.store_wait(0)
        total = gl.zeros([64, 128], gl.float32, layout)
        for split in range(SPLITS if KEPT else 0):
            begin = split * each
            steps = gl.minimum(begin + each, k_steps) - begin
            own, stage, phase = _summed_one(
                a_tiles, w_tiles, bars, stage, phase, a_scales + begin, w_scales + begin, steps, layout, OWN, STAGES
            )
            total = total + own
        for split in gl.static_range(0 if KEPT else SPLITS):
            begin = gl.minimum(split * each, k_steps)
            steps = gl.minimum(begin + each, k_steps) - begin
            if SPLITS > 1 and split > 0:
                # parts of K are added in ascending order, as by programs of their own
                if steps > 0:
                    total, stage, phase = summed(
                        a_tiles, w_tiles, bars, stage, phase, a_scales + begin, w_scales + begin, 0, steps, layout, OWN,
                        STAGES, SCALED,
                    )  # fmt: skip
                    held.index(OWN).store(held.index(OWN).load(layout) + total)
            else:
                total, stage, phase = summed(
                    a_tiles, w_tiles, bars, stage, phase, a_scales, w_scales, 0, steps, layout, OWN, STAGES,
                    SCALED,
                )  # fmt: skip
                if SPLITS > 1:
                    held.index(OWN).store(total + 0.0)
        if SPLITS > 1 and not KEPT:
            total = held.index(OWN).load(layout)
        out.store(total.to(out.dtype))
        fence_async_shared()
        store_tile(out_desc, [first_row, column * 128], out)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["m", "row_tiles"])
def gemm_kernel(
    a_desc,  # [M, K] e4m3, bf16 or fp16, tiles [64, 128 bytes]
    w_desc,  # [N, K] likewise, tiles [128, 128 bytes]
    out_desc,  # [M, N], tiles [64, 128]
    a_scale,  # [M, ceil(K / 128)] float32, used with SCALED
    w_scale,  # [ceil(N / 128), ceil(K / 128)] float32, used with SCALED
    m,
    row_tiles,
    column_tiles,
    k_steps,
    STAGES: gl.constexpr,
    SPLITS: gl.constexpr,
    SCALED: gl.constexpr,
    KEPT: gl.constexpr,  # sums of parts of K stay in registers; no part is empty
    BAND: gl.constexpr,
):
    """out = a @ w.T."""
    K: gl.constexpr = a_desc.block_shape[1]
    a_tiles = gl.allocate_shared_memory(a_desc.dtype, [2 * STAGES, 64, K], a_desc.layout)
    w_tiles = gl.allocate_shared_memory(w_desc.dtype, [STAGES, 128, K], w_desc.layout)
    if SPLITS > 1 and not KEPT:  # the tile's sums, and later its outputs
        flat: gl.constexpr = gl.SwizzledSharedLayout(2, 4, 8, [1, 0])
        held = gl.allocate_shared_memory(gl.float32, [2, 64, 128], flat)
        room: gl.constexpr = 32 // out_desc.dtype.primitive_bitwidth
        outs = seen_as(held, out_desc.dtype, [2 * room, 64, 128], out_desc.layout)
    else:
        outs = gl.allocate_shared_memory(out_desc.dtype, [2, 64, 128], out_desc.layout)
        held = outs
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    buffers, bars, sizes = (a_tiles, w_tiles), (full, free), (row_tiles, column_tiles, k_steps)
    given = (out_desc, a_scale, w_scale, m, buffers, outs, held, bars, sizes)
    gl.warp_specialize(
        [
            (_copy_in, (a_desc, w_desc, buffers, bars, sizes, STAGES, K, BAND)),
            (_multiply, (given, 0, STAGES, K, BAND, SPLITS, SCALED, KEPT)),
            (_multiply, (given, 1, STAGES, K, BAND, SPLITS, SCALED, KEPT)),
        ],
        [4, 4],
        [240, 240],
    )


def gemm(
    a: Tensor, w: Tensor, a_scale: Tensor | None, w_scale: Tensor | None, out: Tensor, splits: int, programs: int
) -> None:
    """Writes a `[M, K]` @ w `[N, K]`.T to out `[M, N]`; operands as `gemm.fp8_gemm` and `gemm.bf16_gemm`."""
    (rows, inner), outputs = a.shape, w.shape[0]
    k = STEP // a.element_size()
    row_tiles, column_tiles = -(-rows // ROWS), -(-outputs // OUTPUTS)
    kept = a_scale is not None and splits >= KEPT_SPLITS and _each_part_has_some(inner, splits)
    room = ROWS * OUTPUTS * (4 if splits > 1 and not kept else out.element_size())
    enqueue(
        gemm_kernel, (min(programs, row_tiles * column_tiles),),
        described(a, HALF, k), described(w, OUTPUTS, k), described(out, HALF, OUTPUTS),
        a if a_scale is None else a_scale, w if w_scale is None else w_scale, rows, row_tiles, column_tiles,
        -(-inner // k), STAGES=stages(STEP * (ROWS + OUTPUTS), room), SPLITS=splits, SCALED=a_scale is not None,
        KEPT=kept, BAND=BAND, num_warps=4,
    )  # fmt: skip


def _each_part_has_some(inputs: int, splits: int) -> bool:
    """Whether each of `splits` parts of K has a block of 128 inputs or more."""
    blocks = -(-inputs // 128)
    return (splits - 1) * -(-blocks // splits) < blocks
