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

from mtp_spec.kernels.quant import _store_quantised

# where splits of one size end and larger ones begin: short ones fill the machine at short contexts, long ones keep
# the parts few at long contexts
END0: tl.constexpr = tl.constexpr(1024)
END1: tl.constexpr = tl.constexpr(8192)
END2: tl.constexpr = tl.constexpr(32768)
SIZE0: tl.constexpr = tl.constexpr(64)
SIZE1: tl.constexpr = tl.constexpr(256)
SIZE2: tl.constexpr = tl.constexpr(512)
SIZE3: tl.constexpr = tl.constexpr(2048)
FIRST1: tl.constexpr = tl.constexpr(1024 // 64)
FIRST2: tl.constexpr = tl.constexpr(1024 // 64 + (8192 - 1024) // 256)
FIRST3: tl.constexpr = tl.constexpr(1024 // 64 + (8192 - 1024) // 256 + (32768 - 8192) // 512)


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
):
    """Norms both latents: the query's is quantised, the key's goes to the cache with its rotated part."""
    row = tl.program_id(0)
    source = down + row.to(tl.int64) * (A_ROWS + C + R)
    if tl.program_id(1) == 0:
        start = tl.load(length)
        lane = tl.arange(0, WIDE_C)
        x = tl.load(source + A_ROWS + lane, mask=lane < C, other=0.0).to(tl.float32)
        normed = (x * tl.rsqrt(tl.sum(x * x, 0) / C + eps)).to(tl.bfloat16)
        weight = tl.load(kv_norm + lane, mask=lane < C, other=0.0).to(tl.float32)
        target = cache + (start + tl.load(slots + row)).to(tl.int64) * (C + R)
        tl.store(target + lane, (weight * normed.to(tl.float32)).to(tl.bfloat16), mask=lane < C)
        position = start + offset + tl.load(depths + row) + tl.zeros((1, 1), dtype=tl.int32)
        turned = _rotated(source + A_ROWS + C, table, position, position >= 0, R, WIDE_R, INTERLEAVED)
        lane_r = tl.arange(0, WIDE_R)[None, :]
        tl.store(target + C + lane_r, turned.to(tl.bfloat16), mask=lane_r < R)
    else:
        if LORA:
            lane = tl.arange(0, WIDE_A)
            x = tl.load(source + lane, mask=lane < A_ROWS, other=0.0).to(tl.float32)
            normed = (x * tl.rsqrt(tl.sum(x * x, 0) / A_ROWS + eps)).to(tl.bfloat16)
            weight = tl.load(q_norm + lane, mask=lane < A_ROWS, other=0.0).to(tl.float32)
            values = (weight * normed.to(tl.float32)).to(tl.bfloat16).to(tl.float32)
            blocks: tl.constexpr = (A_ROWS + 127) // 128
            _store_quantised(values, row, 0, quantised, scales, A_ROWS, blocks, WIDE_A, False, LARGEST)


@triton.jit
def _up_weight(kv_b, kv_b_scale, row, row_mask, column, C: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr):
    """Returns kv_b [rows, columns] in bf16 (float32 for the interpreter), dequantised if it is e4m3."""
    mask = row_mask[:, None] & (column < C)[None, :]
    w = tl.load(kv_b + row.to(tl.int64)[:, None] * C + column[None, :], mask=mask, other=0.0)
    if PACKED:
        blocks: tl.constexpr = (C + 127) // 128
        at = kv_b_scale + (row // 128)[:, None] * blocks + (column // 128)[None, :]
        w = w.to(tl.float32) * tl.load(at, mask=mask, other=0.0)
    w = w.to(tl.bfloat16)
    if WIDE:
        w = w.to(tl.float32)
    return w


@triton.jit
def _absorb_kernel(
    q,  # [M, H, N + R] bf16, rows `stride` apart
    kv_b,  # [H (N + V), C]
    kv_b_scale,
    table,  # [L, 2, R] float32
    length,
    depths,
    out,  # [M, H, W] bf16
    rows,
    stride,
    offset,
    heads,
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
):
    """q_latent = q_nope @ W_UK for 128 columns of one head; one more program a head turns q_rope."""
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
        w = _up_weight(kv_b, kv_b_scale, head * (N + V) + inner, inner < N, column, C, PACKED, WIDE)
        for first in range(0, rows, ROWS):
            row = first + lane
            source = q + row.to(tl.int64)[:, None] * stride + head * (N + R) + inner[None, :]
            x = tl.load(source, mask=(row < rows)[:, None] & (inner < N)[None, :], other=0.0)
            if WIDE:
                x = x.to(tl.float32)
            target = out + (row.to(tl.int64) * heads + head)[:, None] * (C + R) + column[None, :]
            tl.store(target, tl.dot(x, w).to(tl.bfloat16), mask=(row < rows)[:, None] & (column < C)[None, :])


@triton.jit
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
):
    """out = context @ W_UV.T for 128 values of one head, quantised where they are a whole block of the next product."""
    head = tl.program_id(0)
    value = tl.program_id(1) * 128 + tl.arange(0, 128)
    lane = tl.arange(0, ROWS)
    for first in range(0, rows, ROWS):
        row = first + lane
        real = row < rows
        total = tl.zeros((ROWS, 128), dtype=tl.float32)
        for chunk in tl.range(0, C, CHUNK, num_stages=2):
            column = chunk + tl.arange(0, CHUNK)
            w = _up_weight(kv_b, kv_b_scale, head * (N + V) + N + value, value < V, column, C, PACKED, WIDE)
            source = context + (row.to(tl.int64) * heads + head)[:, None] * C + column[None, :]
            x = tl.load(source, mask=real[:, None] & (column < C)[None, :], other=0.0)
            if WIDE:
                x = x.to(tl.float32)
            total = tl.dot(x, w.T, total)
        kept = real[:, None] & (value < V)[None, :]
        target = out + row.to(tl.int64)[:, None] * (heads * V) + head * V + value[None, :]
        values = total.to(tl.bfloat16)
        if QUANTISE:
            wide = values.to(tl.float32)
            scale = tl.max(tl.abs(wide), axis=1) / LARGEST
            scale = tl.where(scale > 0, scale, 1.0)
            # the quotient can exceed the largest value by a rounding
            scaled = tl.minimum(tl.maximum(wide / scale[:, None], -LARGEST), LARGEST)
            tl.store(target, scaled.to(out.dtype.element_ty), mask=kept)
            block = (head * V) // 128 + tl.program_id(1)
            tl.store(scales + row * (heads * V // 128) + block, scale, mask=real)
        else:
            tl.store(target, values, mask=kept)


@triton.jit
def _absorb_block(
    q_latent, q_rope, latent, rope, seen, peak, total, acc, scale, MASK: tl.constexpr, WIDE: tl.constexpr
):
    """One step of the online softmax: keys [BLOCK, C] and [BLOCK, R] for queries [ROWS, C] and [ROWS, R].

    The mask is applied to bare products, so that whole blocks and masked ones share every later operation.
    """
    if WIDE:  # the interpreter cannot multiply bfloat16
        latent = latent.to(tl.float32)
        rope = rope.to(tl.float32)
    scores = tl.dot(q_latent, latent.T)
    scores = tl.dot(q_rope, rope.T, scores)
    if MASK:
        scores = tl.where(seen, scores, float("-inf"))
    scores = scores * scale
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
def _attend_kernel(
    q,  # [M, H, W] bf16
    cache,  # [capacity, W] bf16
    latent_desc,  # the cache in tiles [BLOCK, C]; used with TMA
    rope_desc,  # the cache in tiles [BLOCK, R]; used with TMA
    length,  # [1] int32
    depths,  # [M] int32
    ancestors,  # [M, A] int32; unused for a chain
    parts,  # [S, M H, C]
    peaks,  # [S, M H] float32
    totals,  # [S, M H] float32
    nodes,
    heads,
    columns,  # A
    first_depth,  # of a chain's first row
    deepest,  # largest depth
    scale,
    C: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,  # of ROWS; the others are further nodes
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    CHAIN: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Partial attention of every (split, tile of ROWS node-head pairs); programs take several in turn."""
    GROUP: tl.constexpr = ROWS // HEADS
    W: tl.constexpr = C + R
    start = tl.load(length)
    head_tiles = tl.cdiv(heads, HEADS)
    tiles = tl.cdiv(nodes, GROUP) * head_tiles
    splits = split_of(start + deepest) + 1
    in_latent, in_rope, in_block = tl.arange(0, C), tl.arange(0, R), tl.arange(0, BLOCK)
    lane = tl.arange(0, ROWS)
    # blocks of committed slots alone: every row sees all of them
    whole = start // BLOCK * BLOCK
    for item in range(tl.program_id(0), splits * tiles, tl.num_programs(0)):
        tile = item % tiles  # neighbours read the same keys
        split = splits - 1 - item // tiles  # the long ones first
        first, end = _split_start(split), _split_start(split + 1)
        node = tile // head_tiles * GROUP + lane // HEADS
        head = tile % head_tiles * HEADS + lane % HEADS
        real = (node < nodes) & (head < heads)
        position = start + tl.load(depths + node, mask=node < nodes, other=0)
        row = node * heads + head
        place = q + row.to(tl.int64)[:, None] * W
        q_latent = tl.load(place + in_latent[None, :], mask=real[:, None], other=0.0)
        q_rope = tl.load(place + C + in_rope[None, :], mask=real[:, None], other=0.0)
        if WIDE:
            q_latent = q_latent.to(tl.float32)
            q_rope = q_rope.to(tl.float32)
        peak = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((ROWS,), dtype=tl.float32)
        acc = tl.zeros((ROWS, C), dtype=tl.float32)
        for at0 in tl.range(first, tl.minimum(end, whole), BLOCK, num_stages=STAGES):
            if TMA:
                latent = latent_desc.load([at0, 0])
                rope = rope_desc.load([at0, C])
            else:
                keys = cache + (at0 + in_block).to(tl.int64)[:, None] * W
                latent = tl.load(keys + in_latent[None, :])
                rope = tl.load(keys + C + in_rope[None, :])
            peak, total, acc = _absorb_block(
                q_latent, q_rope, latent, rope, real, peak, total, acc, scale, False, WIDE
            )
        # blocks that hold positions of this pass: a chain's slots are its positions, a tree's node gathers its own
        tail = tl.maximum(first, whole)
        PASSES: tl.constexpr = 1 if CHAIN else GROUP
        for member in range(PASSES):
            if CHAIN:
                deep = first_depth + tl.minimum(tile // head_tiles * GROUP + GROUP, nodes) - 1
                mine = real
            else:
                one = tile // head_tiles * GROUP + member
                deep = tl.load(depths + one, mask=one < nodes, other=-start - 1)
                mine = real & (lane // HEADS == member)
                line = ancestors + one * columns
            for at0 in tl.range(tail, tl.minimum(end, start + deep + 1), BLOCK, num_stages=1):
                at = at0 + in_block
                held = at <= start + deep
                slot = at
                if not CHAIN:
                    drafted = held & (at >= start)
                    slot = tl.where(drafted, start + tl.load(line + at - start, mask=drafted, other=0), at)
                keys = cache + slot.to(tl.int64)[:, None] * W
                latent = tl.load(keys + in_latent[None, :], mask=held[:, None], other=0.0)
                rope = tl.load(keys + C + in_rope[None, :], mask=held[:, None], other=0.0)
                seen = mine[:, None] & (at[None, :] <= position[:, None])
                peak, total, acc = _absorb_block(
                    q_latent, q_rope, latent, rope, seen, peak, total, acc, scale, True, WIDE
                )
        kept = real & (position >= first)
        out = split.to(tl.int64) * (nodes * heads) + row
        tl.store(peaks + out, peak, mask=kept)
        tl.store(totals + out, total, mask=kept)
        tl.store(parts + out[:, None] * C + in_latent[None, :], acc.to(parts.dtype.element_ty), mask=kept[:, None])


@triton.jit
def _combine_kernel(
    parts,  # [S, M H, C]
    peaks,  # [S, M H] float32
    totals,  # [S, M H] float32
    length,
    depths,  # [M] int32
    out,  # [M H, C] bf16
    heads,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Adds a row's splits, CHUNK at a time in ascending order."""
    row = tl.program_id(0)
    count = tl.num_programs(0)
    splits = split_of(tl.load(length) + tl.load(depths + row // heads)) + 1
    chunk, column = tl.arange(0, CHUNK), tl.arange(0, C)
    peak = float("-inf")
    for first in range(0, splits, CHUNK):
        split = first + chunk
        own = tl.load(peaks + split.to(tl.int64) * count + row, mask=split < splits, other=float("-inf"))
        peak = tl.maximum(peak, tl.max(own, 0))
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = 0.0
    acc = tl.zeros((C,), dtype=tl.float32)
    for first in range(0, splits, CHUNK):
        split = first + chunk
        held = split < splits
        at = split.to(tl.int64) * count + row
        kept = tl.exp2(tl.load(peaks + at, mask=held, other=float("-inf")) - peak)
        total += tl.sum(kept * tl.load(totals + at, mask=held, other=0.0), 0)
        part = tl.load(parts + at[:, None] * C + column[None, :], mask=held[:, None], other=0.0).to(tl.float32)
        acc += tl.sum(kept[:, None] * part, 0)
    acc = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + row.to(tl.int64) * C + column, acc.to(tl.bfloat16))
