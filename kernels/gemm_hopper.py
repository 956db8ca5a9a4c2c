"""Products of many rows for Hopper, in Gluon: two multiplying warpgroups, fed by a third.

A tile is 128 rows by 128 outputs; each multiplying warpgroup has 64 of the rows. The third copies tiles of both
operands into a ring of buffers by TMA, and beside them the products of their scales, which it loads for four steps at
once: loads of the multiplying warpgroups would come one step ahead at most, and take turns with the tensor core in
reading shared memory. One warpgroup promotes sums to float32 while the tensor core works for the other. A program walks
tiles until none is left.

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
SHARED = 226 * 1024  # bytes of shared memory for buffers
MOST_STAGES = 6
REGISTERS = 232  # of a multiplying thread; 40 are left for a copying one
AT_ONCE = 4  # steps whose scales are loaded together
# time of a turn of tiles of 64 outputs, relative to half a turn of 128: 1.33 to 1.46 on an H200 (2112 x 7168)
NARROW = 1.5
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
def _copy_step(descs, buffers, bar, place, stage, step):
    """Loads one step of both operands."""
    a_desc, w_desc = descs
    a_tiles, w_tiles = buffers
    row, column = place
    K: gl.constexpr = a_desc.block_shape[1]
    N: gl.constexpr = w_desc.block_shape[0]
    mbarrier.expect(bar, a_desc.block_type.nbytes + w_desc.block_type.nbytes)
    load_tile(a_desc, [row * 128, step * K], bar, a_tiles.index(stage))
    load_tile(w_desc, [column * N, step * K], bar, w_tiles.index(stage))


@gluon.jit
def _copy_in(
    brought, STAGES: gl.constexpr, BAND: gl.constexpr, SCALED: gl.constexpr, FOUR: gl.constexpr,
):  # fmt: skip
    """The copying warpgroup: loads every tile, and the products of its scales, as soon as its buffer is free."""
    descs, scaling, buffers, scales, bars, sizes = brought
    a_scale, w_scale, m = scaling
    full, free = bars
    row_tiles, column_tiles, k_steps = sizes
    stage, phase = 0, 1
    N: gl.constexpr = descs[1].block_shape[0]
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    four: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [4, 1], [1, 0])
    for number in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row, column = _tile_at(number, row_tiles, column_tiles, BAND)
        if not SCALED:
            for step in range(k_steps):
                mbarrier.wait(free.index(stage), phase)
                _copy_step(descs, buffers, full.index(stage), (row, column), stage, step)
                stage, phase = next_stage(stage, phase, STAGES)
        elif not FOUR:
            rows = gl.minimum(row * 128 + gl.arange(0, 128, layout=one), m - 1)
            a_scales = a_scale + rows.to(gl.int64) * k_steps
            for step in range(k_steps):
                mbarrier.wait(free.index(stage), phase)
                _copy_step(descs, buffers, full.index(stage), (row, column), stage, step)
                own = gl.load(a_scales + step) * gl.load(w_scale + column * N // 128 * k_steps + step)
                scales.index(stage).store(own)
                mbarrier.arrive(full.index(stage), count=1)
                stage, phase = next_stage(stage, phase, STAGES)
        else:
            rows = gl.minimum(row * 128 + gl.arange(0, 128, layout=gl.SliceLayout(1, four)), m - 1)
            quad = gl.arange(0, 4, layout=gl.SliceLayout(0, four))
            # whole fours lie on multiples of 16 bytes
            quads = k_steps // 4
            a_scales = a_scale + gl.expand_dims(rows.to(gl.int64) * (quads * 4), 1) + gl.expand_dims(quad, 0)
            w_scales = w_scale + column * N // 128 * (quads * 4) + quad
            later, column_later = gl.load(a_scales), gl.load(w_scales)
            for four_steps in range(quads):
                now = later * gl.expand_dims(column_later, 0)
                ahead = gl.minimum(four_steps + 1, quads - 1) * 4
                later, column_later = gl.load(a_scales + ahead), gl.load(w_scales + ahead)
                evens, odds = gl.split(gl.reshape(now, [128, 2, 2]))
                zeroth, second = gl.split(evens)
                first, third = gl.split(odds)
                own = (zeroth, first, second, third)
                for within in gl.static_range(4):
                    step = four_steps * 4 + within
                    mbarrier.wait(free.index(stage), phase)
                    _copy_step(descs, buffers, full.index(stage), (row, column), stage, step)
                    scales.index(stage).store(own[within])
                    mbarrier.arrive(full.index(stage), count=1)
                    stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _scaled_sum(
    x_tiles, w_tiles, scales, bars, stage, phase, steps, layout: gl.constexpr, OWN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Sums a warpgroup's rows over some steps of K; returns sums and the next buffer."""
    full, free = bars
    N: gl.constexpr = w_tiles.shape[1]
    total = gl.zeros([64, N], gl.float32, layout)
    part = gl.zeros([64, N], gl.float32, layout)
    for _step in range(steps):
        mbarrier.wait(full.index(stage), phase)
        w = w_tiles.index(stage).permute((1, 0))
        part = warpgroup_mma(x_tiles.index(2 * stage + OWN), w, part, use_acc=False, is_async=True)
        scale = scales.index(2 * stage + OWN).load(gl.SliceLayout(1, layout))
        part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(free.index(stage), count=1)
        # the wait, for nothing, keeps the assembler from adding later, which would take more registers
        total = warpgroup_mma_wait(0, deps=[total + part * gl.expand_dims(scale, 1)])
        stage, phase = next_stage(stage, phase, STAGES)
    return total, stage, phase


@gluon.jit
def _scaled_sum_of_pairs(
    x_tiles, w_tiles, scales, bars, stage, phase, steps, layout: gl.constexpr, OWN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `_scaled_sum`, of at least one step, with the next product started before one is scaled and added: faster
    where its registers are not needed for the sums of another part of K."""
    full, free = bars
    N: gl.constexpr = w_tiles.shape[1]
    total = gl.zeros([64, N], gl.float32, layout)
    zero = gl.zeros([64, N], gl.float32, layout)
    for _pair in range(steps // 2):
        mbarrier.wait(full.index(stage), phase)
        w = w_tiles.index(stage).permute((1, 0))
        even = warpgroup_mma(x_tiles.index(2 * stage + OWN), w, zero, use_acc=False, is_async=True)
        after, phase = next_stage(stage, phase, STAGES)
        mbarrier.wait(full.index(after), phase)
        w = w_tiles.index(after).permute((1, 0))
        odd = warpgroup_mma(x_tiles.index(2 * after + OWN), w, zero, use_acc=False, is_async=True)
        scale = scales.index(2 * stage + OWN).load(gl.SliceLayout(1, layout))
        even = warpgroup_mma_wait(1, deps=[even])
        mbarrier.arrive(free.index(stage), count=1)
        total = total + even * gl.expand_dims(scale, 1)
        scale = scales.index(2 * after + OWN).load(gl.SliceLayout(1, layout))
        odd = warpgroup_mma_wait(0, deps=[odd])
        mbarrier.arrive(free.index(after), count=1)
        total = total + odd * gl.expand_dims(scale, 1)
        stage, phase = next_stage(after, phase, STAGES)
    if steps % 2 == 1:
        mbarrier.wait(full.index(stage), phase)
        w = w_tiles.index(stage).permute((1, 0))
        even = warpgroup_mma(x_tiles.index(2 * stage + OWN), w, zero, use_acc=False, is_async=True)
        scale = scales.index(2 * stage + OWN).load(gl.SliceLayout(1, layout))
        even = warpgroup_mma_wait(0, deps=[even])
        mbarrier.arrive(free.index(stage), count=1)
        total = total + even * gl.expand_dims(scale, 1)
        stage, phase = next_stage(stage, phase, STAGES)
    return total, stage, phase


@gluon.jit
def _plain_sum(
    x_tiles, w_tiles, bars, stage, phase, steps, layout: gl.constexpr, OWN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Sums operands without scales over at least one step."""
    full, free = bars
    N: gl.constexpr = w_tiles.shape[1]
    total = gl.zeros([64, N], gl.float32, layout)
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
def _multiply(
    given, OWN: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr, PARTS: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """A multiplying warpgroup: 64 rows of each tile."""
    out_desc, buffers, outs, scales, bars, sizes, each = given
    a_tiles, w_tiles = buffers
    row_tiles, column_tiles, k_steps = sizes
    N: gl.constexpr = w_tiles.shape[1]
    deep: gl.constexpr = 32 if SCALED else 16
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, deep])
    stage, phase = 0, 0
    out = outs.index(OWN)
    for number in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row, column = _tile_at(number, row_tiles, column_tiles, BAND)
        if PARTS > 1:
            # parts of K are added in ascending order, as by programs of their own
            total = gl.zeros([64, N], gl.float32, layout)
            for part in range(PARTS):
                steps = gl.minimum(each, k_steps - part * each)
                if SCALED:
                    own, stage, phase = _scaled_sum(
                        a_tiles, w_tiles, scales, bars, stage, phase, steps, layout, OWN, STAGES
                    )
                else:
                    own, stage, phase = _plain_sum(a_tiles, w_tiles, bars, stage, phase, steps, layout, OWN, STAGES)
                total = total + own
        elif SCALED:
            total, stage, phase = _scaled_sum_of_pairs(
                a_tiles, w_tiles, scales, bars, stage, phase, k_steps, layout, OWN, STAGES
            )
        else:
            total, stage, phase = _plain_sum(a_tiles, w_tiles, bars, stage, phase, k_steps, layout, OWN, STAGES)
        tma.store_wait(0)  # the tile before has left the buffer
        out.store(total.to(out.dtype))
        fence_async_shared()
        store_tile(out_desc, [row * 128 + OWN * 64, column * N], out)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["m", "row_tiles"])
def gemm_kernel(
    a_desc,  # [M, K] e4m3, bf16 or fp16, tiles [128, 128 bytes]
    w_desc,  # [N, K] likewise, tiles [128 or 64, 128 bytes]
    out_desc,  # [M, N], tiles [64, 128 or 64]
    a_scale,  # [M, ceil(K / 128)] float32, used with SCALED
    w_scale,  # [ceil(N / 128), ceil(K / 128)] float32, used with SCALED
    m,
    row_tiles,
    column_tiles,
    k_steps,
    each,  # steps in a part of K
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,  # none of them empty
    SCALED: gl.constexpr,
    FOUR: gl.constexpr,  # scales are loaded for four steps at once, of which K has a multiple
    BAND: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """out = a @ w.T."""
    K: gl.constexpr = a_desc.block_shape[1]
    N: gl.constexpr = w_desc.block_shape[0]
    a_tiles = gl.allocate_shared_memory(a_desc.dtype, [STAGES, 128, K], a_desc.layout)
    a_halves = seen_as(a_tiles, a_desc.dtype, [2 * STAGES, 64, K], a_desc.layout)
    w_tiles = gl.allocate_shared_memory(w_desc.dtype, [STAGES, N, K], w_desc.layout)
    outs = gl.allocate_shared_memory(out_desc.dtype, [2, 64, N], out_desc.layout)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    if SCALED:  # the product of a row's and the columns' scale, for each row
        scales = gl.allocate_shared_memory(gl.float32, [STAGES, 128], flat)
        halves = seen_as(scales, gl.float32, [2 * STAGES, 64], flat)
    else:
        scales, halves = outs, outs
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=2 if SCALED else 1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    bars, sizes = (full, free), (row_tiles, column_tiles, k_steps)
    brought = ((a_desc, w_desc), (a_scale, w_scale, m), (a_tiles, w_tiles), scales, bars, sizes)
    given = (out_desc, (a_halves, w_tiles), outs, halves, bars, sizes, each)
    gl.warp_specialize(
        [
            (_copy_in, (brought, STAGES, BAND, SCALED, FOUR)),
            (_multiply, (given, 0, STAGES, BAND, PARTS, SCALED)),
            (_multiply, (given, 1, STAGES, BAND, PARTS, SCALED)),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )


def gemm(
    a: Tensor, w: Tensor, a_scale: Tensor | None, w_scale: Tensor | None, out: Tensor, splits: int, programs: int
) -> None:
    """Writes a `[M, K]` @ w `[N, K]`.T to out `[M, N]`; operands as `gemm.fp8_gemm` and `gemm.bf16_gemm`."""
    (rows, inner), outputs = a.shape, w.shape[0]
    k, blocks, scaled = STEP // a.element_size(), -(-inner // 128), a_scale is not None
    each = -(-blocks // splits)  # blocks of 128 in a part of K
    parts, row_tiles = -(-blocks // each), -(-rows // ROWS)
    width = narrowest(row_tiles, outputs, programs) if scaled and parts > 1 else OUTPUTS
    column_tiles, k_steps = -(-outputs // width), -(-inner // k)
    step = STEP * (ROWS + width) + (4 * ROWS if scaled else 0)
    enqueue(
        gemm_kernel, (min(programs, row_tiles * column_tiles),),
        described(a, ROWS, k), described(w, width, k), described(out, HALF, width),
        a if a_scale is None else a_scale, w if w_scale is None else w_scale, rows, row_tiles, column_tiles, k_steps,
        each * (128 // k), STAGES=stages(step, ROWS * width * out.element_size()), PARTS=parts, SCALED=scaled,
        FOUR=scaled and k_steps % AT_ONCE == 0, BAND=BAND, REGISTERS=REGISTERS, num_warps=4,
    )  # fmt: skip


def narrowest(row_tiles: int, outputs: int, programs: int) -> int:
    """Returns the outputs of a tile: 128, or 64 where the last turn of several would leave most programs idle. Not part
    of the arithmetic."""
    turns, narrow = (-(-row_tiles * -(-outputs // width) // programs) for width in (OUTPUTS, OUTPUTS // 2))
    return OUTPUTS // 2 if turns > 1 and NARROW * narrow / 2 < turns else OUTPUTS
