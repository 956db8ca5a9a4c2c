"""Mixture of experts in FP8 or 16 bits for 1 to 64 rows (decode, draft, verify) and for any number (prefill).

`moe` is the whole layer in four launches: router with quantisation, choice with grouping (`router`), gate and up
with activation and quantisation, down with the weighted sum. None waits for the host, so a step fits one CUDA graph.
Weights are read once for each chosen expert. A row's bits do not depend on the other rows; launch configurations come
from tuned/moe.json by (D, I) and never change with the rows, except `tokens`, the width of the tensor core's narrow
side, which does not affect a column's sum. Many rows take other launches on Hopper (`many`), with the same bits.

Legend: `M` rows, `D` channels, `I` expert width, `E` experts including the shared ones, `K` experts a row including
the shared ones, `P` = M K pairs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_spec.kernels.checks import expect
from mtp_spec.kernels.direct import described, enqueue
from mtp_spec.kernels.fp8 import BLOCK, E4M3_MAX
from mtp_spec.kernels.launching import interpreted, late, runs_triton, stages_that_fit, tuned_name
from mtp_spec.kernels.moe import many
from mtp_spec.kernels.moe.grouping import MOST_ROWS, group
from mtp_spec.kernels.moe.operands import Exchange, Experts, Groups, Routing, most_slots
from mtp_spec.kernels.moe.reference import experts_reference, moe_reference
from mtp_spec.kernels.moe.router import route
from mtp_spec.kernels.quant import quant
from mtp_spec.kernels.workspace import Workspace

with suppress(ImportError):  # no Triton for this platform: the references remain
    from mtp_spec.kernels.moe.kernels import _down_kernel, _gate_up_kernel

INPUTS = (torch.bfloat16, torch.float16, torch.float32)
# both products count there: the second changes counts only after the first has ended, see `launching`
ARRIVALS = Workspace(torch.int32, zeros=True, least=1 << 16)


@dataclass(frozen=True, slots=True)
class Launch:
    """How the experts' products run.

    Attributes:
        up_tile: columns of gate, and of up, per program: 64 or 128.
        down_tile: outputs per program, 64 or 128.
        up_stages: steps of K in flight.
        down_stages: steps of K in flight.
        up_warps: warps per program.
        down_warps: warps per program.
        up_unroll: blocks of 128 of K per step.
        down_unroll: blocks of 128 of K per step.
        up_ahead: KiB / 16 of the shared experts that a program prefetches before the gate has chosen.
        down_ahead: blocks of 128 of K of its own expert that a program prefetches before the hidden values are ready.
        tokens: pairs per program for up to 64 rows, 16, 32 or 64.
        prefill_tokens: pairs per program for more rows.
    """

    up_tile: int = 64
    up_stages: int = 4
    up_warps: int = 4
    up_unroll: int = 1
    up_ahead: int = 4
    down_tile: int = 64
    down_stages: int = 4
    down_warps: int = 4
    down_unroll: int = 1
    down_ahead: int = 4
    tokens: int = 16
    prefill_tokens: int = 32

    def slot(self, rows: int) -> int:
        """Returns pairs per program for a number of rows."""
        return self.tokens if rows <= MOST_ROWS else self.prefill_tokens

    def unrolled(self, unroll: int, rows: int) -> int:
        """Blocks of K per step; one for many rows, whose wide tiles fill the registers."""
        return unroll if rows <= MOST_ROWS else 1


@lru_cache
def default_launch(channels: int, inner: int, kind: str = "fp8") -> Launch:
    """Returns the tuned launch for a shape ("fp8", or "bf16" for 16 bits of either type), else the defaults."""
    path = Path(__file__).parents[1] / "tuned" / "moe.json"
    tuned: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    return Launch(**tuned.get(tuned_name(channels, inner, kind), {}))


def launch_of(weights: Experts) -> Launch:
    """Returns the launch for some experts' shape and type."""
    return default_launch(weights.channels, weights.down.shape[2], "fp8" if weights.scaled else "bf16")


def moe(
    x: Tensor,
    router: Tensor,
    bias: Tensor | None,
    routing: Routing,
    weights: Experts,
    launch: Launch | None = None,
    exchange: Exchange | None = None,
    long: Sequence[slice] = (),
) -> Tensor:
    """Returns shared(x) + sum over chosen experts of weight * expert(x), `[M, D]` in x's dtype.

    Args:
        x: `[M, D]` bfloat16, float16 or float32; of the weights' type if those have no scales.
        router: `[E - shared, D]`.
        bias: `[E - shared]` float32 or None.
        exchange: completes hidden values `[P, I]`, and their scales if any, with the columns of other ranks.
        long: rows whose scores are computed by a matrix product, see `route`.
    """
    if weights.count != routing.experts + routing.shared:
        raise ValueError(f"{weights.count} experts given, the gate has {routing.experts} + {routing.shared} shared")
    expect("x", x, (None, weights.channels), _inputs(weights), beside=weights.down)
    if not runs_triton(x):
        return moe_reference(x, router, bias, routing, weights, exchange)
    launch = launch or launch_of(weights)
    sorts = many.chosen(x.shape[0], weights)
    tokens = many.TOKENS if sorts else launch.slot(x.shape[0])
    routed = route(x, router, bias, routing, weights.scaled, tokens, weights.power_of_two, long)
    assert routed.groups is not None
    given = x if routed.quantised is None else routed.quantised
    if sorts:
        return many.many(given, routed.scales, routed.groups, routed.weights, weights, x.dtype, exchange)
    hidden = gate_up(given, routed.scales, routed.groups, routing.per_row, weights, launch, routing.shared)
    if exchange is not None:
        hidden = exchange(*hidden)
    return down(hidden, routed.groups, routed.weights, weights, launch, x.dtype)


def experts(
    x: Tensor,
    indices: Tensor,
    pair_weights: Tensor,
    weights: Experts,
    launch: Launch | None = None,
) -> Tensor:
    """Returns sum over j of pair_weights[m, j] * expert indices[m, j] (x[m]), `[M, D]` in x's dtype.

    Args:
        indices: `[M, K]` int32, shared experts included.
        pair_weights: `[M, K]` float32.
    """
    rows = x.shape[0]
    expect("x", x, (rows, weights.channels), _inputs(weights), beside=weights.down)
    expect("indices", indices, (rows, None), torch.int32, beside=x)
    expect("pair_weights", pair_weights, indices.shape, torch.float32, beside=x)
    if not runs_triton(x):
        return experts_reference(x, indices, pair_weights, weights)
    launch = launch or launch_of(weights)
    given, scales = quant(x, weights.power_of_two) if weights.scaled else (x, None)
    if many.chosen(rows, weights):
        groups = group(indices, weights.count, many.TOKENS)
        return many.many(given, scales, groups, pair_weights, weights, x.dtype)
    groups = group(indices, weights.count, launch.slot(rows))
    hidden = gate_up(given, scales, groups, indices.shape[1], weights, launch)
    return down(hidden, groups, pair_weights, weights, launch, x.dtype)


def _inputs(weights: Experts) -> tuple[torch.dtype, ...]:
    return INPUTS if weights.scaled else (weights.down.dtype,)


def gate_up(
    x: Tensor, x_scale: Tensor | None, groups: Groups, per_row: int, weights: Experts, launch: Launch, shared: int = 0
) -> tuple[Tensor, ...]:
    """Launches silu(gate) * up of every pair: x `[M, D]` to `[P, I]`, both e4m3 with scales, or 16 bits without.

    Args:
        shared: number of the last experts that every row is known to choose.
    """
    (rows, channels), inner, device = x.shape, weights.inner, x.device
    pairs, slots, tokens = rows * per_row, groups.count.shape[0], launch.slot(rows)
    assert slots == most_slots(pairs, weights.count, tokens)
    scaled = x_scale is not None
    # two programs share a block of scales
    inner_blocks, halves = -(-inner // BLOCK), scaled and launch.up_tile < BLOCK
    unroll = launch.unrolled(launch.up_unroll, rows)
    step = unroll * BLOCK * (2 * launch.up_tile + tokens) * x.element_size()
    hidden = x.new_empty(pairs, inner)
    hidden_scale = x.new_empty(pairs if scaled else 0, inner_blocks, dtype=torch.float32)
    enqueue(
        _gate_up_kernel, (slots * -(-inner // launch.up_tile),),
        described(weights.rows[0], launch.up_tile, BLOCK), weights.gate_up, _or(weights.gate_up_scale, x), x,
        _or(x_scale, x),
        groups.order, groups.expert, groups.first, groups.count,
        hidden, hidden_scale, torch.empty(pairs if halves else 1, inner, dtype=torch.float32, device=device),
        ARRIVALS.room(device, slots * inner_blocks), inner, channels, -(-channels // BLOCK), per_row, slots,
        weights.count,
        TILE=launch.up_tile, TOKENS=tokens, STAGES=stages_that_fit(launch.up_stages, step, device), UNROLL=unroll,
        EVEN=channels % BLOCK == 0, SHARED=shared, AHEAD=launch.up_ahead, POWER=weights.power_of_two,
        LARGEST=E4M3_MAX, SCALED=scaled, WIDE=not scaled and interpreted(), num_warps=launch.up_warps, **late(x),
    )  # fmt: skip
    return (hidden, hidden_scale) if scaled else (hidden,)


def down(
    given: Sequence[Tensor], groups: Groups, pair_weights: Tensor, weights: Experts, launch: Launch, dtype: torch.dtype
) -> Tensor:
    """Launches the second product and each row's sum: output of `gate_up` `[P, I]` to `[M, D]` in `dtype`."""
    hidden, scale = given[0], given[1] if len(given) > 1 else None
    (pairs, inner), (rows, per_row), device = hidden.shape, pair_weights.shape, hidden.device
    channels, slots, tiles = weights.outputs, groups.count.shape[0], -(-weights.outputs // launch.down_tile)
    unroll = launch.unrolled(launch.down_unroll, rows)
    step = unroll * BLOCK * (launch.down_tile + launch.slot(rows)) * hidden.element_size()
    parts = torch.empty(pairs, channels, dtype=torch.float32, device=device)
    out = torch.empty(rows, channels, dtype=dtype, device=device)
    enqueue(
        _down_kernel, (slots * tiles,),
        described(weights.rows[1], launch.down_tile, BLOCK), weights.down, _or(weights.down_scale, hidden), hidden,
        _or(scale, hidden),
        groups.order, groups.expert, groups.first, groups.count,
        pair_weights, parts, ARRIVALS.room(device, rows * tiles), out,
        inner, channels, -(-inner // BLOCK), slots, weights.count,
        TILE=launch.down_tile, TOKENS=launch.slot(rows), STAGES=stages_that_fit(launch.down_stages, step, device),
        UNROLL=unroll, EVEN=inner % BLOCK == 0, PER_ROW=per_row,
        AHEAD=launch.down_ahead, SCALED=scale is not None, WIDE=scale is None and interpreted(),
        num_warps=launch.down_warps, **late(hidden),
    )  # fmt: skip
    return out


def _or(scale: Tensor | None, other: Tensor) -> Tensor:
    """Returns scales, or a placeholder that no kernel reads."""
    return other if scale is None else scale
