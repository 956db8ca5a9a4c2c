"""Which splits a program of Hopper's attention takes, and where their blocks lie.

Legend: as in `attention`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mtp_spec.kernels.mla.kernels import _split_start as _split_start_of
from mtp_spec.kernels.mla.kernels import share_of as _share_of
from mtp_spec.kernels.mla.kernels import split_of as _split_of

_split_start = gluon.jit(_split_start_of.fn)
share_of = gluon.jit(_share_of.fn)
split_of = gluon.jit(_split_of.fn)


@gluon.jit
def split_at(number, splits, FEW: gl.constexpr):
    """Returns a program's split of a number: with FEW, of `share_of`'s splits, which are numbered from 0 on."""
    _, _, _, high, highs, low = splits
    if FEW:
        return gl.where(number < highs, high - number, low + highs - number)
    return number


@gluon.jit
def walk_of(split, place, ROWS: gl.constexpr, BLOCK: gl.constexpr, HEADS: gl.constexpr, CHAIN: gl.constexpr,
            END1: gl.constexpr):  # fmt: skip
    """Returns how a tile walks one split, as `block_at` takes it, and the number of blocks."""
    start, deepest, nodes, tile, base, spare, _, _ = place
    first, end = _split_start(split, END1), _split_start(split + 1, END1)
    last = gl.minimum(end, start + deepest + 1)
    whole = start // BLOCK * BLOCK
    shared = gl.maximum(gl.cdiv(last - first, BLOCK), 0)
    own, blocks, tail, node0 = 1, shared, first, tile * ROWS // HEADS
    if not CHAIN:
        tail = gl.maximum(first, whole)
        shared = gl.maximum(gl.minimum(end, whole) - first, 0) // BLOCK
        own = gl.maximum(gl.cdiv(last - tail, BLOCK), 0)
        blocks = shared + own * gl.minimum((ROWS + HEADS - 1) // HEADS, nodes - node0)
    return (first, shared, own, tail, whole, base, spare, node0), blocks


@gluon.jit
def block_at(block, walk, BLOCK: gl.constexpr, TAIL: gl.constexpr, CHAIN: gl.constexpr):
    """Returns a block's first position, its first row in the store, and the node whose tail it is (shared: any)."""
    first, shared, own, tail, whole, base, spare, node0 = walk
    at = first + block * BLOCK
    if CHAIN:
        return at, base + at, 0
    late = gl.maximum(block - shared, 0)
    member = late // gl.maximum(own, 1)
    at = gl.where(block < shared, at, tail + (late - member * own) * BLOCK)
    row = gl.where(block < shared, base + at, spare + (node0 + member) * TAIL + at - whole)
    return at, row, member


@gluon.jit
def paged_row(block, walk, pages, row, at, BLOCK: gl.constexpr, CHAIN: gl.constexpr):
    """Returns a block's first row in the store if slots are in pages; `block_at` assumes contiguous slots."""
    paged = walk[5] + gl.load(pages + at // BLOCK)
    if CHAIN:
        return paged
    return gl.where(block < walk[1], paged, row)
