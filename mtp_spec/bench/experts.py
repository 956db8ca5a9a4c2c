"""`bench kernels --what experts`: MoE layers of V3's width with 64 experts, top 8, random routing.

Bytes are those of the experts hit. Lines for each number of rows: the whole layer with V3's grouped gate and shared
expert; the experts with their routing given, which is what other engines' kernels are timed with; the products alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtp_spec.bench.common import Row
from mtp_spec.bench.timing import graph_time
from mtp_spec.bench.tuning import expert_rounds, label, search
from mtp_spec.kernels import fp8, moe, quant
from mtp_spec.kernels.moe import Groups, group

EXPERTS, SHARED, CHOSEN, CHANNELS, INNER = 64, 1, 8, 7168, 2048
ROUTINGS = 8
CHECKED = 4


@dataclass(slots=True)
class Layer:
    """One layer's weights, and rows that change with each of ROUTINGS."""

    weights: moe.Experts
    router: Tensor
    bias: Tensor
    routing: moe.Routing
    inputs: Tensor  # [ROUTINGS, M, D]

    def __call__(self, x: Tensor, launch: moe.Launch) -> Tensor:
        return moe.moe(x, self.router, self.bias, self.routing, self.weights, launch=launch)


@dataclass(slots=True)
class Prepared:
    """What the products of M rows read, their routing given."""

    x: tuple[Tensor, Tensor]
    indices: Tensor
    pair_weights: Tensor
    groups: Groups
    hidden: tuple[Tensor, ...]


def experts(counts: list[int], rate: float, tune: bool, facts: dict[str, Any]) -> tuple[list[Row], moe.Launch]:
    """Times MoE layers; returns lines and the launch, which is searched for with `tune`."""
    layer = _layer(max(counts))
    prepared = {m: _prepared(layer, m) for m in counts}
    launch = moe.default_launch(CHANNELS, INNER)
    if tune:
        launch = _tune(layer, prepared, launch, facts["tried"])
    whole = layer(layer.inputs[0], launch)
    expected = moe.moe_reference(layer.inputs[0, :CHECKED], layer.router, layer.bias, layer.routing, layer.weights)
    error = _error(whole[:CHECKED], expected)
    rows = []
    for m in counts:
        parts = [x[-m:].contiguous() for x in layer.inputs]
        gated = [moe.gate(x, layer.router, layer.bias, layer.routing)[0] for x in parts]
        exact = torch.equal(layer(parts[0], launch), whole[-m:])
        micro = _each(lambda: [layer(x, launch) for x in parts])  # noqa: B023 - called at once
        rows.append(_row("whole layer", m, micro, gated, rate, error, exact, launch))
        rows += _given(layer, m, prepared[m], rate, launch)
    return rows, launch


def _given(layer: Layer, m: int, prepared: list[Prepared], rate: float, launch: moe.Launch) -> list[Row]:
    """Times the experts with their routing given, and each product alone."""
    inputs = [x[:m].contiguous() for x in layer.inputs]
    indices = [p.indices for p in prepared]

    def run(x: Tensor, p: Prepared) -> Tensor:
        return moe.experts(x, p.indices, p.pair_weights, layer.weights, launch=launch)

    whole = run(inputs[0], prepared[0])
    first = inputs[0][:CHECKED], indices[0][:CHECKED], prepared[0].pair_weights[:CHECKED]
    error = _error(whole[:CHECKED], moe.experts_reference(*first, layer.weights))
    alone = moe.experts(
        inputs[0][-1:].contiguous(), indices[0][-1:], prepared[0].pair_weights[-1:], layer.weights, launch=launch
    )
    exact = torch.equal(alone, whole[-1:])
    micro = _each(lambda: [run(x, p) for x, p in zip(inputs, prepared, strict=True)])
    rows = [_row("routing given", m, micro, indices, rate, error, exact, launch)]
    for name, work, share in (("gate and up alone", _up, 2 / 3), ("down alone", _down, 1 / 3)):
        micro = _each(lambda: [work(layer, p, launch) for p in prepared])  # noqa: B023 - called at once
        rows.append(_row(name, m, micro, indices, rate, error, exact, launch, share))
    return rows


def _tune(layer: Layer, prepared: dict[int, list[Prepared]], launch: moe.Launch, tried: dict[str, Any]) -> moe.Launch:
    """Searches for the launch of one product after the other, then for what is pulled ahead in whole layers.

    Each number of rows counts alike.
    """

    def search_with(name: str, work: Callable[[moe.Launch, int], Any], start: moe.Launch) -> moe.Launch:
        base = {m: _each(lambda: work(start, m)) for m in prepared}  # noqa: B023 - called at once

        def time(candidate: moe.Launch) -> float:
            return sum(_each(lambda: work(candidate, m)) / base[m] for m in prepared) / len(prepared)  # noqa: B023

        def run(candidate: moe.Launch) -> None:
            for m in prepared:
                work(candidate, m)

        return search(start, expert_rounds(name), run, time, tried.setdefault(f"{CHANNELS}x{INNER} {name}", {}))

    launch = search_with("up", lambda c, m: [_up(layer, p, c) for p in prepared[m]], launch)
    launch = search_with("down", lambda c, m: [_down(layer, p, c) for p in prepared[m]], launch)
    return search_with("ahead", lambda c, m: [layer(x[:m], c) for x in layer.inputs], launch)


def _up(layer: Layer, p: Prepared, launch: moe.Launch) -> tuple[Tensor, ...]:
    return moe.gate_up(*p.x, p.groups, CHOSEN, layer.weights, launch)


def _down(layer: Layer, p: Prepared, launch: moe.Launch) -> Tensor:
    return moe.down(p.hidden, p.groups, p.pair_weights, layer.weights, launch, torch.bfloat16)


def _each(work: Callable[[], Any]) -> float:
    """Returns microseconds of one of ROUTINGS layers."""
    return graph_time(work) / ROUTINGS


def _layer(rows: int) -> Layer:
    count, blocks, inner_blocks = EXPERTS + SHARED, CHANNELS // fp8.BLOCK, INNER // fp8.BLOCK
    weights = moe.Experts(
        _random(count, 2 * INNER, CHANNELS),
        torch.rand(count, 2 * inner_blocks, blocks, device="cuda") * 0.02,
        _random(count, CHANNELS, INNER),
        torch.rand(count, blocks, inner_blocks, device="cuda") * 0.02,
    )
    router, bias = torch.randn(EXPERTS, CHANNELS, device="cuda"), torch.zeros(EXPERTS, device="cuda")
    routing = moe.Routing(experts=EXPERTS, chosen=CHOSEN, groups=8, kept_groups=4, scale=2.5, shared=SHARED)
    return Layer(weights, router, bias, routing, torch.randn(ROUTINGS, rows, CHANNELS, device="cuda").bfloat16())


def _prepared(layer: Layer, m: int) -> list[Prepared]:
    """Returns ROUTINGS uniform choices, drawn with the number of rows as seed, so that a peer can have the same."""
    generator, out = torch.Generator().manual_seed(m), []
    launch = moe.default_launch(CHANNELS, INNER)
    for x in layer.inputs:
        indices = torch.rand(m, EXPERTS, generator=generator).argsort(1)[:, :CHOSEN].int().cuda()
        pair_weights = torch.rand(m, CHOSEN, device="cuda") + 0.1
        groups, quantised = group(indices, EXPERTS + SHARED, launch.slot(m)), quant.quant(x[:m].contiguous())
        hidden = moe.gate_up(*quantised, groups, CHOSEN, layer.weights, launch)
        pair_weights /= pair_weights.sum(1, keepdim=True)
        out.append(Prepared(quantised, indices, pair_weights, groups, hidden))
    return out


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(fp8.E4M3)


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def _row(
    kind: str,
    m: int,
    micro: float,
    indices: list[Tensor],
    rate: float,
    error: float,
    exact: bool,
    launch: moe.Launch,
    share: float = 1.0,
) -> Row:
    hit = sum(chosen.unique().numel() for chosen in indices) / len(indices)
    speed = hit * 3 * INNER * CHANNELS * share / micro / 1e6
    return {
        "kernel": "experts",
        "shape": f"{EXPERTS} of {CHANNELS}x{INNER}, top {CHOSEN}, {kind}",
        "M": m,
        "us": micro,
        "TB/s": speed,
        "of copy": speed / rate,
        "torch us": float("nan"),
        "bf16 us": float("nan"),
        "error": error,
        "rows exact": exact,
        "launch": label(launch),
    }
