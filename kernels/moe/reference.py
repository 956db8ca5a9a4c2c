"""The mixture of experts in plain torch: what every kernel of `moe` is compared with.

Legend: as in `layer` and `router`.
"""

from __future__ import annotations

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
    """`experts` in plain torch, a pair's numbers as if it were alone."""
    power = weights.power_of_two
    quantised, scales = act_quant(x, power_of_two=power)
    per_row, blocks, chosen = indices.shape[1], weights.gate_up_scale.shape[1] // 2, indices.flatten()
    by_expert = [(expert, (chosen == expert).nonzero().flatten()) for expert in chosen.unique().tolist()]
    activated = dict[int, tuple[Tensor, Tensor]]()
    for expert, pairs in by_expert:
        halves = weights.gate_up[expert].split(weights.inner), weights.gate_up_scale[expert].split(blocks)
        rows = quantised[pairs // per_row], scales[pairs // per_row]
        gate_part, up = (fp8_gemm(*rows, *half).split(1) for half in zip(*halves, strict=True))
        for pair, one, other in zip(pairs.tolist(), gate_part, up, strict=True):
            activated[pair] = act_quant(F.silu(one) * other, power_of_two=power)
    hidden, hidden_scale = (torch.cat(parts) for parts in zip(*(activated[pair] for pair in range(len(chosen))),
                                                              strict=True))  # fmt: skip
    if exchange is not None:
        hidden, hidden_scale = exchange(hidden, hidden_scale)
    parts = torch.empty(len(chosen), weights.outputs, dtype=torch.float32, device=x.device)
    for expert, pairs in by_expert:
        parts[pairs] = fp8_gemm(hidden[pairs], hidden_scale[pairs], weights.down[expert], weights.down_scale[expert])
    out = torch.zeros(x.shape[0], weights.outputs, dtype=torch.float32, device=x.device)
    weighted = (parts * pair_weights.flatten()[:, None]).unflatten(0, (-1, per_row))
    for place in range(per_row):
        out += weighted[:, place]
    return out.to(x.dtype)


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
