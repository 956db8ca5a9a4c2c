"""Matrix products y = a @ w.T for few rows: block-scaled FP8 (1x128 by 128x128) and bfloat16.

Block scales are those of the DeepSeek-V3 report (2412.19437, section 3.3). Decode, draft and verify multiply 1 to 64
rows by matrices that are read once, so the time is bytes of weights over bandwidth:

- Operands are swapped. wgmma needs 64 rows on one side and takes 8 to 256 on the other; the weights are the wide side.
- K is split over programs if the matrix has too few row blocks to keep all multiprocessors reading. The last program
  to finish adds the parts in ascending order, so the sum does not depend on which one that was.
- Sums leave the tensor core every 128 of K, where the scales change, and go on in float32.

A row's bits depend only on its own numbers: tiles, splits and order are chosen by (N, K), never by the rows. More rows
are more tiles, scheduled next to each other so that they share weights in the cache. Many rows on Hopper are limited by
arithmetic and have a kernel of their own (`gemm_hopper`), with the same order of sums and the same bits.

Legend: `M` rows, `N` outputs, `K` inputs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from mtp_spec.kernels import fp8, ordered
from mtp_spec.kernels.checks import FLOATS, expect
from mtp_spec.kernels.direct import described, enqueue
from mtp_spec.kernels.fp8 import BLOCK
from mtp_spec.kernels.launching import (
    MULTIPROCESSORS,
    hopper_module,
    interpreted,
    late,
    on_hopper,
    runs_triton,
    stages_that_fit,
    tuned_name,
)
from mtp_spec.kernels.workspace import Workspace

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    from mtp_spec.kernels.launching import EARLY, call_at, pull
except ImportError:  # no Triton for this platform: the references remain
    triton = None

ROW_TILES = (16, 32, 64)
# Hopper has a kernel of its own for more rows than this, with the same bits, if that has so many tiles of 128 by 128:
# with fewer, too many multiprocessors have none (on an H200 it is level at 23 in FP8, at 50 in 16 bits)
MANY_ROWS, MANY_TILES, MANY_TILES_16 = 64, 24, 56
PARTS, ARRIVALS = Workspace(torch.float32), Workspace(torch.int32, zeros=True)


@dataclass(frozen=True, slots=True)
class Launch:
    """How the product with an `[N, K]` matrix runs.

    Attributes:
        tile: outputs per program, 64 or 128.
        splits: parts of K. Part of the arithmetic.
        stages: steps of K in flight.
        warps: warps per program.
        unroll: blocks of 128 of K per step.
        ahead: blocks of K that a program prefetches into the cache while the previous kernel still runs.
        call: blocks of K before its end at which a program lets the next kernel launch; 0 for at once. What that kernel
            prefetches into the cache must still be there when this one ends.
    """

    tile: int = 64
    splits: int = 1
    stages: int = 4
    warps: int = 4
    unroll: int = 1
    ahead: int = 8
    call: int = 0


@lru_cache
def default_launch(outputs: int, inputs: int, kind: str = "fp8", part: int | None = None) -> Launch:
    """Returns the launch that `mtp-spec bench kernels --tune` found for a shape ("fp8" or "bf16"), else one by rule.

    The rule splits K until there are two programs per multiprocessor, as long as each has four blocks of K.

    Args:
        part: outputs of this rank's part of the matrix, if ranks share it. K is cut as for the whole, so that the bits
            are the same; the rest may be tuned for the part.
    """
    if part is not None and part != outputs:
        whole, own = default_launch(outputs, inputs, kind), default_launch(part, inputs, kind)
        return own if own.splits == whole.splits else whole
    tuned: dict[str, dict[str, int]] = json.loads((Path(__file__).parent / "tuned" / "gemm.json").read_text())
    found = tuned.get(tuned_name(outputs, inputs, kind))
    if found is not None:
        return Launch(**found)
    tiles, blocks = -(-outputs // 64), -(-inputs // BLOCK)
    splits = 1
    while tiles * splits < 2 * MULTIPROCESSORS and blocks // (2 * splits) >= 4:
        splits *= 2
    return Launch(splits=splits)


if triton is not None:

    @triton.jit(do_not_specialize=["m"])
    def _gemm_kernel(
        w_desc,  # [N, K] e4m3 or bf16, tiles [TILE, 128]
        w,  # the same, for prefetching into the cache
        a_desc,  # [M, K] e4m3 or bf16, tiles [ROWS, 128]
        w_scale,  # [ceil(N / 128), ceil(K / 128)] float32, used with SCALED
        a_scale,  # [M, ceil(K / 128)] float32, used with SCALED
        out,  # [M, N]
        parts,  # [SPLITS, tiles, TILE, ROWS] float32, unused without splits
        arrivals,  # [tiles] int32, zero before and after
        m,
        n,
        k,
        TILE: tl.constexpr,
        ROWS: tl.constexpr,
        SPLITS: tl.constexpr,
        STAGES: tl.constexpr,
        UNROLL: tl.constexpr,
        AHEAD: tl.constexpr,
        CALL: tl.constexpr,
        SCALED: tl.constexpr,
        WIDE: tl.constexpr,
        PDL: tl.constexpr,
    ):
        row_tiles = tl.cdiv(m, ROWS)
        place, split = tl.program_id(0), tl.program_id(1)
        tile, row_tile = place // row_tiles, place % row_tiles
        k_blocks = tl.cdiv(k, 128)
        each = tl.cdiv(k_blocks, SPLITS)
        first = split * each
        last = tl.minimum(first + each, k_blocks)
        w_scale_row = w_scale + (tile * TILE // 128) * k_blocks
        if PDL:
            if CALL == 0:
                gdc_launch_dependents()
            if AHEAD > 0 and split * tl.num_programs(0) + place < EARLY:
                pull(w, tile * TILE, first, n, k, TILE, AHEAD)
            gdc_wait()  # before any read, and before `out`, `parts` and `arrivals` are written
        lane = tl.arange(0, ROWS)
        rows = row_tile * ROWS + lane
        columns = tile * TILE + tl.arange(0, TILE)
        a_scale_rows = a_scale + rows.to(tl.int64) * k_blocks
        total = tl.zeros((TILE, ROWS), dtype=tl.float32)
        for block in tl.range(first, last, num_stages=STAGES, loop_unroll_factor=UNROLL):
            if PDL and CALL > 0:
                call_at(block, tl.maximum(last - CALL, first))
            weights = w_desc.load([tile * TILE, block * 128])
            a = a_desc.load([row_tile * ROWS, block * 128])
            if WIDE:  # the interpreter cannot multiply bfloat16
                weights = weights.to(tl.float32)
                a = a.to(tl.float32)
            if SCALED:
                scale = tl.load(a_scale_rows + block, mask=rows < m, other=0.0) * tl.load(w_scale_row + block)
                total += tl.dot(weights, a.T) * scale[None, :]
            else:
                total = tl.dot(weights, a.T, total)
        kept = (rows < m)[None, :] & (columns < n)[:, None]
        places = out + rows[None, :].to(tl.int64) * n + columns[:, None]
        if SPLITS == 1:
            tl.store(places, total.to(out.dtype.element_ty), mask=kept)
        else:
            inside = tl.arange(0, TILE)[:, None] * ROWS + lane[None, :]
            part = parts + (split * tl.num_programs(0) + place).to(tl.int64) * (TILE * ROWS)
            tl.store(part + inside, total)
            tl.debug_barrier()  # all threads' stores must precede the one thread's arrival
            if tl.atomic_add(arrivals + place, 1, sem="acq_rel") == SPLITS - 1:
                tl.debug_barrier()
                summed = tl.zeros((TILE, ROWS), dtype=tl.float32)
                for other in range(SPLITS):
                    part = parts + (other * tl.num_programs(0) + place).to(tl.int64) * (TILE * ROWS)
                    summed += tl.load(part + inside, volatile=True)
                tl.store(places, summed.to(out.dtype.element_ty), mask=kept)
                tl.store(arrivals + place, 0)


def fp8_gemm(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    launch: Launch | None = None,
) -> Tensor:
    """Returns a @ w.T `[M, N]`; CPU tensors use the reference, except in Triton's interpreter.

    Args:
        a: `[M, K]` e4m3 with scales `[M, ceil(K / 128)]` float32.
        w: `[N, K]` e4m3 with scales `[ceil(N / 128), ceil(K / 128)]` float32; K a multiple of 16.
        out: written and returned, if given.

    Raises:
        ValueError: shapes that do not fit.
    """
    rows, outputs = _check(a, w)
    blocks = -(-w.shape[1] // BLOCK)
    expect("a_scale", a_scale, (rows, blocks), torch.float32, beside=a)
    expect("w_scale", w_scale, (-(-outputs // BLOCK), blocks), torch.float32, beside=a)
    if out is None:
        out = torch.empty(rows, outputs, dtype=dtype, device=a.device)
    expect("out", out, (rows, outputs), FLOATS, beside=a)
    if not runs_triton(a):
        return out.copy_(fp8_gemm_reference(a, a_scale, w, w_scale))
    return _launch(a, w, a_scale, w_scale, out, launch or default_launch(outputs, w.shape[1]))


def bf16_gemm(
    a: Tensor, w: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.bfloat16, launch: Launch | None = None
) -> Tensor:
    """Returns a @ w.T `[M, N]` of bfloat16 a `[M, K]` and w `[N, K]`, K a multiple of 8; sums in float32.

    Raises:
        ValueError: shapes that do not fit.
    """
    rows, outputs = _check(a, w)
    if out is None:
        out = torch.empty(rows, outputs, dtype=dtype, device=a.device)
    expect("out", out, (rows, outputs), FLOATS, beside=a)
    if not runs_triton(a):
        return out.copy_(bf16_gemm_reference(a, w))
    return _launch(a, w, None, None, out, launch or default_launch(outputs, w.shape[1], "bf16"))


def fp8_gemm_reference(a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """`fp8_gemm` in plain torch, float32."""
    return fp8.fp8_gemm(a, a_scale, w, w_scale)


def bf16_gemm_reference(a: Tensor, w: Tensor) -> Tensor:
    """`bf16_gemm` in plain torch, float32."""
    return ordered.products(a.float(), w.float())


def _launch(
    a: Tensor, w: Tensor, a_scale: Tensor | None, w_scale: Tensor | None, out: Tensor, launch: Launch
) -> Tensor:
    (rows, inputs), outputs = a.shape, w.shape[0]
    if (
        many_rows(rows, outputs, w_scale is not None)
        and on_hopper(a.device)
        and outputs * out.element_size() % 16 == 0
        and hopper_module("gemm_hopper")
    ):
        hopper_module("gemm_hopper").gemm(a, w, a_scale, w_scale, out, launch.splits, MULTIPROCESSORS)
        return out
    row_tile = next((size for size in ROW_TILES if rows <= size), ROW_TILES[-1])
    tiles = -(-outputs // launch.tile) * -(-rows // row_tile)
    step = launch.unroll * BLOCK * a.element_size() * (launch.tile + row_tile)
    enqueue(
        _gemm_kernel,
        (tiles, launch.splits),
        described(w, launch.tile, BLOCK),
        w,
        described(a, row_tile, BLOCK),
        w if w_scale is None else w_scale,
        a if a_scale is None else a_scale,
        out,
        PARTS.room(a.device, launch.splits * tiles * launch.tile * row_tile),
        ARRIVALS.room(a.device, tiles),
        rows,
        outputs,
        inputs,
        TILE=launch.tile,
        ROWS=row_tile,
        SPLITS=launch.splits,
        STAGES=stages_that_fit(launch.stages, step, a.device),
        UNROLL=launch.unroll,
        AHEAD=launch.ahead,
        CALL=launch.call,
        SCALED=w_scale is not None,
        WIDE=w_scale is None and interpreted(),
        num_warps=launch.warps,
        **late(a),
    )
    return out


def many_rows(rows: int, outputs: int, packed: bool) -> bool:
    """Whether Hopper's kernel for many rows is faster than the one for few; `packed`: in FP8."""
    halves = -(-rows // 64) * -(-outputs // 128)  # tiles of 64 rows
    return rows > MANY_ROWS and halves >= 2 * (MANY_TILES if packed else MANY_TILES_16)


def _check(a: Tensor, w: Tensor) -> tuple[int, int]:
    if a.ndim != 2 or w.ndim != 2 or a.shape[1] != w.shape[1]:
        raise ValueError(f"a {tuple(a.shape)} and w {tuple(w.shape)} differ in their inner size")
    if a.dtype != w.dtype:
        raise ValueError(f"a is {a.dtype} and w is {w.dtype}: both e4m3 or both bfloat16 expected")
    if a.shape[0] < 1:
        raise ValueError("no rows given")
    if a.shape[1] * a.element_size() % 16:
        raise ValueError(f"inner size {a.shape[1]}: rows must be whole multiples of 16 bytes")
    expect("a", a, a.shape)
    expect("w", w, w.shape, beside=a)
    return a.shape[0], w.shape[0]
