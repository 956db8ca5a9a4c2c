"""Products, norms and rotation around MLA's attention as Triton kernels; imported by `attention` with Triton.

Every number of a row is computed as if the row were alone.

Legend: as in `attention`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mtp_spec.kernels.launching import follow, pull
from mtp_spec.kernels.mla.kernels import paged_rows, start_of
from mtp_spec.kernels.quant import _store_quantised, block_scaled


@triton.jit
def _rotated(source, table, position, mask, R: tl.constexpr, WIDE_R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Returns rows [ROWS, R] at addresses `source` [ROWS, 1], rotated by their positions [ROWS, 1], float32."""
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


@triton.jit(do_not_specialize=["each"])
def _prepare_kernel(
    down,  # [M, A_ROWS + C + R] bf16 or fp16: the fused down-projection
    q_norm,  # [A_ROWS], used with LORA
    kv_norm,  # [C]
    table,  # [L, 2, R] float32
    length,  # [B] int32
    pages,  # [B, P] int32, used with PAGED
    page_count,  # P
    depths,  # [each] int32
    slots,  # [each] int32
    out,  # [M, A_ROWS] e4m3, or as `down` without QUANTISE; used with LORA
    scales,  # [M, ceil(A_ROWS / 128)] float32, used with QUANTISE
    latents,  # [rows of all layers, C] as `down`, or e4m3, BYTES apart like the two below
    ropes,  # [., R] as `down`
    latent_scales,  # [., ceil(C / 128)] float32, used with PACKED
    base,  # first row of the layer
    offset,
    eps,
    each,  # rows of a sequence
    PAGED: tl.constexpr,
    A_ROWS: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE_A: tl.constexpr,
    WIDE_C: tl.constexpr,
    WIDE_R: tl.constexpr,
    BYTES: tl.constexpr,
    LORA: tl.constexpr,
    QUANTISE: tl.constexpr,
    PACKED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    POWER: tl.constexpr,
    LARGEST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Norms both latents: quantises the query's if wanted, writes the key's to the cache with its rotated part."""
    follow(PDL)
    row = tl.program_id(0)
    source = down + row.to(tl.int64) * (A_ROWS + C + R)
    if tl.program_id(1) == 0:
        start = start_of(length, row // each, PAGED)
        place = row % each
        if PAGED:
            slot = start + tl.load(slots + place)
            at = (base + paged_rows(slot, slot >= 0, pages + row // each * page_count, BLOCK)).to(tl.int64)
        else:
            at = (base + start + tl.load(slots + place)).to(tl.int64)
        lane = tl.arange(0, WIDE_C)
        normed = _normed(source + A_ROWS, kv_norm, eps, C, WIDE_C)
        if PACKED:
            scaled, scale = block_scaled(tl.reshape(normed.to(tl.float32), (WIDE_C // 128, 128)), LARGEST, True)
            block = tl.arange(0, WIDE_C // 128)
            tl.store(latent_scales + at * (BYTES // 4) + block, scale, mask=block * 128 < C)
            packed = tl.reshape(scaled, (WIDE_C,)).to(latents.dtype.element_ty)
            tl.store(latents + at * BYTES + lane, packed, mask=lane < C)
        else:
            tl.store(latents + at * (BYTES // 2) + lane, normed, mask=lane < C)
        position = start + offset + tl.load(depths + place) + tl.zeros((1, 1), dtype=tl.int32)
        turned = _rotated(source + A_ROWS + C, table, position, position >= 0, R, WIDE_R, INTERLEAVED)
        lane_r = tl.arange(0, WIDE_R)[None, :]
        tl.store(ropes + at * (BYTES // 2) + lane_r, turned.to(ropes.dtype.element_ty), mask=lane_r < R)
    elif LORA:
        values = _normed(source, q_norm, eps, A_ROWS, WIDE_A)
        if QUANTISE:
            blocks: tl.constexpr = (A_ROWS + 127) // 128
            _store_quantised(values.to(tl.float32), row, 0, out, scales, A_ROWS, blocks, WIDE_A, POWER, LARGEST)
        else:
            lane_a = tl.arange(0, WIDE_A)
            tl.store(out + row.to(tl.int64) * A_ROWS + lane_a, values, mask=lane_a < A_ROWS)


@triton.jit
def _normed(source, weight, eps, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """Returns the RMS norm of SIZE numbers in their type, rounded before and after the weight, as the model does."""
    lane = tl.arange(0, WIDE)
    kind: tl.constexpr = source.dtype.element_ty
    x = tl.load(source + lane, mask=lane < SIZE, other=0.0).to(tl.float32)
    normed = (x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)).to(kind).to(tl.float32)
    return (tl.load(weight + lane, mask=lane < SIZE, other=0.0).to(tl.float32) * normed).to(kind)


@triton.jit
def _up_weight(
    kv_b, kv_b_scale, row, row_mask, first, SIZE: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr,
    PACKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Returns SIZE columns of kv_b's rows, inside one block of 128, in type KIND, dequantised if they are e4m3."""
    column = first + tl.arange(0, SIZE)
    mask = row_mask[:, None] & (column < C)[None, :]
    w = tl.load(kv_b + row.to(tl.int64)[:, None] * C + column[None, :], mask=mask, other=0.0)
    if PACKED:
        blocks: tl.constexpr = (C + 127) // 128
        scale = tl.load(kv_b_scale + row // 128 * blocks + first // 128, mask=row_mask, other=0.0)
        w = w.to(tl.float32) * scale[:, None]
    w = w.to(KIND)
    if WIDE:  # the interpreter cannot multiply bfloat16
        w = w.to(tl.float32)
    return w


@triton.jit(do_not_specialize=["rows", "each"])
def _absorb_kernel(
    q,  # [M, H, N + R] bf16 or fp16, rows `stride` apart
    kv_b,  # [H (N + V), C]
    kv_b_scale,
    table,  # [L, 2, R] float32
    length,  # [B] int32
    depths,  # [each] int32
    out,  # [M, padded H, W] as `q`
    rows,
    stride,
    offset,
    heads,  # of the output, padded
    each,  # rows of a sequence
    PAGED: tl.constexpr,
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
    """q_latent = q_nope @ W_UK for 128 columns of one head; one more program per head rotates q_rope.

    Weights, which no kernel writes, are read before the queries are ready.
    """
    head, part = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
    lane = tl.arange(0, ROWS)
    if part == tl.num_programs(1) - 1:
        if PDL:
            gdc_wait()
        start = tl.load(length) + offset
        for first in range(0, rows, ROWS):
            row = first + lane
            real = row < rows
            if PAGED:
                its_start = tl.load(length + row // each, mask=real, other=0) + offset
                position = its_start + tl.load(depths + row % each, mask=real, other=0)
            else:
                position = start + tl.load(depths + row, mask=real, other=0)
            source = q + row.to(tl.int64) * stride + head * (N + R) + N
            turned = _rotated(source[:, None], table, position[:, None], real[:, None], R, WIDE_R, INTERLEAVED)
            lane_r = tl.arange(0, WIDE_R)[None, :]
            target = out + (row.to(tl.int64) * heads + head)[:, None] * (C + R) + C + lane_r
            tl.store(target, turned.to(out.dtype.element_ty), mask=real[:, None] & (lane_r < R))
    else:
        inner = tl.arange(0, WIDE_N)
        column = part * 128 + tl.arange(0, 128)
        kind: tl.constexpr = q.dtype.element_ty
        w = _up_weight(kv_b, kv_b_scale, head * (N + V) + inner, inner < N, part * 128, 128, C, kind, PACKED, WIDE)
        if PDL:
            gdc_wait()
        for first in range(0, rows, ROWS):
            row = first + lane
            source = q + row.to(tl.int64)[:, None] * stride + head * (N + R) + inner[None, :]
            x = tl.load(source, mask=(row < rows)[:, None] & (inner < N)[None, :], other=0.0)
            if WIDE:
                x = x.to(tl.float32)
            target = out + (row.to(tl.int64) * heads + head)[:, None] * (C + R) + column[None, :]
            tl.store(target, tl.dot(x, w).to(kind), mask=(row < rows)[:, None] & (column < C)[None, :])


@triton.jit
def _up_input(context, row, real, heads, head, first, SIZE: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr):
    """Returns SIZE columns of one head's context [SIZE, ROWS]."""
    column = first + tl.arange(0, SIZE)
    source = context + (row.to(tl.int64) * heads + head)[None, :] * C + column[:, None]
    x = tl.load(source, mask=real[None, :] & (column < C)[:, None], other=0.0)
    if WIDE:
        x = x.to(tl.float32)
    return x


@triton.jit(do_not_specialize=["rows"])
def _up_kernel(
    context,  # [M, H, C] bf16 or fp16
    kv_b,
    kv_b_scale,
    out,  # [M, H V] as `context`, or e4m3 with QUANTISE
    scales,  # [M, H V / 128] float32, used with QUANTISE
    rows,
    heads,
    N: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    VALUES: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    PACKED: tl.constexpr,
    QUANTISE: tl.constexpr,
    POWER: tl.constexpr,
    LARGEST: tl.constexpr,
    WIDE: tl.constexpr,
    HELD: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = context @ W_UV.T for VALUES of one head, quantised if they are a whole block of the next product.

    With HELD, weights, which no kernel writes, are read before the context is ready and kept for all rows.
    """
    head = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
    first_value = tl.program_id(1) * VALUES
    value = first_value + tl.arange(0, VALUES)
    kind: tl.constexpr = context.dtype.element_ty
    its = head * (N + V) + N + value
    weights = ()
    if HELD:
        for chunk in tl.static_range(0, C, CHUNK):
            w = _up_weight(kv_b, kv_b_scale, its, value < V, chunk, CHUNK, C, kind, PACKED, WIDE)
            weights = weights + (w,)  # type: ignore[assignment]
    if PDL:
        if not HELD:
            pull(kv_b, head * (N + V) + N + first_value, 0, heads * (N + V), C, VALUES, (C + 127) // 128)
        gdc_wait()
    lane = tl.arange(0, ROWS)
    for first in range(0, rows, ROWS):
        row = first + lane
        real = row < rows
        total = tl.zeros((VALUES, ROWS), dtype=tl.float32)
        if HELD:
            for part in tl.static_range(C // CHUNK):
                x = _up_input(context, row, real, heads, head, part * CHUNK, CHUNK, C, WIDE)
                total = tl.dot(weights[part], x, total)
        else:
            for chunk in tl.range(0, C, CHUNK):
                w = _up_weight(kv_b, kv_b_scale, its, value < V, chunk, CHUNK, C, kind, PACKED, WIDE)
                x = _up_input(context, row, real, heads, head, chunk, CHUNK, C, WIDE)
                total = tl.dot(w, x, total)
        kept = real[None, :] & (value < V)[:, None]
        target = out + row.to(tl.int64)[None, :] * (heads * V) + head * V + value[:, None]
        values = total.to(kind)
        if QUANTISE:
            wide = values.to(tl.float32)
            scale = tl.max(tl.abs(wide), axis=0) / LARGEST
            if POWER:
                scale = tl.exp2(tl.ceil(tl.log2(scale)))
            scale = tl.where(scale > 0, scale, 1.0)
            # rounding can push the quotient past the largest value
            every: tl.constexpr = tl.PropagateNan.ALL
            least = tl.maximum(wide / scale[None, :], -LARGEST, propagate_nan=every)
            scaled = tl.minimum(least, LARGEST, propagate_nan=every)
            tl.store(target, scaled.to(out.dtype.element_ty), mask=kept)
            block = (head * V) // 128 + tl.program_id(1)
            tl.store(scales + row * (heads * V // 128) + block, scale, mask=real)
        else:
            tl.store(target, values, mask=kept)
