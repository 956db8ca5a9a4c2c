"""Chooses each row's experts and groups the rows by expert: two launches, no host sync.

The gate is that of `mtp_spec.model.moe.Gate` (V3 report, 2412.19437, eq. 12-16): scores choose with a correction bias
and give weights without it; groups of experts compete by their best two (V3) or their best one (V2); the lowest index
wins among equals; chosen experts are in ascending order. The shared expert is an expert that every row chooses with
weight 1: each row ends with `shared` more indices, from `experts` on. So it needs no separate launch.

1. router: every program multiplies a few experts by a stretch of D for all rows, and quantises its share of the rows.
2. select: one program per row adds the stretches in order and chooses; the last to finish groups the pairs by expert.

A row's bits depend only on its own numbers: stretches are chosen by D, never by the rows. Rows of long prompts may be
multiplied on tensor cores instead (`scored`), whose sums have another order.

Legend: `M` rows, `D` channels, `E` routed experts, `K` chosen plus shared experts per row, `P` = M K pairs, pair
m K + j is row m with its j-th expert. A slot is one expert with up to `tokens` of its pairs, the work of one GEMM
program.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtp_spec.kernels import gemm
from mtp_spec.kernels.checks import FLOATS, expect
from mtp_spec.kernels.direct import enqueue
from mtp_spec.kernels.fp8 import BLOCK, E4M3, E4M3_MAX
from mtp_spec.kernels.launching import late, next_power, runs_triton
from mtp_spec.kernels.moe.grouping import ARRIVALS, MOST_ROWS, empty_groups, group
from mtp_spec.kernels.moe.operands import Routed, Routing, most_slots
from mtp_spec.kernels.moe.reference import route_reference
from mtp_spec.kernels.quant import quant

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    from mtp_spec.kernels.launching import follow, pull
    from mtp_spec.kernels.moe.grouping import group_few
    from mtp_spec.kernels.quant import _store_quantised
except ImportError:  # no Triton for this platform: the references remain
    triton = None

STRETCH = 512  # channels per router program; part of the arithmetic
ROUTER_EXPERTS = 8
# Up to this many experts, one warp chooses without synchronising; the number of warps is part of the arithmetic, since
# it orders the sum of weights. Such a warp groups at most so many pairs.
FEW_EXPERTS, MOST_PAIRS = 128, 144
ONE_SPLIT = gemm.Launch()
LOWEST = -1e38  # below every score, above the -inf of padding; its double is finite


def gate(x: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """Returns indices `[M, K]` int32 and weights `[M, K]` float32 of rows x `[M, D]`, any M.

    Args:
        weight: router `[E, D]`, float32 or bfloat16.
        bias: `[E]` float32, used only for choosing, or None.
    """
    routed = route(x, weight, bias, routing, quantise=False, tokens=None)
    return routed.indices, routed.weights


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing, quantise: bool = True, tokens: int | None = 16,
    power_of_two: bool = False, long: Sequence[slice] = (),
) -> Routed:  # fmt: skip
    """Returns the experts' inputs, in two launches; CPU tensors use the reference, except in Triton's interpreter.

    Args:
        quantise: also quantise x, 1x128; `power_of_two` as for `fp8.act_quant`.
        tokens: also group the pairs, up to this many per slot; None not to. Beyond 64 rows it takes another launch.
        long: rows, in ascending order, whose scores are computed by a matrix product: faster for many rows, in another
            order of sums.
    """
    _check(x, weight, bias, routing)
    if not runs_triton(x):
        return route_reference(x, weight, bias, routing, quantise, tokens, power_of_two)
    rows, channels = x.shape
    device, per_row = x.device, routing.per_row
    stretches = -(-channels // STRETCH)
    # a product's rows have one sum, the first
    parts = (torch.zeros if long else torch.empty)(rows, stretches, routing.experts, dtype=torch.float32, device=device)
    if long and quantise:
        quantised, scales = quant(x, power_of_two)
    else:
        quantised = torch.empty(rows if quantise else 0, channels, dtype=E4M3 if quantise else x.dtype, device=device)
        scales = torch.empty(rows if quantise else 0, -(-channels // BLOCK), dtype=torch.float32, device=device)
    for part in _others(long, rows):
        enqueue(
            _router_kernel,
            (-(-routing.experts // ROUTER_EXPERTS), stretches, -(-(part.stop - part.start) // MOST_ROWS)),
            x[part], weight, parts[part], quantised, scales, part.stop - part.start, channels, routing.experts,
            scales.shape[1], EXPERTS=ROUTER_EXPERTS, STRETCH=STRETCH, ROWS=MOST_ROWS, QUANTISE=quantise and not long,
            POWER=power_of_two, LARGEST=E4M3_MAX, **late(x),
        )  # fmt: skip
    for part in long:
        parts[part, 0] = scored(x[part], weight)
    indices = torch.empty(rows, per_row, dtype=torch.int32, device=device)
    weights = torch.empty(rows, per_row, dtype=torch.float32, device=device)
    in_kernel = tokens is not None and _groups_itself(indices, routing)
    groups = empty_groups(indices, routing.experts + routing.shared, tokens if in_kernel else None)
    size = routing.experts // routing.groups
    enqueue(
        _select_kernel, (rows,),
        parts, weight if bias is None else bias, indices, weights, ARRIVALS.room(device, 1),
        groups.order, groups.expert, groups.first, groups.count,
        rows, routing.experts, stretches, routing.scale, groups.count.shape[0],
        STRETCHES=next_power(stretches), GROUPS=routing.groups, KEPT=routing.kept_groups, SIZE=size,
        WIDE_GROUPS=next_power(routing.groups), WIDE_SIZE=next_power(size),
        CHOSEN=routing.chosen, SHARED=routing.shared, SIGMOID=routing.scoring == "sigmoid", BEST=routing.best,
        NORMALISE=routing.normalise, BIAS=bias is not None, GROUP=in_kernel, LOWEST=LOWEST,
        **_group_sizes(indices, routing, tokens), num_warps=1 if routing.experts <= FEW_EXPERTS else 4, **late(x),
    )  # fmt: skip
    if tokens is not None and not in_kernel:
        groups = group(indices, routing.experts + routing.shared, tokens)
    return Routed(indices, weights, quantised if quantise else None, scales if quantise else None,
                  groups if tokens is not None else None)  # fmt: skip


def scored(x: Tensor, weight: Tensor) -> Tensor:
    """Returns the logits `[M, E]` float32 of rows x `[M, D]` bf16 or fp16 by matrix products.

    A float32 router is the sum of three numbers in the type of x, each the rest of the one before: then products lose
    no more than sums in float32 do.
    """
    if weight.dtype == x.dtype:
        return gemm.bf16_gemm(x, weight, dtype=torch.float32, launch=ONE_SPLIT)
    parts, rest = list[Tensor](), weight
    for _ in range(3):
        parts.append(rest.to(x.dtype))
        rest = rest.float() - parts[-1].float()
    found = gemm.bf16_gemm(x, torch.cat(parts), dtype=torch.float32, launch=ONE_SPLIT)
    total, *others = found.split(len(weight), 1)
    for other in others:
        total = total + other
    return total


def _others(long: Sequence[slice], rows: int) -> list[slice]:
    """Returns the rows that are in none of these ranges."""
    found, begin = list[slice](), 0
    for part in (*long, slice(rows, rows)):
        if begin < part.start:
            found.append(slice(begin, part.start))
        begin = part.stop
    return found


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing) -> None:
    expect("x", x, (None, None), FLOATS)
    expect("router", weight, (routing.experts, x.shape[1]), FLOATS, beside=x)
    if bias is not None:
        expect("bias", bias, (routing.experts,), torch.float32, beside=x)


def _groups_itself(indices: Tensor, routing: Routing) -> bool:
    """Whether the pairs are few enough for the last choosing program to group them."""
    few = routing.experts > FEW_EXPERTS or indices.numel() <= MOST_PAIRS
    return few and indices.shape[0] <= MOST_ROWS


def _group_sizes(indices: Tensor, routing: Routing, tokens: int | None) -> dict[str, int]:
    if tokens is None or not _groups_itself(indices, routing):
        return {"PAIRS": 32, "TOKENS": 16, "WIDE_EXPERTS": 1, "SLOTS": 1}
    experts = routing.experts + routing.shared
    slots = most_slots(indices.numel(), experts, tokens)
    sizes = (max(32, next_power(indices.numel())), tokens, next_power(experts))
    return dict(zip(("PAIRS", "TOKENS", "WIDE_EXPERTS"), sizes, strict=True), SLOTS=next_power(slots))


if triton is not None:

    @triton.jit
    def _router_kernel(
        x,  # [M, D]
        weight,  # [E, D]
        parts,  # [M, stretches, E] float32
        quantised,  # [M, D] e4m3
        scales,  # [M, blocks] float32
        m,
        channels,
        experts,
        blocks,
        EXPERTS: tl.constexpr,
        STRETCH: tl.constexpr,
        ROWS: tl.constexpr,
        QUANTISE: tl.constexpr,
        POWER: tl.constexpr,
        LARGEST: tl.constexpr,
        PDL: tl.constexpr,
    ):
        lane, stretch = tl.program_id(0), tl.program_id(1)
        if PDL:
            gdc_launch_dependents()
            if tl.program_id(2) == 0:
                pull(weight, lane * EXPERTS, stretch * (STRETCH // 128), experts, channels, EXPERTS, STRETCH // 128)
            gdc_wait()
        expert = lane * EXPERTS + tl.arange(0, EXPERTS)
        place = stretch * STRETCH + tl.arange(0, STRETCH)
        inside = place < channels
        both = (expert < experts)[:, None] & inside[None, :]
        w = tl.load(weight + expert[:, None] * channels + place[None, :], mask=both, other=0.0).to(tl.float32)
        first_row = tl.program_id(2) * ROWS
        for row in range(first_row, tl.minimum(first_row + ROWS, m)):
            offset = tl.cast(row, tl.int64) * channels
            values = tl.load(x + offset + place, mask=inside, other=0.0).to(tl.float32)
            out = parts + (row * tl.num_programs(1) + stretch) * experts + expert
            tl.store(out, tl.sum(w * values[None, :], axis=1), mask=expert < experts)
            if QUANTISE:
                if row % tl.num_programs(0) == lane:
                    _store_quantised(
                        values, tl.cast(row, tl.int64), stretch * STRETCH, quantised, scales, channels, blocks,
                        STRETCH, POWER, LARGEST,
                    )  # fmt: skip

    @triton.jit
    def _select_kernel(
        parts, bias, indices, weights, arrivals, order, slot_expert, slot_first, slot_count,
        m, experts, stretches, factor, slots,
        STRETCHES: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, SIZE: tl.constexpr,
        WIDE_GROUPS: tl.constexpr, WIDE_SIZE: tl.constexpr, CHOSEN: tl.constexpr, SHARED: tl.constexpr,
        SIGMOID: tl.constexpr, BEST: tl.constexpr, NORMALISE: tl.constexpr, BIAS: tl.constexpr, GROUP: tl.constexpr,
        LOWEST: tl.constexpr,
        PAIRS: tl.constexpr, TOKENS: tl.constexpr, WIDE_EXPERTS: tl.constexpr, SLOTS: tl.constexpr,
        PDL: tl.constexpr,
    ):  # fmt: skip
        follow(PDL)
        row = tl.program_id(0)
        place = tl.arange(0, WIDE_GROUPS * WIDE_SIZE)  # groups padded to a power of two: order of experts is kept
        expert = place // WIDE_SIZE * SIZE + place % WIDE_SIZE
        real = (place // WIDE_SIZE < GROUPS) & (place % WIDE_SIZE < SIZE)
        stretch = tl.arange(0, STRETCHES)[:, None]
        source = parts + (row * stretches + stretch) * experts + expert[None, :]
        logits = tl.sum(tl.load(source, mask=(stretch < stretches) & real[None, :], other=0.0), axis=0)
        if SIGMOID:
            scores = 1 / (1 + tl.exp(-logits))
        else:
            logits = tl.where(real, logits, float("-inf"))
            powers = tl.exp(logits - tl.max(logits, axis=0))
            scores = powers / tl.sum(powers, axis=0)
        choice = scores
        if BIAS:
            choice += tl.load(bias + expert, mask=real, other=0.0)
        # if a logit or bias is NaN or infinite, which comparisons and the sigmoid hide, every weight becomes NaN
        unsound = tl.where(real, (logits + choice) * 0.0, 0.0)
        # NaN ranks lowest: for any input, distinct existing experts are chosen, so no address is out of bounds
        choice = tl.where(choice > LOWEST, choice, LOWEST)
        choice = tl.where(real, choice, float("-inf"))
        if KEPT < GROUPS:
            choice = _limit_groups(choice, GROUPS, KEPT, SIZE, WIDE_GROUPS, WIDE_SIZE, BEST)
            choice = tl.where(real, tl.maximum(choice, LOWEST), float("-inf"))
        chosen = place < 0
        for _ in tl.static_range(CHOSEN):
            best = tl.argmax(tl.where(chosen, float("-inf"), choice), axis=0)
            chosen = chosen | (place == best)
        weight = tl.where(chosen, scores, 0.0)
        if NORMALISE:
            weight = weight / (tl.sum(weight + unsound, axis=0) + 1e-20)
        else:
            weight += tl.sum(unsound, axis=0)
        target = row * (CHOSEN + SHARED) + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(indices + target, expert, mask=chosen)
        tl.store(weights + target, weight * factor, mask=chosen)
        for one in tl.static_range(SHARED):
            tl.store(indices + row * (CHOSEN + SHARED) + CHOSEN + one, experts + one)
            tl.store(weights + row * (CHOSEN + SHARED) + CHOSEN + one, 1.0)
        if GROUP:
            tl.debug_barrier()  # all threads' stores must precede the one thread's arrival
            if tl.atomic_add(arrivals, 1, sem="acq_rel") == m - 1:
                tl.debug_barrier()
                group_few(
                    indices, order, slot_expert, slot_first, slot_count, m * (CHOSEN + SHARED), slots,
                    PAIRS, TOKENS, WIDE_EXPERTS, SLOTS,
                )  # fmt: skip
                tl.store(arrivals, 0)

    @triton.jit
    def _limit_groups(
        choice, GROUPS: tl.constexpr, KEPT: tl.constexpr, SIZE: tl.constexpr,
        WIDE_GROUPS: tl.constexpr, WIDE_SIZE: tl.constexpr, BEST: tl.constexpr,
    ):  # fmt: skip
        """Sets experts outside the best KEPT groups to -inf."""
        grouped = tl.reshape(choice, (WIDE_GROUPS, WIDE_SIZE))
        worth = tl.max(grouped, axis=1)
        if BEST == 2 and SIZE > 1:
            first = tl.argmax(grouped, axis=1)
            others = tl.where(tl.arange(0, WIDE_SIZE)[None, :] == first[:, None], float("-inf"), grouped)
            worth += tl.max(others, axis=1)
        number = tl.arange(0, WIDE_GROUPS)
        kept = number < 0
        for _ in tl.static_range(KEPT):
            best = tl.argmax(tl.where(kept | (number >= GROUPS), float("-inf"), worth), axis=0)
            kept = kept | (number == best)
        return tl.reshape(tl.where(kept[:, None], grouped, float("-inf")), (WIDE_GROUPS * WIDE_SIZE,))
