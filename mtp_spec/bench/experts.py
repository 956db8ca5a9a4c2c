"""`bench kernels --what experts`: MoE layers, of V3's width with 64 experts, top 8, unless others are named.

Routing is random.

Bytes are those of the activated experts. Lines for each number of rows: the whole layer with V3's grouped gate and
shared expert; the experts with given routing, as other engines' kernels are timed; the products alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtp_spec.bench.common import Row
from mtp_spec.bench.layers import kernel_row
from mtp_spec.bench.timing import graph_time
from mtp_spec.bench.tuning import expert_rounds, label, search
from mtp_spec.kernels import fp8, moe, quant
from mtp_spec.kernels.launching import tuned_name
from mtp_spec.kernels.moe import Groups, group, many

SHARED = 1
DEFAULT = "7168x2048:8/64"
ROUTINGS = 8
CHECKED = 4


@dataclass(frozen=True, slots=True)
class Mix:
    """Shape of a MoE layer, named such as "7168x2048:8/64", D x I: chosen / experts, with or without "bf16"."""

    name: str
    channels: int
    inner: int
    chosen: int
    experts: int
    packed: bool

    @classmethod
    def of(cls, name: str) -> Mix:
        """Returns the shape of a name.

        Raises:
            ValueError: the name is invalid.
        """
        found = re.fullmatch(r"(\d+)x(\d+):(\d+)/(\d+)( bf16)?", name.strip())
        if found is None or not all(int(part) for part in found.groups()[:4]):
            raise ValueError(f"{name!r}: give DxI:CHOSEN/EXPERTS, such as {DEFAULT} or '{DEFAULT} bf16'")
        channels, inner, chosen, count = (int(part) for part in found.groups()[:4])
        return cls(name.strip(), channels, inner, chosen, count, found.group(5) is None)

    @property
    def tuned(self) -> str:
        """Its name in tuned/moe.json."""
        return tuned_name(self.channels, self.inner, self.kind)

    @property
    def kind(self) -> str:
        """As launches are named."""
        return "fp8" if self.packed else "bf16"

    @property
    def default(self) -> moe.Launch:
        """The launch that the library uses."""
        return moe.default_launch(self.channels, self.inner, self.kind)


@dataclass(slots=True)
class Layer:
    """One layer's weights, and rows that change with each of ROUTINGS."""

    mix: Mix
    weights: moe.Experts
    router: Tensor
    bias: Tensor
    routing: moe.Routing
    inputs: Tensor  # [ROUTINGS, M, D]

    def __call__(self, x: Tensor, launch: moe.Launch) -> Tensor:
        return moe.moe(x, self.router, self.bias, self.routing, self.weights, launch=launch)


@dataclass(slots=True)
class Prepared:
    """Inputs of the products of M rows, with given routing."""

    x: tuple[Tensor, Tensor | None]
    indices: Tensor
    pair_weights: Tensor
    groups: Groups
    hidden: tuple[Tensor, ...]


def experts(
    mix: Mix, counts: list[int], rate: float, tune: bool, facts: dict[str, Any]
) -> tuple[list[Row], moe.Launch]:
    """Times MoE layers; returns lines and the launch, which `tune` searches for."""
    layer = _layer(mix, max(counts))
    prepared = {m: _prepared(layer, m) for m in counts}
    launch = mix.default
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
        rows.append(_row(mix, "whole layer", m, micro, gated, rate, error, exact, launch))
        rows += _given(layer, m, prepared[m], rate, launch)
    return rows, launch


def _given(layer: Layer, m: int, prepared: list[Prepared], rate: float, launch: moe.Launch) -> list[Row]:
    """Times the experts with given routing, and each product alone."""
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
    rows = [_row(layer.mix, "routing given", m, micro, indices, rate, error, exact, launch)]
    for name, work, share in (("gate and up alone", _up, 2 / 3), ("down alone", _down, 1 / 3)):
        micro = _each(lambda: [work(layer, p, launch) for p in prepared])  # noqa: B023 - called at once
        rows.append(_row(layer.mix, name, m, micro, indices, rate, error, exact, launch, share))
    return rows


def _tune(layer: Layer, prepared: dict[int, list[Prepared]], launch: moe.Launch, tried: dict[str, Any]) -> moe.Launch:
    """Searches for the launch of one product after the other, then for the prefetching in whole layers.

    Each number of rows has the same weight.
    """

    def search_with(name: str, work: Callable[[moe.Launch, int], Any], start: moe.Launch) -> moe.Launch:
        base = {m: _each(lambda: work(start, m)) for m in prepared}  # noqa: B023 - called at once

        def time(candidate: moe.Launch) -> float:
            return sum(_each(lambda: work(candidate, m)) / base[m] for m in prepared) / len(prepared)  # noqa: B023

        def run(candidate: moe.Launch) -> None:
            for m in prepared:
                work(candidate, m)

        return search(start, expert_rounds(name), run, time, tried.setdefault(f"{layer.mix.tuned} {name}", {}))

    launch = search_with("up", lambda c, m: [_up(layer, p, c) for p in prepared[m]], launch)
    launch = search_with("down", lambda c, m: [_down(layer, p, c) for p in prepared[m]], launch)
    return search_with("ahead", lambda c, m: [layer(x[:m], c) for x in layer.inputs], launch)


def _up(layer: Layer, p: Prepared, launch: moe.Launch) -> tuple[Tensor, ...]:
    if many.chosen(len(p.indices), layer.weights):
        return many.gate_up(*p.x, p.groups, layer.weights)
    return moe.gate_up(*p.x, p.groups, layer.mix.chosen, layer.weights, launch)


def _down(layer: Layer, p: Prepared, launch: moe.Launch) -> Tensor:
    if many.chosen(len(p.indices), layer.weights):
        return many.down(p.hidden, p.groups, p.pair_weights, layer.weights, torch.bfloat16)
    return moe.down(p.hidden, p.groups, p.pair_weights, layer.weights, launch, torch.bfloat16)


def _each(work: Callable[[], Any]) -> float:
    """Returns the mean microseconds of one of ROUTINGS layers."""
    return graph_time(work) / ROUTINGS


def _layer(mix: Mix, rows: int) -> Layer:
    channels, inner, count = mix.channels, mix.inner, mix.experts + SHARED
    blocks, inner_blocks = -(-channels // fp8.BLOCK), -(-inner // fp8.BLOCK)
    weights = moe.Experts(
        _random(mix, count, 2 * inner, channels), _scales(mix, count, 2 * inner_blocks, blocks),
        _random(mix, count, channels, inner), _scales(mix, count, blocks, inner_blocks),
    )  # fmt: skip
    router, bias = torch.randn(mix.experts, channels, device="cuda"), torch.zeros(mix.experts, device="cuda")
    groups, kept = (8, 4) if mix.experts % 8 == 0 and mix.chosen <= mix.experts // 2 else (1, 1)
    routing = moe.Routing(
        experts=mix.experts, chosen=mix.chosen, groups=groups, kept_groups=kept, scale=2.5, shared=SHARED
    )
    return Layer(mix, weights, router, bias, routing, torch.randn(ROUTINGS, rows, channels, device="cuda").bfloat16())


def _prepared(layer: Layer, m: int) -> list[Prepared]:
    """Returns ROUTINGS uniform choices, seeded by the number of rows, so that a peer can use the same."""
    generator, out, mix = torch.Generator().manual_seed(m), [], layer.mix
    launch = mix.default
    for x in layer.inputs:
        indices = torch.rand(m, mix.experts, generator=generator).argsort(1)[:, : mix.chosen].int().cuda()
        pair_weights = torch.rand(m, mix.chosen, device="cuda") + 0.1
        sorts, rows = many.chosen(m, layer.weights), x[:m].contiguous()
        groups = group(indices, mix.experts + SHARED, many.TOKENS if sorts else launch.slot(m))
        given: tuple[Tensor, Tensor | None] = quant.quant(rows) if mix.packed else (rows, None)
        if sorts:
            given = many.sort(*given, groups.order, mix.chosen)
            hidden = many.gate_up(*given, groups, layer.weights)
        else:
            hidden = moe.gate_up(given[0], given[1], groups, mix.chosen, layer.weights, launch)
        pair_weights /= pair_weights.sum(1, keepdim=True)
        out.append(Prepared(given, indices, pair_weights, groups, hidden))
    return out


def _random(mix: Mix, *shape: int) -> Tensor:
    numbers = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    return numbers.to(fp8.E4M3) if mix.packed else numbers * shape[-1] ** -0.5


def _scales(mix: Mix, *shape: int) -> Tensor | None:
    return torch.rand(shape, device="cuda") * 0.02 if mix.packed else None


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def _row(
    mix: Mix,
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
    speed = hit * 3 * mix.inner * mix.channels * (1 if mix.packed else 2) * share / micro / 1e6
    operations = 6 * indices[0].numel() * mix.inner * mix.channels * share
    name = f"{mix.name}, {kind}"
    return kernel_row("experts", name, m, micro, speed, rate, error, exact, label(launch), operations)
