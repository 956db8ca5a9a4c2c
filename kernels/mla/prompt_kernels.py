"""Inputs of a prompt's attention as Triton kernels; imported by `prompt` with Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from mtp_spec.kernels.launching import follow
from mtp_spec.kernels.mla.kernels import paged_rows
from mtp_spec.kernels.mla.row_kernels import _rotated


@triton.jit(do_not_specialize=["count"])
def _gather_kernel(
    latents,  # the store's, BYTES apart
    ropes,  # likewise
    latent_scales,  # likewise, used with PACKED
    pages,  # [P] int32, used with PAGED
    base,  # first row of the layer
    out,  # [count, C] bf16 or fp16
    out_ropes,  # [count, R] likewise
    count,
    PAGED: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    BYTES: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Puts the first `count` slots of a sequence next to each other, in 16 bits."""
    follow(PDL)
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = slot < count
    at = base + slot
    if PAGED:
        at = base + paged_rows(slot, real, pages, BLOCK)
    at = at.to(tl.int64)[:, None]
    column, mask = tl.arange(0, C)[None, :], real[:, None]
    if PACKED:
        values = tl.load(latents + at * BYTES + column, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(latent_scales + at * (BYTES // 4) + column // 128, mask=mask, other=0.0)
        values = (values * scale).to(out.dtype.element_ty)
    else:
        values = tl.load(latents + at * (BYTES // 2) + column, mask=mask, other=0.0)
    target = slot.to(tl.int64)[:, None]
    tl.store(out + target * C + column, values, mask=mask)
    column = tl.arange(0, R)[None, :]
    values = tl.load(ropes + at * (BYTES // 2) + column, mask=mask, other=0.0)
    tl.store(out_ropes + target * R + column, values, mask=mask)


@triton.jit(do_not_specialize=["start", "rows"])
def _turn_kernel(
    q,  # [M, H (N + R)] bf16 or fp16, rows `stride` apart
    table,  # [L, 2, R] float32
    rows,
    heads,
    stride,
    start,  # position of row 0
    N: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rotates the last R columns of every head, in place."""
    follow(PDL)
    pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, real = pair // heads, pair < rows * heads
    source = q + row.to(tl.int64) * stride + pair % heads * (N + R) + N
    turned = _rotated(source[:, None], table, start + row[:, None], real[:, None], R, R, INTERLEAVED)
    tl.debug_barrier()  # threads read one another's numbers
    tl.store(source[:, None] + tl.arange(0, R)[None, :], turned.to(q.dtype.element_ty), mask=real[:, None])


@triton.jit
def _widen_kernel(
    w,  # [N, K] e4m3
    scale,  # [ceil(N / 128), ceil(K / 128)] float32
    out,  # [N, K] bf16 or fp16
    n,
    k,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = w times its scales."""
    follow(PDL)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * 128 + tl.arange(0, 128)
    mask = (row < n)[:, None] & (column < k)[None, :]
    at = row.to(tl.int64)[:, None] * k + column[None, :]
    factor = tl.load(scale + tl.program_id(0) * BLOCK // 128 * tl.cdiv(k, 128) + tl.program_id(1))
    values = tl.load(w + at, mask=mask, other=0.0).to(tl.float32) * factor
    tl.store(out + at, values.to(out.dtype.element_ty), mask=mask)
