"""Absorbed MLA as Triton kernels; imported by `attention` if Triton is available.

Every number of a row is computed as if the row were alone. Its context is split at absolute positions, into blocks of
BLOCK and into splits that grow with the position (`split_of`), and its keys are gathered in position order from their
slots. Softmax and sums go through blocks, then splits, in ascending order.

Legend: `M` rows, `H` heads, `N` qk_nope_head_dim, `R` qk_rope_head_dim, `C` kv_lora_rank, `W` = C + R, `V` v_head_dim,
`A` columns of the ancestor table, `S` splits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtp_spec.kernels.launching import follow
from mtp_spec.kernels.mla.plan import SPLIT_ENDS, SPLIT_SIZES

# of END0, END1, END2 only the second depends on the model (`Head.split_ends`)
END0, END2 = tl.constexpr(SPLIT_ENDS[0]), tl.constexpr(SPLIT_ENDS[2])
SIZE0, SIZE1, SIZE2, SIZE3 = (tl.constexpr(size) for size in SPLIT_SIZES)
FIRST1 = tl.constexpr(SPLIT_ENDS[0] // SPLIT_SIZES[0])


@triton.jit
def split_of(position, END1: tl.constexpr):
    """Returns the split that a position belongs to."""
    FIRST2: tl.constexpr = FIRST1 + (END1 - END0) // SIZE1
    FIRST3: tl.constexpr = FIRST2 + (END2 - END1) // SIZE2
    late = tl.where(position < END2, FIRST2 + (position - END1) // SIZE2, FIRST3 + (position - END2) // SIZE3)
    return tl.where(
        position < END0, position // SIZE0, tl.where(position < END1, FIRST1 + (position - END0) // SIZE1, late)
    )


@triton.jit
def _split_start(split, END1: tl.constexpr):
    FIRST2: tl.constexpr = FIRST1 + (END1 - END0) // SIZE1
    FIRST3: tl.constexpr = FIRST2 + (END2 - END1) // SIZE2
    late = tl.where(split < FIRST3, END1 + (split - FIRST2) * SIZE2, END2 + (split - FIRST3) * SIZE3)
    return tl.where(split < FIRST1, split * SIZE0, tl.where(split < FIRST2, END0 + (split - FIRST1) * SIZE1, late))


@triton.jit
def _splits_before(position, END1: tl.constexpr):
    """Returns the number of splits that begin before a position."""
    return tl.where(position > 0, split_of(tl.maximum(position, 1) - 1, END1) + 1, 0)


@triton.jit
def share_of(turn, programs, count, keys, END1: tl.constexpr):
    """Returns one program's share of the splits 0 .. count - 1 of some keys, so that all programs finish together, as
    (high, highs, low, lows): `highs` splits from `high` downwards, and `lows` from `low` downwards.

    The largest splits come first, as many to each program as its room has; smaller ones fill the rooms, in descending
    order. A size divides the next, so no split crosses the border of two rooms. A first split of the largest size
    counts as what it has: else rooms were of that size as soon as a context reaches it.
    """
    FIRST2: tl.constexpr = FIRST1 + (END1 - END0) // SIZE1
    FIRST3: tl.constexpr = FIRST2 + (END2 - END1) // SIZE2
    begin = tl.where(count > FIRST3, FIRST3, tl.where(count > FIRST2, FIRST2, tl.where(count > FIRST1, FIRST1, 0)))
    below, large = _split_start(begin, END1), count - begin
    whole = _split_start(begin + 1, END1) - below
    unit = tl.where(begin > 0, below - _split_start(tl.maximum(begin, 1) - 1, END1), whole)
    size = tl.where(large == 1, tl.minimum((keys - below + unit - 1) // unit * unit, whole), whole)
    mean = (below + large * size + programs - 1) // programs
    room = tl.maximum((mean + unit - 1) // unit * unit, (large + programs - 1) // programs * size)
    most = room // size
    before = tl.minimum(turn * most, large)
    until = tl.minimum(before + most, large)
    low = _splits_before(below - tl.minimum(turn * room - before * size, below), END1)
    lows = low - _splits_before(below - tl.minimum((turn + 1) * room - until * size, below), END1)
    one = count <= programs  # a program for every split
    return (
        count - 1 - tl.where(one, turn, before), tl.where(one, (turn < count).to(tl.int32), until - before), low - 1,
        tl.where(one, 0, lows),
    )  # fmt: skip


@triton.jit
def _absorb_block(
    q_latents, q_rope, latents, rope, seen, peak, total, sums, scale, KIND: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """One step of the online softmax: keys in tiles [BLOCK, WIDTH] and [BLOCK, R], queries likewise [ROWS, .]."""
    scores = tl.dot(q_latents[0], latents[0].T)
    for tile in tl.static_range(1, len(latents)):
        scores = tl.dot(q_latents[tile], latents[tile].T, scores)
    scores = tl.dot(q_rope, rope.T, scores)
    scores = tl.where(seen, scores * scale, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    kept = tl.exp2(peak - safe)
    weights = tl.exp2(scores - safe[:, None])
    total = total * kept + tl.sum(weights, 1)
    weights = weights.to(KIND)
    if WIDE:
        weights = weights.to(tl.float32)
    out = ()
    for tile in tl.static_range(len(latents)):
        out = out + (tl.dot(weights, latents[tile], sums[tile] * kept[:, None]),)
    return higher, total, out


@triton.jit
def _tiles(desc, row, TILES: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """Returns rows from `row` on in tiles of WIDTH columns."""
    out = ()
    for tile in tl.static_range(TILES):
        out = out + (_widened(desc.load([row, tile * WIDTH]), WIDE),)
    return out


@triton.jit
def _unpacked_tiles(
    desc, row, scales, TILES: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Returns e4m3 rows from `row` on in bf16, exactly: scales, from addresses [BLOCK] on, are powers of two."""
    out = ()
    for tile in tl.static_range(TILES):
        values = desc.load([row, tile * WIDTH]).to(tl.float32) * tl.load(scales + tile)[:, None]
        out = out + (_widened(values.to(KIND), WIDE),)
    return out


@triton.jit
def _widened(x, WIDE: tl.constexpr):
    if WIDE:  # the interpreter cannot multiply bfloat16
        x = x.to(tl.float32)
    return x


@triton.jit
def start_of(length, sequence, PAGED: tl.constexpr):
    """Returns the number of committed slots of a sequence."""
    if PAGED:
        start = tl.load(length + sequence)
    else:
        start = tl.load(length)
    return start


@triton.jit
def paged_rows(slots, mask, pages, BLOCK: tl.constexpr):
    """Returns the rows, within a layer, of a sequence's slots; `pages` are the sequence's own."""
    return tl.load(pages + slots // BLOCK, mask=mask, other=0) + slots % BLOCK


@triton.jit(do_not_specialize=["each"])
def _gather_kernel(
    store,  # [rows of all layers, WORDS] int32
    length,  # [B] int32
    pages,  # [B, P] int32, used with PAGED
    page_count,  # P
    depths,  # [each] int32
    ancestors,  # [each, A] int32
    base,  # first row of the layer
    spare,  # first of the rows for tails
    columns,  # A
    each,  # nodes of a sequence
    PAGED: tl.constexpr,
    BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
    TAIL: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Copies a node's last keys in position order: from the last whole block of committed slots to its own."""
    follow(PDL)
    row = tl.program_id(0)
    sequence, node = row // each, row % each
    start = start_of(length, sequence, PAGED)
    whole = start // BLOCK * BLOCK
    at = whole + tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    lane = tl.arange(0, WIDE)
    held = at <= start + tl.load(depths + node)
    drafted = held & (at >= start)
    slot = tl.where(drafted, start + tl.load(ancestors + node * columns + at - start, mask=drafted, other=0), at)
    mask = held[:, None] & (lane < WORDS)[None, :]
    if PAGED:
        slot = paged_rows(slot, held, pages + sequence * page_count, BLOCK)
    # slots beyond are masked later, but a NaN would survive a weight of zero
    keys = tl.load(store + (base + slot).to(tl.int64)[:, None] * WORDS + lane[None, :], mask=mask, other=0)
    target = store + (spare + row * TAIL + at - whole).to(tl.int64)[:, None] * WORDS + lane[None, :]
    tl.store(target, keys, mask=(lane < WORDS)[None, :])


@triton.jit(do_not_specialize=["nodes", "deepest", "sequences"])
def _attend_kernel(
    q_latent_desc,  # [M H, W] in tiles [ROWS, WIDTH]
    q_rope_desc,  # [M H, W] in tiles [ROWS, R]
    latent_desc,  # [rows of all layers, C] as the queries, or e4m3, in tiles [BLOCK, WIDTH]
    rope_desc,  # [rows of all layers, R] in tiles [BLOCK, R]
    parts_desc,  # [S * padded, C] in tiles [ROWS, WIDTH]
    scales,  # [rows of all layers, ceil(C / 128)] float32, BYTES apart, used with PACKED
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
    PAGED: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    TAIL: tl.constexpr,
    BYTES: tl.constexpr,
    STAGES: tl.constexpr,
    CHAIN: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    END1: tl.constexpr,
    PDL: tl.constexpr,
):
    """Partial attention of a tile of ROWS node-head pairs over one split.

    All tiles read the blocks of committed slots. Then a chain's tile continues in the cache, where slots are positions;
    a tree's tile goes through the tails of its nodes one by one. For a node without keys in a split, the result is
    written but never read.
    """
    follow(PDL)
    GROUP: tl.constexpr = (ROWS + HEADS - 1) // HEADS  # nodes a tile
    TILES: tl.constexpr = C // WIDTH
    KIND: tl.constexpr = q_rope_desc.dtype
    in_block, lane = tl.arange(0, BLOCK), tl.arange(0, ROWS)
    tiles = padded // ROWS
    place, tile, q_row = tl.program_id(0) % tiles, tl.program_id(0) % tiles, (tl.program_id(0) % tiles) * ROWS
    sequence = 0
    if PAGED:  # no tile has nodes of two sequences
        sequence, tile = place // (tiles // sequences), place % (tiles // sequences)
        q_row = sequence * nodes * HEADS + tile * ROWS
        spare += sequence * nodes * TAIL
    start = start_of(length, sequence, PAGED)
    splits = split_of(start + deepest, END1) + 1
    whole = start // PAGE * PAGE
    # the long splits come first; programs past the last split have nothing to do
    split = splits - 1 - tl.program_id(0) // tiles
    if split < 0:
        return
    first, end = _split_start(split, END1), _split_start(split + 1, END1)
    node = (tile * ROWS + lane) // HEADS
    position = start + tl.load(depths + node, mask=node < nodes, other=0)
    q_latents = _tiles(q_latent_desc, q_row, TILES, WIDTH, WIDE)
    q_rope = _widened(q_rope_desc.load([q_row, C]), WIDE)
    peak = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    sums = ()
    for _ in tl.static_range(TILES):
        sums = sums + (tl.zeros((ROWS, WIDTH), dtype=tl.float32),)
    # the position of the pass's deepest node bounds the last block
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
        if PAGED:
            page = base + tl.load(pages + sequence * page_count + at0 // PAGE) + at0 % PAGE
            if CHAIN:
                key0 = page
            else:
                key0 = tl.where(block < shared, page, key0)
        if PACKED:
            its_scales = scales + (key0 + in_block).to(tl.int64) * (BYTES // 4)
            latents = _unpacked_tiles(latent_desc, key0, its_scales, TILES, WIDTH, KIND, WIDE)
        else:
            latents = _tiles(latent_desc, key0, TILES, WIDTH, WIDE)
        rope = _widened(rope_desc.load([key0, 0]), WIDE)
        seen = (at0 + in_block)[None, :] <= position[:, None]
        if not CHAIN and GROUP > 1:
            seen = seen & ((block < shared) | (node == node0 + member))[:, None]
        peak, total, sums = _absorb_block(q_latents, q_rope, latents, rope, seen, peak, total, sums, scale, KIND, WIDE)
    row = split * padded + place * ROWS
    tl.store(peaks + row + lane, peak)
    tl.store(totals + row + lane, total)
    for part in tl.static_range(TILES):
        parts_desc.store([row, part * WIDTH], sums[part].to(parts_desc.dtype))


@triton.jit(do_not_specialize=["each", "pairs"])
def _combine_kernel(
    parts,  # [S, padded, C]
    peaks,  # [S, padded] float32
    totals,  # [S, padded] float32
    length,  # [B] int32
    depths,  # [each] int32
    out,  # [M, H, C] bf16 or fp16
    count,  # padded
    each,  # nodes of a sequence
    pairs,  # of a sequence, in whole tiles
    PAGED: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    END1: tl.constexpr,
    PDL: tl.constexpr,
):
    """Adds a row's splits, CHUNK at a time in ascending order; one warp, so that a column is summed by one thread."""
    follow(PDL)
    node, head = tl.program_id(0), tl.program_id(1)
    row, place = node * HEADS + head, node
    if PAGED:
        sequence, place = node // each, node % each
        row = sequence * pairs + place * HEADS + head
        length += sequence
    splits = split_of(tl.load(length) + tl.load(depths + place), END1) + 1
    chunk, column = tl.arange(0, CHUNK), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    peak, total = float("-inf"), 0.0
    acc = tl.zeros((COLUMNS,), dtype=tl.float32)
    # most contexts have one chunk: issue all its loads before the first number is needed
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
    tl.store(out + (node * tl.num_programs(1) + head).to(tl.int64) * C + column, acc.to(out.dtype.element_ty))
