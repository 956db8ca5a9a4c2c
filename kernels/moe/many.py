"""The experts' products for many rows on Hopper: pairs are sorted by expert, so that tiles of 128 pairs share weights.

Five launches instead of two: sort (copies the inputs of every pair next to those of its expert's other pairs), gate and
up, down, add. The arithmetic of a pair, and the order in which a row's pairs are added, are those of `kernels`, so rows
have the same bits.

Legend: as in `layer`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_spec.kernels.direct import enqueue
from mtp_spec.kernels.fp8 import BLOCK, E4M3_MAX
from mtp_spec.kernels.launching import MULTIPROCESSORS, hopper_module, late, next_power, on_hopper
from mtp_spec.kernels.moe.operands import Exchange, Experts, Groups

try:
    import triton
    import triton.language as tl

    from mtp_spec.kernels.launching import follow
except ImportError:  # no Triton for this platform
    triton = None

TOKENS = 128  # pairs in a slot
LEAST_ROWS = 513  # from which these launches run; a step has fewer
STRETCH = 1024  # columns per program of `add`
PARTS_BYTES = 2**30  # memory limit for the second product's outputs; more columns are computed in several turns


def chosen(rows: int, weights: Experts) -> bool:
    """Whether these launches run for a number of rows."""
    device = weights.down.device
    return rows >= LEAST_ROWS and triton is not None and on_hopper(device) and hopper_module("moe.hopper") is not None


def many(
    x: Tensor, x_scale: Tensor | None, groups: Groups, pair_weights: Tensor, weights: Experts, dtype: torch.dtype,
    exchange: Exchange | None = None,
) -> Tensor:  # fmt: skip
    """Returns each row's weighted sum over its experts `[M, D]` in `dtype`.

    Args:
        x: `[M, D]` e4m3 with scales `[M, ceil(D / 128)]`, or 16 bits without.
        groups: in slots of up to `TOKENS` pairs.
        pair_weights: `[M, K]` float32.
        exchange: as for `layer.moe`.
    """
    given, scales = sort(x, x_scale, groups.order, pair_weights.shape[1])
    hidden = gate_up(given, scales, groups, weights)
    if exchange is not None:
        hidden = exchange(*hidden)
    return down(hidden, groups, pair_weights, weights, dtype)


def down(
    hidden: tuple[Tensor, ...], groups: Groups, pair_weights: Tensor, weights: Experts, dtype: torch.dtype
) -> Tensor:
    """Launches the second product and each row's sum: output of `gate_up` to `[M, D]` in `dtype`."""
    (rows, per_row), device = pair_weights.shape, pair_weights.device
    out = torch.empty(rows, weights.outputs, dtype=dtype, device=device)
    # whole tiles at a time
    width = max(BLOCK, PARTS_BYTES // (4 * rows * per_row) // BLOCK * BLOCK)
    for first in range(0, weights.outputs, width):
        columns = min(width, weights.outputs - first)
        parts = torch.empty(rows * per_row, columns, dtype=torch.float32, device=device)
        _down(hidden, groups, weights, parts, first)
        add(parts, pair_weights, out, first)
    return out


def most_bytes(pairs: int) -> int:
    """Returns the most bytes of the second product's outputs of some pairs that exist at once."""
    return max(PARTS_BYTES, 4 * pairs * BLOCK)


def sort(x: Tensor, scale: Tensor | None, order: Tensor, per_row: int) -> tuple[Tensor, Tensor | None]:
    """Returns x `[M, D]`, and its scales if any, for every pair `[P, D]`, in the order of `order` `[P]`."""
    pairs, channels = order.numel(), x.shape[1]
    out = x.new_empty(pairs, channels)
    scales = None if scale is None else scale.new_empty(pairs, scale.shape[1])
    words, blocks = channels * x.element_size() // 4, 0 if scale is None else scale.shape[1]
    enqueue(
        _sort_kernel, (pairs,),
        x.view(torch.int32), x if scale is None else scale, order, out.view(torch.int32),
        out if scales is None else scales, words, blocks, per_row, SIZE=next_power(words),
        BLOCKS=next_power(max(1, blocks)), SCALED=scale is not None, **late(x),
    )  # fmt: skip
    return out, scales


def add(parts: Tensor, pair_weights: Tensor, out: Tensor, first: int) -> None:
    """Writes the weighted sums of each row's parts `[M K, N]`, in order, to columns `first` and on of out `[M, D]`."""
    (rows, per_row), columns = pair_weights.shape, parts.shape[1]
    enqueue(
        _add_kernel, (rows, -(-columns // STRETCH)),
        parts, pair_weights, out, columns, out.shape[1], first, PER_ROW=per_row, SIZE=STRETCH, **late(parts),
    )  # fmt: skip


def gate_up(x: Tensor, x_scale: Tensor | None, groups: Groups, weights: Experts) -> tuple[Tensor, ...]:
    """Launches silu(gate) * up of sorted pairs: x `[P, D]` to `[P, I]`, both e4m3 with scales, or 16 bits without."""
    kernels, (pairs, channels), inner = hopper_module("moe.hopper"), x.shape, weights.inner
    scaled, step = x_scale is not None, kernels.STEP // x.element_size()
    hidden, tokens, halves = x.new_empty(pairs, inner), TOKENS // 2, BLOCK // 2
    scales = x.new_empty(pairs if scaled else 0, -(-inner // BLOCK), dtype=torch.float32)
    enqueue(
        kernels.gate_up_kernel, (MULTIPROCESSORS,),
        kernels.described(x, tokens, step), kernels.described(weights.rows[0], halves, step),
        weights.gate_up_scale if scaled else x, x_scale if scaled else x, groups.expert, groups.first, groups.count,
        hidden, scales, pairs, groups.count.shape[0], inner, -(-channels // step),
        STAGES=kernels.stages(kernels.STEP * (TOKENS + BLOCK), TOKENS * BLOCK * 4), SCALED=scaled,
        POWER=weights.power_of_two, LARGEST=E4M3_MAX, num_warps=4,
    )  # fmt: skip
    return (hidden, scales) if scaled else (hidden,)


def _down(hidden: tuple[Tensor, ...], groups: Groups, weights: Experts, parts: Tensor, first: int) -> None:
    kernels, x, inner = hopper_module("moe.hopper"), hidden[0], hidden[0].shape[1]
    scaled, step = len(hidden) > 1, kernels.STEP // x.element_size()
    enqueue(
        kernels.down_kernel, (MULTIPROCESSORS,),
        kernels.described(x, TOKENS // 2, step), kernels.described(weights.rows[1], BLOCK, step),
        weights.down_scale if scaled else x, hidden[1] if scaled else x, groups.order, groups.expert, groups.first,
        groups.count, parts, groups.count.shape[0], weights.outputs, first, parts.shape[1], -(-inner // step),
        STAGES=kernels.stages(kernels.STEP * (TOKENS + BLOCK), 0), SCALED=scaled, num_warps=4,
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _sort_kernel(
        x,  # [M, words] int32
        scale,  # [M, blocks] float32, used with SCALED
        order,  # [P]
        out,  # [P, words] int32
        scales,  # [P, blocks] float32
        words,
        blocks,
        per_row,
        SIZE: tl.constexpr,
        BLOCKS: tl.constexpr,
        SCALED: tl.constexpr,
        PDL: tl.constexpr,
    ):
        follow(PDL)
        place = tl.program_id(0).to(tl.int64)
        row = (tl.load(order + place) // per_row).to(tl.int64)
        word = tl.arange(0, SIZE)
        tl.store(out + place * words + word, tl.load(x + row * words + word, mask=word < words), mask=word < words)
        if SCALED:
            block = tl.arange(0, BLOCKS)
            values = tl.load(scale + row * blocks + block, mask=block < blocks)
            tl.store(scales + place * blocks + block, values, mask=block < blocks)

    @triton.jit
    def _add_kernel(
        parts,  # [M * PER_ROW, columns] float32
        weights,  # [M, PER_ROW] float32
        out,  # [M, channels]
        columns,
        channels,
        first,
        PER_ROW: tl.constexpr,
        SIZE: tl.constexpr,
        PDL: tl.constexpr,
    ):
        follow(PDL)
        row, place = tl.program_id(0).to(tl.int64), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
        mask = place < columns
        summed = tl.zeros((SIZE,), dtype=tl.float32)
        for one in tl.static_range(PER_ROW):
            pair = row * PER_ROW + one
            part = tl.load(parts + pair * columns + place, mask=mask, other=0.0)
            summed += tl.load(weights + pair) * part
        tl.store(out + row * channels + first + place, summed.to(out.dtype.element_ty), mask=mask)
