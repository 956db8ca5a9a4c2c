"""Attention of prompts for Hopper, in Gluon: two multiplying warpgroups of 64 queries each, fed by a third.

A warpgroup starts the scores of the next block of keys, and then the product of the previous block's weights and
values, before it computes the softmax of the scores: so the tensor core works meanwhile (Shah et al., FlashAttention-3,
2407.08608, section 3.2). Blocks that all its rows see are read without a mask.

Legend: as in `prompt`; heads are read in pieces of 64 columns, `PIECES` of them, the last one being the rotated part.
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

from mtp_spec.kernels.gemm_hopper import described, load_tile

__all__ = ["attend_prompt_kernel", "described"]

# heads, and tiles of 128 rows of theirs, whose programs are beside each other and find keys in the cache
TOGETHER, BAND = 32, 4


def order(heads: int, tiles: int) -> tuple[int, int]:
    """Returns how many heads, and tiles of theirs, come before the next ones."""
    return min(TOGETHER, heads), min(BAND, tiles)


@gluon.jit
def _place(row_tiles, heads, together, band):
    """Returns the program's tile of 128 rows and its head: late rows, which have the most keys, come first.

    Of `band` tiles of `together` heads, all come before the next.
    """
    number = gl.program_id(0)
    above = number // (heads * band) * band
    number = number % (heads * band)
    each = together * gl.minimum(band, row_tiles - above)
    first = number // each * together
    number = number % each
    several = gl.minimum(together, heads - first)
    return row_tiles - 1 - above - number // several, first + number % several


@gluon.jit
def _buffer_of(block, STAGES: gl.constexpr):
    """Returns the buffer of a block, and the phase in which it is full."""
    return block % STAGES, block // STAGES % 2


@gluon.jit
def _copy_keys(
    k_desc, rope_desc, keys, full, free, head, block,
    PIECES: gl.constexpr, NOPE: gl.constexpr, V: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copies a block of a head's keys as soon as its buffer is free."""
    stage, phase = _buffer_of(block, STAGES)
    mbarrier.wait(free.index(stage), phase ^ 1)
    bar = full.index(stage)
    mbarrier.expect(bar, k_desc.block_type.nbytes * PIECES)
    for piece in gl.static_range(PIECES - 1):
        load_tile(k_desc, [block * BLOCK, head * (NOPE + V) + 64 * piece], bar, keys.index(stage * PIECES + piece))
    load_tile(rope_desc, [block * BLOCK, 0], bar, keys.index(stage * PIECES + PIECES - 1))


@gluon.jit
def _copy_values(
    v_desc, values, full, free, head, block,
    NOPE: gl.constexpr, V: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copies a block of a head's values as soon as its buffer is free."""
    stage, phase = _buffer_of(block, STAGES)
    mbarrier.wait(free.index(stage), phase ^ 1)
    bar = full.index(stage)
    mbarrier.expect(bar, v_desc.block_type.nbytes)
    load_tile(v_desc, [block * BLOCK, head * (NOPE + V) + NOPE], bar, values.index(stage))


@gluon.jit
def _copy_in(
    q_desc, k_desc, rope_desc, v_desc, buffers, bars, place, blocks,
    PIECES: gl.constexpr, NOPE: gl.constexpr, V: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warpgroup: queries once, then every block of keys, and one later its values."""
    queries, keys, values = buffers
    q_full, k_full, k_free, v_full, v_free = bars
    row, head = place
    mbarrier.expect(q_full, q_desc.block_type.nbytes * 2 * PIECES)
    for half in gl.static_range(2):
        for piece in gl.static_range(PIECES):
            load_tile(q_desc, [row + 64 * half, head * 64 * PIECES + 64 * piece], q_full,
                      queries.index(half * PIECES + piece))  # fmt: skip
    _copy_keys(k_desc, rope_desc, keys, k_full, k_free, head, 0, PIECES, NOPE, V, BLOCK, STAGES)
    for block in range(1, blocks):
        _copy_keys(k_desc, rope_desc, keys, k_full, k_free, head, block, PIECES, NOPE, V, BLOCK, STAGES)
        _copy_values(v_desc, values, v_full, v_free, head, block - 1, NOPE, V, BLOCK, STAGES)
    _copy_values(v_desc, values, v_full, v_free, head, blocks - 1, NOPE, V, BLOCK, STAGES)


@gluon.jit
def _scores(queries, keys, stage, OWN: gl.constexpr, PIECES: gl.constexpr, BLOCK: gl.constexpr, layout: gl.constexpr):
    """Starts queries @ keys.T of a block."""
    scores = gl.zeros([64, BLOCK], gl.float32, layout)
    for piece in gl.static_range(PIECES):
        key = keys.index(stage * PIECES + piece).permute((1, 0))
        scores = warpgroup_mma(queries.index(OWN * PIECES + piece), key, scores, use_acc=piece > 0, is_async=True)
    return scores


@gluon.jit
def _weighed(
    scores, position, first, peak, total, scale, BLOCK: gl.constexpr, layout: gl.constexpr, MASKED: gl.constexpr
):  # fmt: skip
    """One step of the online softmax: returns weights, the peak that they refer to, the sum so far, and the factor."""
    if MASKED:
        key = first + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
        scores = gl.where(gl.expand_dims(key, 0) <= gl.expand_dims(position, 1), scores, float("-inf"))
    higher = gl.maximum(peak, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - gl.expand_dims(higher, 1))
    factor = gl.exp2(peak - higher)
    return weights, higher, total * factor + gl.sum(weights, 1), factor


@gluon.jit
def _walk(
    carried, begin, end, position, scale, buffers, bars,
    OWN: gl.constexpr, PIECES: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, s_layout: gl.constexpr,
    o_layout: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Reads blocks of keys `begin` to `end`, and of values the ones before them."""
    queries, keys, values = buffers
    _, k_full, k_free, v_full, v_free = bars
    a_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    acc, p, peak, total = carried
    for block in range(begin, end):
        k_stage, k_phase = _buffer_of(block, STAGES)
        stage, phase = _buffer_of(block - 1, STAGES)
        mbarrier.wait(k_full.index(k_stage), k_phase)
        scores = _scores(queries, keys, k_stage, OWN, PIECES, BLOCK, s_layout)
        mbarrier.wait(v_full.index(stage), phase)
        acc = warpgroup_mma(p, values.index(stage), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_free.index(k_stage), count=1)
        weights, peak, total, factor = _weighed(scores, position, block * BLOCK, peak, total, scale, BLOCK, s_layout,
                                                MASKED)  # fmt: skip
        after = gl.convert_layout(weights.to(keys.dtype), a_layout)
        # true since before: without it the assembler waits for the product above already before the softmax
        mbarrier.wait(v_full.index(stage), phase)
        acc, p, after = warpgroup_mma_wait(0, deps=[acc, p, after])
        mbarrier.arrive(v_free.index(stage), count=1)
        acc = acc * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, o_layout)), 1)
        p = after
    return acc, p, peak, total


@gluon.jit
def _attend(
    out, m, stride, scale, buffers, bars, place, blocks, start,
    OWN: gl.constexpr, PIECES: gl.constexpr, V: gl.constexpr, WIDE_V: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A multiplying warpgroup: 64 queries of one head."""
    queries, keys, values = buffers
    q_full, k_full, k_free, v_full, v_free = bars
    kind: gl.constexpr = keys.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE_V, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    first = place[0] + OWN * 64
    position = start + first + gl.arange(0, 64, layout=rows)
    peak = gl.full([64], float("-inf"), gl.float32, rows)
    total = gl.zeros([64], gl.float32, rows)
    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    scores = _scores(queries, keys, 0, OWN, PIECES, BLOCK, s_layout)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_free.index(0), count=1)
    weights, peak, total, _factor = _weighed(scores, position, 0, peak, total, scale, BLOCK, s_layout, True)
    p = gl.convert_layout(weights.to(kind), a_layout)
    acc = gl.zeros([64, WIDE_V], gl.float32, o_layout)
    carried = (acc, p, peak, total)
    clear = gl.maximum(gl.minimum((start + first + 1) // BLOCK, blocks), 1)  # all rows see the blocks before it
    carried = _walk(carried, 1, clear, position, scale, buffers, bars, OWN, PIECES, BLOCK, STAGES, s_layout, o_layout,
                    False)  # fmt: skip
    carried = _walk(carried, clear, blocks, position, scale, buffers, bars, OWN, PIECES, BLOCK, STAGES, s_layout,
                    o_layout, True)  # fmt: skip
    acc, p, peak, total = carried
    stage, phase = _buffer_of(blocks - 1, STAGES)
    mbarrier.wait(v_full.index(stage), phase)
    acc = warpgroup_mma(p, values.index(stage), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_free.index(stage), count=1)
    acc = acc / gl.expand_dims(gl.convert_layout(total, gl.SliceLayout(1, o_layout)), 1)
    row = first + gl.arange(0, 64, layout=gl.SliceLayout(1, o_layout))
    column = gl.arange(0, WIDE_V, layout=gl.SliceLayout(0, o_layout))
    wide = stride.to(gl.uint32).to(gl.int64)  # no sign to keep in a register
    at = gl.expand_dims(row.to(gl.int64) * wide + place[1] * V, 1) + gl.expand_dims(column, 0)
    gl.store(out + at, acc.to(kind), mask=gl.expand_dims(row < m, 1) & gl.expand_dims(column < V, 0))


@gluon.jit(do_not_specialize=["m", "row_tiles", "start", "heads", "together", "band"])
def attend_prompt_kernel(
    q_desc,  # [M, H (N + R)], tiles [64, 64]
    k_desc,  # [T, H (N + V)], tiles [BLOCK, 64]
    rope_desc,  # [T, R], tiles [BLOCK, 64]
    v_desc,  # as k_desc, tiles [BLOCK, WIDE_V]; columns past V belong to others
    out,  # [M, H V], rows `stride` apart
    m,
    row_tiles,
    heads,
    together,  # heads, and
    band,  # tiles, whose programs are beside each other
    start,  # position of row 0
    stride,
    scale,  # of the scores, times log2(e)
    PIECES: gl.constexpr,
    NOPE: gl.constexpr,
    V: gl.constexpr,
    WIDE_V: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Causal attention of M rows over T keys; the last row is the last key."""
    tile, head = _place(row_tiles, heads, together, band)
    last = gl.minimum(tile * 128 + 127, m - 1)
    blocks = (start + last) // BLOCK + 1
    queries = gl.allocate_shared_memory(q_desc.dtype, [2 * PIECES, 64, 64], q_desc.layout)
    keys = gl.allocate_shared_memory(q_desc.dtype, [STAGES * PIECES, BLOCK, 64], k_desc.layout)
    values = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK, WIDE_V], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_free.index(stage), count=2)
    fence_async_shared()
    buffers, bars = (queries, keys, values), (q_full, k_full, k_free, v_full, v_free)
    place = (tile * 128, head)
    gl.warp_specialize(
        [
            (_copy_in, (q_desc, k_desc, rope_desc, v_desc, buffers, bars, place, blocks, PIECES, NOPE, V, BLOCK,
                        STAGES)),
            (_attend, (out, m, stride, scale, buffers, bars, place, blocks, start, 0, PIECES, V, WIDE_V, BLOCK,
                       STAGES)),
            (_attend, (out, m, stride, scale, buffers, bars, place, blocks, start, 1, PIECES, V, WIDE_V, BLOCK,
                       STAGES)),
        ],
        [4, 4],
        [240, 240],
    )  # fmt: skip
