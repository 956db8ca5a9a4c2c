"""Block-scaled FP8 matrix product for few rows: y = a @ w.T, activations 1x128, weights 128x128.

Reference: `fp8.fp8_gemm` (DeepSeek-V3 report, 2412.19437, section 3.3). Decode, draft and verify multiply 1 to 64 rows
with matrices that are read once, so that time is bytes of weights over bandwidth:

- Operands are swapped. wgmma wants 64 rows on one side and takes 8 to 256 on the other; the weights are the wide side.
- K is split over programs where the matrix has too few row blocks to keep all multiprocessors reading. The last
  program to arrive adds the parts in ascending order, so the sum does not depend on which one that was.
- Sums leave the tensor core every 128 of K, where the scales change, and go on in float32.

A row's bits depend on its own numbers only: tiles, splits and order are chosen by (N, K), never by the rows.

Legend: `M` rows, `N` outputs, `K` inputs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_spec.kernels.fp8 import BLOCK
from mtp_spec.kernels.fp8 import fp8_gemm as reference

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton for this platform: the references remain
    triton = None

MOST_ROWS = 64
ROW_TILES = (16, 32, 64)
MULTIPROCESSORS = 132  # of an H100 or H200; a number of splits is part of the arithmetic, so it is fixed


@dataclass(frozen=True, slots=True)
class Launch:
    """How the product with an `[N, K]` matrix runs.

    Attributes:
        tile: outputs a program, 64 or 128.
        splits: parts of K. Part of the arithmetic.
        stages: tiles in flight.
        warps: a program.
    """

    tile: int = 64
    splits: int = 1
    stages: int = 4
    warps: int = 4


@lru_cache
def default_launch(outputs: int, inputs: int) -> Launch:
    """Returns what `mtp-spec bench kernels --tune` found for a shape, else a launch by rule.

    The rule splits K until there are two programs a multiprocessor, as long as each has four blocks of K.
    """
    tuned: dict[str, dict[str, int]] = json.loads((Path(__file__).parent / "tuned" / "gemm.json").read_text())
    found = tuned.get(f"{outputs}x{inputs}")
    if found is not None:
        return Launch(**found)
    tiles, blocks = -(-outputs // 64), -(-inputs // BLOCK)
    splits = 1
    while tiles * splits < 2 * MULTIPROCESSORS and blocks // (2 * splits) >= 4:
        splits *= 2
    return Launch(splits=splits)


if triton is not None:

    @triton.jit
    def _few_rows_kernel(
        w_desc,  # [N, K] e4m3, tiles [TILE, 128]
        a_desc,  # [M, K] e4m3, tiles [ROWS, 128]
        w_scale,  # [ceil(N / 128), ceil(K / 128)] float32
        a_scale,  # [M, ceil(K / 128)] float32
        out,  # [M, N]
        parts,  # [SPLITS, ceil(N / TILE), TILE, ROWS] float32, unused without splits
        arrivals,  # [ceil(N / TILE)] int32, zero before and after
        m,
        n,
        k_blocks,
        TILE: tl.constexpr,
        ROWS: tl.constexpr,
        SPLITS: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        tile, split = tl.program_id(0), tl.program_id(1)
        each = tl.cdiv(k_blocks, SPLITS)
        first = split * each
        last = tl.minimum(first + each, k_blocks)
        rows = tl.arange(0, ROWS)
        columns = tile * TILE + tl.arange(0, TILE)
        w_scale_row = w_scale + (tile * TILE // 128) * k_blocks
        a_scale_rows = a_scale + rows * k_blocks
        total = tl.zeros((TILE, ROWS), dtype=tl.float32)
        for block in tl.range(first, last, num_stages=STAGES):
            w = w_desc.load([tile * TILE, block * 128])
            a = a_desc.load([0, block * 128])
            scale = tl.load(a_scale_rows + block, mask=rows < m, other=0.0) * tl.load(w_scale_row + block)
            total += tl.dot(w, a.T) * scale[None, :]
        kept = (rows < m)[None, :] & (columns < n)[:, None]
        places = out + rows[None, :].to(tl.int64) * n + columns[:, None]
        if SPLITS == 1:
            tl.store(places, total.to(out.dtype.element_ty), mask=kept)
        else:
            inside = tl.arange(0, TILE)[:, None] * ROWS + rows[None, :]
            part = parts + (split * tl.num_programs(0) + tile) * (TILE * ROWS)
            tl.store(part + inside, total)
            tl.debug_barrier()  # all threads' stores come before the one thread's arrival
            if tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == SPLITS - 1:
                tl.debug_barrier()
                summed = tl.zeros((TILE, ROWS), dtype=tl.float32)
                for other in range(SPLITS):
                    part = parts + (other * tl.num_programs(0) + tile) * (TILE * ROWS)
                    summed += tl.load(part + inside, volatile=True)
                tl.store(places, summed.to(out.dtype.element_ty), mask=kept)
                tl.store(arrivals + tile, 0)


def few_rows(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    launch: Launch | None = None,
) -> Tensor:
    """Returns a @ w.T `[M, N]` for 1 to 64 rows; CPU tensors take the reference unless Triton interprets.

    Args:
        a: `[M, K]` e4m3 with scales `[M, ceil(K / 128)]` float32.
        w: `[N, K]` e4m3 with scales `[ceil(N / 128), ceil(K / 128)]` float32; K a multiple of 16.
        out: written and returned, if given.

    Raises:
        ValueError: shapes that do not fit.
    """
    rows, outputs = _check(a, a_scale, w, w_scale)
    if out is None:
        out = torch.empty(rows, outputs, dtype=dtype, device=a.device)
    if not _runs_triton(a):
        return out.copy_(reference(a, a_scale, w, w_scale))
    launch = launch or default_launch(outputs, w.shape[1])
    row_tile = next(size for size in ROW_TILES if rows <= size)
    tiles = -(-outputs // launch.tile)
    parts, arrivals = _workspace(a.device, launch.splits * tiles * launch.tile * row_tile, tiles)
    _few_rows_kernel[(tiles, launch.splits)](
        _described(w, launch.tile),
        _described(a, row_tile),
        w_scale,
        a_scale,
        out,
        parts,
        arrivals,
        rows,
        outputs,
        w_scale.shape[1],
        TILE=launch.tile,
        ROWS=row_tile,
        SPLITS=launch.splits,
        STAGES=launch.stages,
        num_warps=launch.warps,
    )
    return out


def _check(a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor) -> tuple[int, int]:
    rows, inputs = a.shape
    outputs, blocks = w.shape[0], -(-inputs // BLOCK)
    if not 1 <= rows <= MOST_ROWS:
        raise ValueError(f"{rows} rows: this product takes 1 to {MOST_ROWS}")
    if w.shape[1] != inputs:
        raise ValueError(f"a {tuple(a.shape)} and w {tuple(w.shape)} differ in their inner size")
    if inputs % 16:
        raise ValueError(f"inner size {inputs}: rows must be whole multiples of 16 bytes")
    expected = ((rows, blocks), (-(-outputs // BLOCK), blocks))
    if (tuple(a_scale.shape), tuple(w_scale.shape)) != expected:
        raise ValueError(f"scales {tuple(a_scale.shape)} and {tuple(w_scale.shape)}: expected {expected}")
    if not all(t.is_contiguous() for t in (a, a_scale, w, w_scale)):
        raise ValueError("all operands must be contiguous")
    return rows, outputs


def _runs_triton(x: Tensor) -> bool:
    if triton is None:
        return False
    return x.is_cuda or bool(triton.knobs.runtime.interpret)


def _described(x: Tensor, rows: int) -> Any:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, BLOCK])


_spaces: dict[torch.device, tuple[Tensor, Tensor]] = {}
_outgrown: list[tuple[Tensor, Tensor]] = []  # captured graphs may still write there


def _workspace(device: torch.device, parts: int, tiles: int) -> tuple[Tensor, Tensor]:
    """Returns room for partial sums and arrival counts, kept for later calls."""
    held = _spaces.get(device)
    if held is None or held[0].numel() < parts or held[1].numel() < tiles:
        sizes = (parts, tiles) if held is None else (max(parts, held[0].numel()), max(tiles, held[1].numel()))
        _outgrown.extend([] if held is None else [held])
        held = (torch.empty(sizes[0], device=device), torch.zeros(sizes[1], dtype=torch.int32, device=device))
        _spaces[device] = held
    return held
