"""Attention over the latent cache for Hopper, in Gluon: two alternating warpgroups, fed by a third.

The tile's sums, 64 rows by C, fill the registers of two warpgroups, each holding half of the columns. Both need the
scores of every block of keys; each warpgroup computes those of every other block and passes its weights to the other
through shared memory, so that no product is done twice and one computes softmax while the other multiplies
(FlashMLA's "seesaw"; DeepSeek, FlashMLA deep dive of April 2025). Peaks and sums of the online softmax travel with the
weights, from block to block: the arithmetic is that of `kernels._attend_kernel`, block after block in ascending
order, whichever warpgroup owns a block.

Warpgroup 0 owns even blocks and columns 0 .. C/2 - 1, warpgroup 1 odd blocks and the other columns. A block stays in
its owner's key buffer until both have multiplied by it.

In passes of FEW tiles, the programs of a tile have equally many keys (`share_of`), and a block's halves and rope part
are waited for and freed each by itself. Passes of more tiles are slower that way (`attention.FEW_TILES`). A split's
bits are the same both ways.

Legend: as in `attention`.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mtp_spec.kernels.direct import Tiles
from mtp_spec.kernels.gemm_hopper import described, load_tile
from mtp_spec.kernels.mla.cache import KEYS
from mtp_spec.kernels.mla.hopper_walk import block_at, paged_row, share_of, split_at, split_of, walk_of
from mtp_spec.kernels.mla.plan import TILE, Head


def descriptors(q: Tensor, store: Tensor, head: Head) -> tuple[Tiles, ...]:
    """Returns the TMA descriptors that `attend_kernel` takes first; q `[M H, W]`."""
    half = head.latent // 2
    return (described(q, TILE, half), described(q, TILE, head.rope), described(store, KEYS, half),
            described(store, KEYS, head.rope))  # fmt: skip


@gluon.constexpr_function
def _bar(slot, piece, few):
    """Returns the number of the barriers of a block's half 0 or 1, or rope part 2: those of the block without FEW."""
    return 3 * slot + piece if few else slot


@gluon.jit
def _copy_in(
    q_half, q_rope, k_half, k_rope, sm, bars, place, splits, table,
    C: gl.constexpr, R: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr, TAIL: gl.constexpr,
    HEADS: gl.constexpr, CHAIN: gl.constexpr, PAGED: gl.constexpr, PDL: gl.constexpr, FEW: gl.constexpr,
    END1: gl.constexpr,
):  # fmt: skip
    """The copying warpgroup: loads queries once, and every block as soon as its buffer is free.

    The first blocks of committed slots are read before the queries are ready: no kernel of the pass writes them.
    """
    queries, handed, keys, key_ropes = sm
    q_bar, full, free = bars
    half: gl.constexpr = C // 2
    start, q_row = place[0], place[6]
    turn = 0
    for number in range(splits[0], splits[1], splits[2]):
        split = split_at(number, splits, FEW)
        walk, blocks = walk_of(split, place, ROWS, BLOCK, HEADS, CHAIN, END1)
        for pair in range(gl.cdiv(blocks, 2)):
            for slot in gl.static_range(2):
                # a pair's second block may not exist: load the first again, because unowned memory could be NaN
                block = gl.minimum(2 * pair + slot, blocks - 1)
                at, row, _ = block_at(block, walk, BLOCK, TAIL, CHAIN)
                if PAGED:  # look up the page while the buffer is still in use
                    row = paged_row(block, walk, table, row, at, BLOCK, CHAIN)
                for part in gl.static_range(2):
                    bar = full.index(_bar(slot, part, FEW))
                    if FEW or part == 0:
                        mbarrier.wait(free.index(_bar(slot, part, FEW)), (turn & 1) ^ 1)
                        if PDL and part == 0:
                            if at + BLOCK > start:  # it has slots that are written in this pass
                                gdc_wait()
                        mbarrier.expect(bar, BLOCK * half * 2 if FEW else BLOCK * (C + R) * 2)
                    load_tile(k_half, [row, part * half], bar, keys.index(2 * slot + part))
                bar = full.index(_bar(slot, 2, FEW))
                if FEW:
                    mbarrier.wait(free.index(_bar(slot, 2, FEW)), (turn & 1) ^ 1)
                    mbarrier.expect(bar, BLOCK * R * 2)
                load_tile(k_rope, [row, C], bar, key_ropes.index(slot))
            if turn == 0:  # every tile has a first block
                if PDL:
                    gdc_wait()
                mbarrier.expect(q_bar, ROWS * (C + R) * 2)
                load_tile(q_half, [q_row, 0], q_bar, queries.index(0))
                load_tile(q_half, [q_row, half], q_bar, queries.index(1))
                load_tile(q_rope, [q_row, C], q_bar, handed.index(1))
            turn += 1


@gluon.jit
def _scores(queries, q_rope, keys, key_ropes, full, phase, zero, OWN: gl.constexpr, ROWS: gl.constexpr,
            BLOCK: gl.constexpr, FEW: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """Starts queries [ROWS, W] @ keys [BLOCK, W].T of the warpgroup's own block, as soon as it is there."""
    scores = gl.zeros([ROWS, BLOCK], gl.float32, layout)
    for part in gl.static_range(2):
        if FEW or part == 0:
            mbarrier.wait(full.index(_bar(OWN, part, FEW)), phase)
        latent = keys.index(zero + 2 * OWN + part).permute((1, 0))
        scores = warpgroup_mma(queries.index(zero + part), latent, scores, use_acc=part > 0, is_async=True)
    if FEW:
        mbarrier.wait(full.index(_bar(OWN, 2, FEW)), phase)
    return warpgroup_mma(q_rope, key_ropes.index(OWN).permute((1, 0)), scores, is_async=True)


@gluon.jit
def _weighed(scores, position, member, walk, block, peak, total, scale, KIND: gl.constexpr, BLOCK: gl.constexpr,
             TAIL: gl.constexpr, CHAIN: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """One step of the online softmax: returns weights, the peak they refer to, and the sum so far."""
    at, _, whose = block_at(block, walk, BLOCK, TAIL, CHAIN)
    keys = at + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
    seen = gl.expand_dims(keys, 0) <= gl.expand_dims(position, 1)
    if not CHAIN:
        # past the last tail there is no node: the second block of a pair may not exist
        seen = seen & gl.expand_dims((block < walk[1]) | (member == whose), 1)
    scores = gl.where(seen, scores * scale, float("-inf"))
    higher = gl.maximum(peak, gl.max(scores, 1))
    safe = gl.where(higher == float("-inf"), 0.0, higher)
    weights = gl.exp2(scores - gl.expand_dims(safe, 1))
    total = total * gl.exp2(peak - safe) + gl.sum(weights, 1)
    return weights.to(KIND), higher, total


@gluon.jit
def _shrunk(acc, before, after, layout: gl.constexpr):
    """Returns sums rescaled from the peak `before` to the peak `after`."""
    kept = gl.exp2(before - gl.where(after == float("-inf"), 0.0, after))
    return acc * gl.expand_dims(gl.convert_layout(kept, gl.SliceLayout(1, layout)), 1)


@gluon.jit
def _hand_over(weights, peak, total, handed, stats, bar, SLOT: gl.constexpr):
    """Passes weights and the state of the softmax to the other warpgroup."""
    handed.index(SLOT).store(weights)
    stats.index(2 * SLOT).store(peak)
    stats.index(2 * SLOT + 1).store(total)
    fence_async_shared()
    mbarrier.arrive(bar, count=1)


@gluon.jit
def _multiply(
    parts, peaks, totals, depths, padded, scale, sm, bars, place, splits,
    OWN: gl.constexpr, C: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr, TAIL: gl.constexpr,
    HEADS: gl.constexpr, CHAIN: gl.constexpr, PDL: gl.constexpr, FEW: gl.constexpr, END1: gl.constexpr,
):  # fmt: skip
    """A multiplying warpgroup: scores of its own blocks, sums of its own columns."""
    if PDL:
        gdc_wait()  # before it writes
    queries, handed, keys, key_ropes, stats = sm
    q_bar, full, free, shown, taken = bars
    half: gl.constexpr = C // 2
    kind: gl.constexpr = keys.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, half, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    a_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    tile_row, first_pair = place[7], place[3] * ROWS
    lane = gl.arange(0, ROWS, layout=row_layout)
    node = (first_pair + lane) // HEADS
    position = place[0] + gl.load(depths + node, mask=node < place[2], other=0)
    member = node - first_pair // HEADS
    mbarrier.wait(q_bar, 0)
    # read once: its buffer is one of the two through which weights are passed
    q_rope = handed.index(1).load(gl.DotOperandLayout(0, s_layout, 2))
    turn = 0
    acc = gl.zeros([ROWS, half], gl.float32, o_layout)
    target = parts + (split_at(splits[0], splits, FEW) * padded + tile_row).to(gl.int64) * C + OWN * half
    for number in range(splits[0], splits[1], splits[2]):
        split = split_at(number, splits, FEW)
        walk, blocks = walk_of(split, place, ROWS, BLOCK, HEADS, CHAIN, END1)
        peak = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
        total = gl.zeros([ROWS], gl.float32, row_layout)
        for pair in range(gl.cdiv(blocks, 2)):
            phase = turn & 1
            zero = turn >> 30  # opaque to the compiler, which else keeps fifty addresses in registers and spills
            turn += 1
            scores = _scores(queries, q_rope, keys, key_ropes, full, phase, zero, OWN, ROWS, BLOCK, FEW, s_layout)
            if (pair == 0) & (number > splits[0]):
                # meanwhile the previous split is written
                _store(acc, target, C, ROWS, half)
                if FEW:
                    target = parts + (split * padded + tile_row).to(gl.int64) * C + OWN * half
                else:
                    target += (splits[2] * padded).to(gl.int64) * C
                acc = gl.zeros([ROWS, half], gl.float32, o_layout)
            scores = warpgroup_mma_wait(0, deps=[scores])
            if FEW:
                mbarrier.arrive(free.index(_bar(OWN, 2, FEW)), count=1)
            if OWN == 0:
                before = peak
                weights, peak, total = _weighed(scores, position, member, walk, 2 * pair, peak, total, scale, kind,
                                                BLOCK, TAIL, CHAIN, s_layout)  # fmt: skip
                mbarrier.wait(taken.index(0), phase ^ 1)
                _hand_over(weights, peak, total, handed, stats, shown.index(0), 0)
                acc = _shrunk(acc, before, peak, o_layout)
                acc = warpgroup_mma(gl.convert_layout(weights, a_layout), keys.index(zero), acc, is_async=True)
                if FEW:  # nobody else reads this half
                    acc = warpgroup_mma_wait(0, deps=[acc])
                    mbarrier.arrive(free.index(_bar(0, 0, FEW)), count=1)
                mbarrier.wait(full.index(_bar(1, 0, FEW)), phase)
                mbarrier.wait(shown.index(1), phase)
                after = stats.index(2).load(row_layout)
                total = stats.index(3).load(row_layout)
                if not FEW:
                    acc = warpgroup_mma_wait(0, deps=[acc])
                    mbarrier.arrive(free.index(0), count=1)
                acc = _shrunk(acc, peak, after, o_layout)
                acc = warpgroup_mma(handed.index(1), keys.index(zero + 2), acc, is_async=True)
                peak = after
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(taken.index(1), count=1)
                mbarrier.arrive(free.index(_bar(1, 0, FEW)), count=1)
            else:
                mbarrier.wait(full.index(_bar(0, 1, FEW)), phase)
                mbarrier.wait(shown.index(0), phase)
                before = stats.index(0).load(row_layout)
                total = stats.index(1).load(row_layout)
                acc = _shrunk(acc, peak, before, o_layout)
                acc = warpgroup_mma(handed.index(0), keys.index(zero + 1), acc, is_async=True)
                weights, peak, total = _weighed(scores, position, member, walk, 2 * pair + 1, before, total, scale,
                                                kind, BLOCK, TAIL, CHAIN, s_layout)  # fmt: skip
                mbarrier.wait(taken.index(1), phase ^ 1)
                _hand_over(weights, peak, total, handed, stats, shown.index(1), 1)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(taken.index(0), count=1)
                mbarrier.arrive(free.index(_bar(0, 1, FEW)), count=1)
                acc = _shrunk(acc, before, peak, o_layout)
                acc = warpgroup_mma(gl.convert_layout(weights, a_layout), keys.index(zero + 3), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(free.index(_bar(1, 1, FEW)), count=1)
        row = split * padded + tile_row
        if OWN == 0:
            gl.store(peaks + row + lane, peak)
            gl.store(totals + row + lane, total)
    _store(acc, target, C, ROWS, half)


@gluon.jit
def _store(acc, target, C: gl.constexpr, ROWS: gl.constexpr, half: gl.constexpr):
    """Writes sums [ROWS, C / 2] in bf16 or fp16, 16 bytes per thread, without a shared-memory buffer."""
    pairs: gl.constexpr = _layout_with(2, ROWS, half)
    fours: gl.constexpr = _layout_with(4, ROWS, half)
    eights: gl.constexpr = _layout_with(8, ROWS, half)
    # two exchanges within four threads; one conversion for both would go through shared memory
    values = gl.convert_layout(acc.to(target.dtype.element_ty), pairs, assert_trivial=True)
    values = gl.convert_layout(gl.convert_layout(values, fours), eights)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, eights))
    column = gl.arange(0, half, layout=gl.SliceLayout(0, eights))
    gl.store(target + gl.expand_dims(row, 1) * C + gl.expand_dims(column, 0), values)


@gluon.constexpr_function
def _layout_with(together, rows, columns):
    """Returns the layout of the tensor core's results (together = 2), or one with more adjacent columns per thread."""
    columns_of_lanes = {2: [2, 4], 4: [8, 4], 8: [8, 16]}[together]
    registers, column = [], 1
    while column < columns:
        if column not in columns_of_lanes:
            registers.append([0, column])
        column *= 2
    registers.insert({2: 1, 4: 2, 8: 3}[together], [8, 0])
    lanes = [[0, column] for column in columns_of_lanes] + [[1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [rows, columns])


@gluon.jit(do_not_specialize=["nodes", "deepest", "sequences", "each"])
def attend_kernel(
    q_half,  # [M H, W] in tiles [ROWS, C / 2]
    q_rope,  # [M H, W] in tiles [ROWS, R]
    k_half,  # the store in tiles [BLOCK, C / 2]
    k_rope,  # the store in tiles [BLOCK, R]
    parts,  # [S * padded, C] bf16
    length,  # [B] int32
    pages,  # [B, P] int32, used with PAGED
    page_count,  # P
    depths,  # [nodes] int32
    peaks,  # [S, padded] float32
    totals,  # [S, padded] float32
    base,  # first row of the layer
    spare,  # first row of the nodes' tails; unused for a chain
    nodes,  # of a sequence
    padded,  # node-head pairs of all sequences, each in whole tiles
    deepest,  # largest depth
    scale,
    sequences,  # B
    each,  # programs per tile
    PAGED: gl.constexpr,
    HEADS: gl.constexpr,
    C: gl.constexpr,
    R: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK: gl.constexpr,
    TAIL: gl.constexpr,
    CHAIN: gl.constexpr,
    END1: gl.constexpr,
    PDL: gl.constexpr,
    FEW: gl.constexpr,  # tiles: equal shares, blocks in pieces
):
    """Partial attention, as `kernels._attend_kernel`'s, of a tile of ROWS node-head pairs over some splits.

    A tile's splits are distributed over `each` programs, so that a program reads its queries once and goes from split
    to split without a pause. A split's result does not depend on which program computes it.
    """
    if PDL:
        gdc_launch_dependents()
    tiles = padded // ROWS
    tile, turn = gl.program_id(0) % tiles, gl.program_id(0) // tiles
    row = tile * ROWS
    q_row = row
    if PAGED:  # no tile has nodes of two sequences
        sequence = tile // (tiles // sequences)
        tile = tile % (tiles // sequences)
        q_row = sequence * nodes * HEADS + tile * ROWS
        spare += sequence * nodes * TAIL
        table = pages + sequence * page_count
        start = gl.load(length + sequence)
    else:
        table = pages
        start = gl.load(length)
    count = split_of(start + deepest, END1) + 1
    if FEW:
        high, highs, low, lows = share_of(turn, each, count, start + deepest + 1, END1)
        splits = (0, highs + lows, 1, high, highs, low)
    else:
        splits = (turn, count, each, 0, 0, 0)
    if splits[0] < splits[1]:
        queries = gl.allocate_shared_memory(q_rope.dtype, [2, ROWS, C // 2], q_half.layout)
        keys = gl.allocate_shared_memory(q_rope.dtype, [4, BLOCK, C // 2], k_half.layout)
        key_ropes = gl.allocate_shared_memory(q_rope.dtype, [2, BLOCK, R], k_rope.layout)
        handed = gl.allocate_shared_memory(q_rope.dtype, [2, ROWS, BLOCK], q_rope.layout)
        stats = gl.allocate_shared_memory(gl.float32, [4, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        q_bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        pieces: gl.constexpr = 6 if FEW else 2
        full = gl.allocate_shared_memory(gl.int64, [pieces, 1], mbarrier.MBarrierLayout())
        free = gl.allocate_shared_memory(gl.int64, [pieces, 1], mbarrier.MBarrierLayout())
        shown = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        mbarrier.init(q_bar, count=1)
        for piece in gl.static_range(pieces):
            mbarrier.init(full.index(piece), count=1)
            mbarrier.init(free.index(piece), count=1 if FEW else 2)
        for slot in gl.static_range(2):
            mbarrier.init(shown.index(slot), count=1)
            mbarrier.init(taken.index(slot), count=1)
        fence_async_shared()

        place = (start, deepest, nodes, tile, base, spare, q_row, row)
        sm = (queries, handed, keys, key_ropes, stats)
        bars = (q_bar, full, free, shown, taken)
        gl.warp_specialize(
            [
                (_copy_in, (q_half, q_rope, k_half, k_rope, (queries, handed, keys, key_ropes), (q_bar, full, free),
                            place, splits, table, C, R, ROWS, BLOCK, TAIL, HEADS, CHAIN, PAGED, PDL, FEW, END1)),
                (_multiply, (parts, peaks, totals, depths, padded, scale, sm, bars, place, splits,
                             0, C, ROWS, BLOCK, TAIL, HEADS, CHAIN, PDL, FEW, END1)),
                (_multiply, (parts, peaks, totals, depths, padded, scale, sm, bars, place, splits,
                             1, C, ROWS, BLOCK, TAIL, HEADS, CHAIN, PDL, FEW, END1)),
            ],
            [4, 4],
            [240, 240],
        )  # fmt: skip


def fits(latent: int, rope: int) -> bool:
    """Whether the kernel takes these sizes: half of the latent is the tensor core's width, and the rope part of the
    queries has the shape of a block's weights, with which it shares a buffer."""
    return latent in (128, 256, 512) and rope == KEYS
