"""Absorbed MLA as Triton kernels; imported by `mla` where Triton is there.

Every number of a row is computed as if the row were alone. Its context is cut at absolute positions, into blocks of
BLOCK and into splits that grow with the position (`split_of`), and its keys are brought into position order from
whichever slot holds them. Softmax and sums walk blocks, then splits, in ascending order.

Legend: `M` rows, `H` heads, `N` qk_nope_head_dim, `R` qk_rope_head_dim, `C` kv_lora_rank, `W` = C + R, `V` v_head_dim,
`A` columns of the ancestor table, `S` splits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtp_spec.kernels.launching import follow
from mtp_spec.kernels.mla import SPLIT_ENDS, SPLIT_SIZES
from mtp_spec.kernels.mla import split_of as split_of_position
from mtp_spec.kernels.quant import _store_quantised

END0, END1, END2 = (tl.constexpr(end) for end in SPLIT_ENDS)
SIZE0, SIZE1, SIZE2, SIZE3 = (tl.constexpr(size) for size in SPLIT_SIZES)
FIRST1, FIRST2, FIRST3 = (tl.constexpr(split_of_position(end)) for end in SPLIT_ENDS)


@triton.jit
def split_of(position):
    """Returns the split that a position belongs to."""
    late = tl.where(position < END2, FIRST2 + (position - END1) // SIZE2, FIRST3 + (position - END2) // SIZE3)
    return tl.where(
        position < END0, position // SIZE0, tl.where(position < END1, FIRST1 + (position - END0) // SIZE1, late)
    )


@triton.jit
def _split_start(split):
    late = tl.where(split < FIRST3, END1 + (split - FIRST2) * SIZE2, END2 + (split - FIRST3) * SIZE3)
    return tl.where(
        split < FIRST1, split * SIZE0, tl.where(split < FIRST2, END0 + (split - FIRST1) * SIZE1, late)
    )


@triton.jit
def _rotated(source, table, position, mask, R: tl.constexpr, WIDE_R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Returns rows [ROWS, R] at addresses `source` [ROWS, 1] turned by their positions [ROWS, 1], float32."""
    lane = tl.arange(0, WIDE_R)[None, :]
    inside = mask & (lane < R)
    if INTERLEAVED:
        partner = lane ^ 1
    else:
        partner = (lane + R // 2) % R
    angle = table + position * (2 * R)
    own = tl.load(angle + lane, mask=inside, other=0.0)
    other = tl.load(angle + R + lane, mask=inside, other=0.0)
    values = tl.load(source + lane, mask=inside, other=0.0).to(tl.float32)
    swapped = tl.load(source + partner, mask=inside, other=0.0).to(tl.float32)
    return values * own + swapped * other


@triton.jit
def _prepare_kernel(
    down,  # [M, A_ROWS + C + R] bf16: the fused down-projection
    q_norm,  # [A_ROWS], used with LORA
    kv_norm,  # [C]
    table,  # [L, 2, R] float32
    length,  # [1] int32
    depths,  # [M] int32
    slots,  # [M] int32
    quantised,  # [M, A_ROWS] e4m3, used with LORA
    scales,  # [M, ceil(A_ROWS / 128)] float32
    cache,  # [capacity, W] bf16
    offset,
    eps,
    A_ROWS: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    WIDE_A: tl.constexpr,
    WIDE_C: tl.constexpr,
    WIDE_R: tl.constexpr,
    LORA: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LARGEST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Norms both latents: the query's is quantised, the key's goes to the cache with its rotated part."""
    follow(PDL)
    row = tl.program_id(0)
    source = down + row.to(tl.int64) * (A_ROWS + C + R)
    if tl.program_id(1) == 0:
        start = tl.load(length)
        target = cache + (start + tl.load(slots + row)).to(tl.int64) * (C + R)
        lane = tl.arange(0, WIDE_C)
        normed = _normed(source + A_ROWS, kv_norm, eps, C, WIDE_C)
        tl.store(target + lane, normed, mask=lane < C)
        position = start + offset + tl.load(depths + row) + tl.zeros((1, 1), dtype=tl.int32)
        turned = _rotated(source + A_ROWS + C, table, position, position >= 0, R, WIDE_R, INTERLEAVED)
        lane_r = tl.arange(0, WIDE_R)[None, :]
        tl.store(target + C + lane_r, turned.to(tl.bfloat16), mask=lane_r < R)
    elif LORA:
        values = _normed(source, q_norm, eps, A_ROWS, WIDE_A).to(tl.float32)
        blocks: tl.constexpr = (A_ROWS + 127) // 128
        _store_quantised(values, row, 0, quantised, scales, A_ROWS, blocks, WIDE_A, False, LARGEST)


@triton.jit
def _normed(source, weight, eps, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """Returns the RMS norm of SIZE numbers in bf16, rounded before and after the weight, as the model does."""
    lane = tl.arange(0, WIDE)
    x = tl.load(source + lane, mask=lane < SIZE, other=0.0).to(tl.float32)
    normed = (x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)).to(tl.bfloat16).to(tl.float32)
    return (tl.load(weight + lane, mask=lane < SIZE, other=0.0).to(tl.float32) * normed).to(tl.bfloat16)


@triton.jit
def _up_weight(
    kv_b, kv_b_scale, row, row_mask, first, SIZE: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Returns SIZE columns of kv_b's rows, inside one block of 128, in bf16, dequantised if they are e4m3."""
    column = first + tl.arange(0, SIZE)
    mask = row_mask[:, None] & (column < C)[None, :]
    w = tl.load(kv_b + row.to(tl.int64)[:, None] * C + column[None, :], mask=mask, other=0.0)
    if PACKED:
        blocks: tl.constexpr = (C + 127) // 128
        scale = tl.load(kv_b_scale + row // 128 * blocks + first // 128, mask=row_mask, other=0.0)
        w = w.to(tl.float32) * scale[:, None]
    w = w.to(tl.bfloat16)
    if WIDE:  # the interpreter cannot multiply bfloat16
        w = w.to(tl.float32)
    return w


@triton.jit(do_not_specialize=["rows"])
def _absorb_kernel(
    q,  # [M, H, N + R] bf16, rows `stride` apart
    kv_b,  # [H (N + V), C]
    kv_b_scale,
    table,  # [L, 2, R] float32
    length,
    depths,
    out,  # [M, padded H, W] bf16
    rows,
    stride,
    offset,
    heads,  # of the output, padded
    N: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    WIDE_N: tl.constexpr,
    WIDE_R: tl.constexpr,
    ROWS: tl.constexpr,
    PACKED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """q_latent = q_nope @ W_UK for 128 columns of one head; one more program a head turns q_rope."""
    follow(PDL)
    head, part = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, ROWS)
    if part == tl.num_programs(1) - 1:
        start = tl.load(length) + offset
        for first in range(0, rows, ROWS):
            row = first + lane
            real = row < rows
            position = start + tl.load(depths + row, mask=real, other=0)
            source = q + row.to(tl.int64) * stride + head * (N + R) + N
            turned = _rotated(source[:, None], table, position[:, None], real[:, None], R, WIDE_R, INTERLEAVED)
            lane_r = tl.arange(0, WIDE_R)[None, :]
            target = out + (row.to(tl.int64) * heads + head)[:, None] * (C + R) + C + lane_r
            tl.store(target, turned.to(tl.bfloat16), mask=real[:, None] & (lane_r < R))
    else:
        inner = tl.arange(0, WIDE_N)
        column = part * 128 + tl.arange(0, 128)
        w = _up_weight(kv_b, kv_b_scale, head * (N + V) + inner, inner < N, part * 128, 128, C, PACKED, WIDE)
        for first in range(0, rows, ROWS):
            row = first + lane
            source = q + row.to(tl.int64)[:, None] * stride + head * (N + R) + inner[None, :]
            x = tl.load(source, mask=(row < rows)[:, None] & (inner < N)[None, :], other=0.0)
            if WIDE:
                x = x.to(tl.float32)
            target = out + (row.to(tl.int64) * heads + head)[:, None] * (C + R) + column[None, :]
            tl.store(target, tl.dot(x, w).to(tl.bfloat16), mask=(row < rows)[:, None] & (column < C)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _up_kernel(
    context,  # [M, H, C] bf16
    kv_b,
    kv_b_scale,
    out,  # [M, H V] bf16, or e4m3 with QUANTISE
    scales,  # [M, H V / 128] float32, used with QUANTISE
    rows,
    heads,
    N: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    PACKED: tl.constexpr,
    QUANTISE: tl.constexpr,
    LARGEST: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = context @ W_UV.T for 128 values of one head, quantised where they are a whole block of the next product."""
    follow(PDL)
    head = tl.program_id(0)
    value = tl.program_id(1) * 128 + tl.arange(0, 128)
    lane = tl.arange(0, ROWS)
    for first in range(0, rows, ROWS):
        row = first + lane
        real = row < rows
        total = tl.zeros((128, ROWS), dtype=tl.float32)
        for chunk in tl.range(0, C, CHUNK):
            w = _up_weight(kv_b, kv_b_scale, head * (N + V) + N + value, value < V, chunk, CHUNK, C, PACKED, WIDE)
            column = chunk + tl.arange(0, CHUNK)
            source = context + (row.to(tl.int64) * heads + head)[None, :] * C + column[:, None]
            x = tl.load(source, mask=real[None, :] & (column < C)[:, None], other=0.0)
            if WIDE:
                x = x.to(tl.float32)
            total = tl.dot(w, x, total)
        kept = real[None, :] & (value < V)[:, None]
        target = out + row.to(tl.int64)[None, :] * (heads * V) + head * V + value[:, None]
        values = total.to(tl.bfloat16)
        if QUANTISE:
            wide = values.to(tl.float32)
            scale = tl.max(tl.abs(wide), axis=0) / LARGEST
            scale = tl.where(scale > 0, scale, 1.0)
            # the quotient can exceed the largest value by a rounding
            scaled = tl.minimum(tl.maximum(wide / scale[None, :], -LARGEST), LARGEST)
            tl.store(target, scaled.to(out.dtype.element_ty), mask=kept)
            block = (head * V) // 128 + tl.program_id(1)
            tl.store(scales + row * (heads * V // 128) + block, scale, mask=real)
        else:
            tl.store(target, values, mask=kept)


@triton.jit
def _absorb_block(
    q_latent, q_rope, latent, rope, seen, peak, total, acc, scale, WIDE: tl.constexpr
):
    """One step of the online softmax: keys [BLOCK, C] and [BLOCK, R] for queries [ROWS, C] and [ROWS, R]."""
    if WIDE:  # the interpreter cannot multiply bfloat16
        latent = latent.to(tl.float32)
        rope = rope.to(tl.float32)
    scores = tl.dot(q_latent, latent.T)
    scores = tl.dot(q_rope, rope.T, scores)
    scores = tl.where(seen, scores * scale, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    kept = tl.exp2(peak - safe)
    weights = tl.exp2(scores - safe[:, None])
    total = total * kept + tl.sum(weights, 1)
    weights = weights.to(tl.bfloat16)
    if WIDE:
        weights = weights.to(tl.float32)
    acc = tl.dot(weights, latent, acc * kept[:, None])
    return higher, total, acc


@triton.jit
def _gather_kernel(
    store,  # [rows of all layers, W] bf16
    length,  # [1] int32
    depths,  # [M] int32
    ancestors,  # [M, A] int32
    base,  # first row of the layer
    spare,  # first row of the room for tails
    columns,  # A
    BLOCK: tl.constexpr,
    W: tl.constexpr,
    TAIL: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDE_W: tl.constexpr,
    PDL: tl.constexpr,
):
    """Copies a node's last keys in position order: from the last whole block of committed slots to its own."""
    follow(PDL)
    node, start = tl.program_id(0), tl.load(length)
    whole = start // BLOCK * BLOCK
    at = whole + tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    lane = tl.arange(0, WIDE_W)
    held = at <= start + tl.load(depths + node)
    drafted = held & (at >= start)
    slot = tl.where(drafted, start + tl.load(ancestors + node * columns + at - start, mask=drafted, other=0), at)
    mask = held[:, None] & (lane < W)[None, :]
    # what lies beyond is masked later, but a NaN would survive a weight of zero
    keys = tl.load(store + (base + slot).to(tl.int64)[:, None] * W + lane[None, :], mask=mask, other=0.0)
    target = store + (spare + node * TAIL + at - whole).to(tl.int64)[:, None] * W + lane[None, :]
    tl.store(target, keys, mask=(lane < W)[None, :])


@triton.jit(do_not_specialize=["nodes", "deepest"])
def _attend_kernel(
    q_latent_desc,  # [M H, W] in tiles [ROWS, C]
    q_rope_desc,  # [M H, W] in tiles [ROWS, R]
    latent_desc,  # the store in tiles [BLOCK, C]
    rope_desc,  # the store in tiles [BLOCK, R]
    parts_desc,  # [S * padded, C] in tiles [ROWS, C]
    length,  # [1] int32
    depths,  # [M] int32
    peaks,  # [S, padded] float32
    totals,  # [S, padded] float32
    base,  # first row of the layer
    spare,  # first row of the nodes' tails; unused for a chain
    nodes,
    padded,  # M H in whole tiles
    deepest,  # largest depth
    scale,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    STAGES: tl.constexpr,
    CHAIN: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Partial attention of a tile of ROWS node-head pairs over one split.

    All tiles read the blocks of committed slots. Then a chain's tile goes on in the cache, whose slots are its
    positions; a tree's goes through the tails of its nodes one by one. A node without keys in a split leaves numbers
    there that nothing reads.
    """
    follow(PDL)
    GROUP: tl.constexpr = (ROWS + HEADS - 1) // HEADS  # nodes a tile
    start = tl.load(length)
    splits = split_of(start + deepest) + 1
    in_block, lane = tl.arange(0, BLOCK), tl.arange(0, ROWS)
    whole = start // BLOCK * BLOCK
    tiles = padded // ROWS
    # the long splits come first; programs past the last split have nothing to do
    tile, split = tl.program_id(0) % tiles, splits - 1 - tl.program_id(0) // tiles
    if split < 0:
        return
    first, end = _split_start(split), _split_start(split + 1)
    node = (tile * ROWS + lane) // HEADS
    position = start + tl.load(depths + node, mask=node < nodes, other=0)
    q_latent = q_latent_desc.load([tile * ROWS, 0])
    q_rope = q_rope_desc.load([tile * ROWS, C])
    if WIDE:
        q_latent = q_latent.to(tl.float32)
        q_rope = q_rope.to(tl.float32)
    peak = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    acc = tl.zeros((ROWS, C), dtype=tl.float32)
    # positions of the pass's deepest node bound the last block
    last = tl.minimum(end, start + deepest + 1)
    shared = tl.maximum(tl.cdiv(last - first, BLOCK), 0)
    own, blocks, tail, node0 = 1, shared, 0, tile * ROWS // HEADS
    if not CHAIN:
        tail = tl.maximum(first, whole)
        shared = tl.maximum(tl.minimum(end, whole) - first, 0) // BLOCK
        own = tl.maximum(tl.cdiv(last - tail, BLOCK), 0)
        blocks = shared + own * tl.minimum(GROUP, nodes - node0)
    for block in tl.range(0, blocks, num_stages=STAGES):
        at0 = first + block * BLOCK
        key0 = base + at0
        if not CHAIN:
            late = tl.maximum(block - shared, 0)
            member = late // tl.maximum(own, 1)
            at0 = tl.where(block < shared, at0, tail + (late - member * own) * BLOCK)
            key0 = tl.where(block < shared, base + at0, spare + (node0 + member) * TAIL + at0 - whole)
        latent = latent_desc.load([key0, 0])
        rope = rope_desc.load([key0, C])
        seen = (at0 + in_block)[None, :] <= position[:, None]
        if not CHAIN and GROUP > 1:
            seen = seen & ((block < shared) | (node == node0 + member))[:, None]
        peak, total, acc = _absorb_block(q_latent, q_rope, latent, rope, seen, peak, total, acc, scale, WIDE)
    row = split * padded + tile * ROWS
    tl.store(peaks + row + lane, peak)
    tl.store(totals + row + lane, total)
    parts_desc.store([row, 0], acc.to(parts_desc.dtype))


@triton.jit
def _combine_kernel(
    parts,  # [S, padded, C]
    peaks,  # [S, padded] float32
    totals,  # [S, padded] float32
    length,
    depths,  # [M] int32
    out,  # [M, H, C] bf16
    count,  # padded
    HEADS: tl.constexpr,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Adds a row's splits, CHUNK at a time in ascending order; one warp, so that a column is summed by one thread."""
    follow(PDL)
    node, head = tl.program_id(0), tl.program_id(1)
    row = node * HEADS + head
    splits = split_of(tl.load(length) + tl.load(depths + node)) + 1
    chunk, column = tl.arange(0, CHUNK), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    peak, total = float("-inf"), 0.0
    acc = tl.zeros((COLUMNS,), dtype=tl.float32)
    # most contexts have one chunk: all its loads are on their way before the first number is needed
    for first in range(0, splits, CHUNK):
        split = first + chunk
        held = split < splits
        at = split.to(tl.int64) * count + row
        part = tl.load(parts + at[:, None] * C + column[None, :], mask=held[:, None], other=0.0)
        own = tl.load(peaks + at, mask=held, other=float("-inf"))
        its = tl.load(totals + at, mask=held, other=0.0)
        higher = tl.maximum(peak, tl.max(own, 0))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        kept, weight = tl.exp2(peak - safe), tl.exp2(own - safe)
        total = total * kept + tl.sum(weight * its, 0)
        acc = acc * kept + tl.sum(weight[:, None] * part.to(tl.float32), 0)
        peak = higher
    acc = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + (node * tl.num_programs(1) + head).to(tl.int64) * C + column, acc.to(tl.bfloat16))
