"""Multi-head latent attention in plain torch, the reference for every kernel of `mla`.

Legend: as in `attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_spec.kernels import ordered
from mtp_spec.kernels.fp8 import act_quant, weight_dequant
from mtp_spec.kernels.mla.cache import Cache
from mtp_spec.kernels.mla.plan import Head, Plan
from mtp_spec.kernels.quant import Operand, normed


def prepare_reference(
    down: Tensor, q_norm: Tensor | None, kv_norm: Tensor, table: Tensor, cache: Cache, plan: Plan, head: Head,
    eps: float, quantise: bool = True,
) -> Operand | None:  # fmt: skip
    """`prepare` in plain torch."""
    q, latent, rope = down.split((down.shape[1] - head.width, head.latent, head.rope), dim=-1)
    turned = rotate(rope, table[_positions(plan)], head.interleaved)
    row = torch.cat((normed(latent, kv_norm, eps), turned), -1)
    for rows, alone, own in plan.apart(cache):
        own.write(alone.length.long() + alone.slots.long(), row[rows])
    if q_norm is None:
        return None
    latent = normed(q, q_norm, eps)
    return act_quant(latent, power_of_two=head.power_of_two) if quantise else latent


def absorb_reference(
    q: Tensor, kv_b: Tensor, kv_b_scale: Tensor | None, table: Tensor, plan: Plan, head: Head
) -> Tensor:
    """`absorb` in plain torch."""
    nope, rope = q.unflatten(-1, (head.heads, -1)).split((head.nope, head.rope), dim=-1)
    w_uk = _wide(kv_b, kv_b_scale).view(head.heads, -1, head.latent)[:, : head.nope]
    latent = ordered.products(nope.float().transpose(0, 1), w_uk.mT).transpose(0, 1)
    turned = rotate(rope, table[_positions(plan)].unsqueeze(1), head.interleaved)
    absorbed = torch.cat((latent.to(q.dtype), turned.to(q.dtype)), -1)
    return torch.nn.functional.pad(absorbed, (0, 0, 0, head.padded - head.heads))


def up_reference(
    context: Tensor, kv_b: Tensor, kv_b_scale: Tensor | None, head: Head, quantise: bool = True
) -> Operand:
    """`up` in plain torch."""
    w_uv = _wide(kv_b, kv_b_scale).view(head.heads, -1, head.latent)[:, head.nope :]
    values = ordered.products(context.float().transpose(0, 1), w_uv).transpose(0, 1)
    rounded = values.to(context.dtype).flatten(1)
    return act_quant(rounded, power_of_two=head.power_of_two) if quantise else rounded


def attend_reference(q: Tensor, cache: Cache, plan: Plan, head: Head) -> Tensor:
    """`attend` in plain torch, one row at a time."""
    out = []
    for rows, alone, own in plan.apart(cache):
        length, nodes = int(alone.length), list[list[int]]()
        for node in range(plan.each):
            depth = int(plan.depths[node])
            nodes.append([*range(depth + 1)] if plan.ancestors is None else plan.ancestors[node, : depth + 1].tolist())
        held = own.read(torch.arange(length + max(map(max, nodes)) + 1, device=q.device)).float()
        for query, drafted in zip(q[rows], nodes, strict=True):
            keys = torch.cat((held[:length], held[[length + slot for slot in drafted]]))
            weights = ordered.softmax(ordered.products(query[: head.heads].float(), keys) * head.scale)
            out.append(ordered.products(weights, keys[:, : head.latent].T))
    return torch.stack(out).to(q.dtype)


def _positions(plan: Plan) -> Tensor:
    return (plan.length[:, None] + plan.depths + plan.offset).long().flatten()


def rotate(x: Tensor, table: Tensor, interleaved: bool) -> Tensor:
    """Returns x `[..., R]` rotated by rows of a table `[..., 2, R]`, float32."""
    wide = x.float()
    half = wide.shape[-1] // 2
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleaved else wide.roll(half, -1)
    own, other = table.unbind(-2)
    return wide * own + swapped * other


def _wide(w: Tensor, scale: Tensor | None) -> Tensor:
    return w.float() if scale is None else weight_dequant(w, scale).float()
