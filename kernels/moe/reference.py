"""The mixture of experts in plain torch, the reference for every kernel of `moe`.

Legend: as in `layer` and `router`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_spec.kernels import ordered
from mtp_spec.kernels.fp8 import act_quant, fp8_gemm
from mtp_spec.kernels.moe.operands import Exchange, Experts, Groups, Routed, Routing, most_slots


def moe_reference(
    x: Tensor, router: Tensor, bias: Tensor | None, routing: Routing, weights: Experts,
    exchange: Exchange | None = None,
) -> Tensor:  # fmt: skip
    """`moe` in plain torch."""
    return experts_reference(x, *gate_reference(x, router, bias, routing), weights, exchange)


def experts_reference(
    x: Tensor, indices: Tensor, pair_weights: Tensor, weights: Experts, exchange: Exchange | None = None
) -> Tensor:
    """`experts` in plain torch, each pair computed as if it were alone."""
    given = _operands(x, weights)
    per_row, chosen = indices.shape[1], indices.flatten()
    by_expert = [(expert, (chosen == expert).nonzero().flatten()) for expert in chosen.unique().tolist()]
    activated, order = list[tuple[Tensor, ...]](), list[Tensor]()
    for expert, pairs in by_expert:
        rows = [part[pairs // per_row] for part in given]
        gate_part, up = (_product(rows, *half) for half in _halves(weights, expert))
        activated.append(_alone(ordered.by_row(F.silu, gate_part) * up, weights))
        order.append(pairs)
    places = torch.cat(order).argsort()
    hidden = tuple(torch.cat(parts)[places] for parts in zip(*activated, strict=True))
    if exchange is not None:
        hidden = exchange(*hidden)
    parts = torch.empty(len(chosen), weights.outputs, dtype=x.dtype, device=x.device)
    for expert, pairs in by_expert:
        scale = None if weights.down_scale is None else weights.down_scale[expert]
        parts[pairs] = _product([part[pairs] for part in hidden], weights.down[expert], scale).to(x.dtype)
    out = torch.zeros(x.shape[0], weights.outputs, dtype=torch.float32, device=x.device)
    weighted = (parts.float() * pair_weights.flatten()[:, None]).unflatten(0, (-1, per_row))
    for place in range(per_row):
        out += weighted[:, place]
    return out.to(x.dtype)


def _operands(x: Tensor, weights: Experts) -> tuple[Tensor, ...]:
    """Returns x as a product's operand: quantised, or rounded to the weights' type."""
    return act_quant(x, power_of_two=weights.power_of_two) if weights.scaled else (x.to(weights.down.dtype),)


def _alone(x: Tensor, weights: Experts) -> tuple[Tensor, ...]:
    """Returns `_operands` of each row as if it were alone: in a batch, logarithms of scales may differ."""
    if not weights.power_of_two:
        return _operands(x, weights)
    return tuple(torch.cat(parts) for parts in zip(*(_operands(row, weights) for row in x.split(1)), strict=True))


def _halves(weights: Experts, expert: int) -> list[tuple[Tensor, Tensor | None]]:
    """Returns an expert's gate and up with their scales."""
    both, scales = weights.gate_up[expert].split(weights.inner), weights.gate_up_scale
    if scales is None:
        return [(half, None) for half in both]
    return list(zip(both, scales[expert].split(scales.shape[1] // 2), strict=True))


def _product(rows: Sequence[Tensor], weight: Tensor, scale: Tensor | None) -> Tensor:
    """Returns rows @ weight.T in float32."""
    if scale is None:
        return ordered.products(rows[0].float(), weight.float())
    return fp8_gemm(rows[0], rows[1], weight, scale)


def route_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing, quantise: bool = True, tokens: int | None = 16,
    power_of_two: bool = False,
) -> Routed:  # fmt: skip
    """`route` in plain torch."""
    indices, weights = gate_reference(x, weight, bias, routing)
    quantised, scales = act_quant(x, power_of_two=power_of_two) if quantise else (None, None)
    groups = None if tokens is None else group_reference(indices, routing.experts + routing.shared, tokens)
    return Routed(indices, weights, quantised, scales, groups)


def gate_reference(x: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """`gate` in plain torch."""
    logits = ordered.products(x.float(), weight.float())
    scores = ordered.by_row(torch.sigmoid, logits) if routing.scoring == "sigmoid" else ordered.softmax(logits)
    choice = scores if bias is None else scores + bias
    if routing.kept_groups < routing.groups:
        grouped = choice.unflatten(-1, (routing.groups, -1))
        worth = ordered.total(grouped.topk(min(routing.best, grouped.shape[-1]), dim=-1).values)
        # a stable sort: among equals the lowest index wins
        best = worth.argsort(dim=-1, descending=True, stable=True)[:, : routing.kept_groups]
        keep = torch.zeros_like(worth, dtype=torch.bool).scatter_(-1, best, True)
        choice = grouped.masked_fill(~keep.unsqueeze(-1), float("-inf")).flatten(-2)
    chosen = choice.argsort(dim=-1, descending=True, stable=True)[:, : routing.chosen]
    indices = chosen.sort(dim=-1).values
    weights = scores.gather(-1, indices)
    if routing.normalise:
        weights = weights / (ordered.total(weights).unsqueeze(-1) + 1e-20)
    given = logits if bias is None else logits + bias
    weights = weights.masked_fill(~given.isfinite().all(-1, keepdim=True), torch.nan)
    rows = x.shape[0]
    shared = torch.arange(routing.experts, routing.experts + routing.shared, device=x.device).expand(rows, -1)
    ones = torch.ones(rows, routing.shared, dtype=torch.float32, device=x.device)
    return torch.cat((indices, shared), -1).int(), torch.cat((weights * routing.scale, ones), -1)


def group_reference(indices: Tensor, experts: int, tokens: int) -> Groups:
    """`group` in plain torch."""
    flat = indices.flatten().long()
    order = flat.argsort(stable=True)
    counts = torch.zeros(experts, dtype=torch.int64, device=flat.device)
    counts.index_add_(0, flat, torch.ones_like(flat))
    chunks = -(-counts // tokens)
    ends = chunks.cumsum(0)
    slots = torch.arange(most_slots(flat.numel(), experts, tokens), device=flat.device)
    expert = torch.searchsorted(ends, slots, right=True).clamp(max=experts - 1)
    within = (slots - (ends - chunks)[expert]) * tokens
    first = (counts.cumsum(0) - counts)[expert] + within
    count = (counts[expert] - within).clamp(0, tokens).where(slots < ends[-1], 0)
    first = first.where(count > 0, 0)
    return Groups(order.int(), expert.int(), first.int(), count.int())
