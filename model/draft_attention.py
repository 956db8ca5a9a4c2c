"""Attention of drafts along a whole text, with gradients: what deeper depths of a reused module see.

Row t of a depth sees the first depth's rows up to t and, of each later depth, row t alone. So the first part is causal
attention, which flash attention computes without a mask, and the rest is one score a row and depth. Both are joined by
their sums of exponentials. Backward, flash attention takes the joined output and sum in place of its own: then it
derives its part of the joint softmax, as in ring attention (2310.01889).

Legend: `B` sequences, `H` heads, `T` tokens, `E` size of a head, `J` later depths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

KeysValues = tuple[Tensor, Tensor]


def draft_attention(q: Tensor, pairs: Sequence[KeysValues], scale: float) -> Tensor:
    """Returns the attention `[B, H, T, E]` of queries q `[B, H, T, E]`.

    Args:
        pairs: keys and values `[B, H, T, E]` of the first depth and of each later one, the queries' own last.
        scale: of the scores.
    """
    if q.is_cuda and q.dtype not in (torch.float16, torch.bfloat16):  # flash attention on a GPU has 16 bits
        return draft_attention_reference(q, pairs, scale)
    flat = [tensor for pair in pairs for tensor in pair]
    out: Tensor = _DraftAttention.apply(scale, q, *flat)
    return out


def draft_attention_reference(q: Tensor, pairs: Sequence[KeysValues], scale: float) -> Tensor:
    """`draft_attention` over all depths' keys at once, with a mask."""
    rows = q.shape[-2]
    own = torch.eye(rows, dtype=torch.bool, device=q.device)
    mask = torch.cat([own.new_ones(rows, rows).tril(), *[own] * (len(pairs) - 1)], dim=1)
    k, v = (torch.cat(parts, dim=-2) for parts in zip(*pairs, strict=True))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


class _DraftAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: float, q: Tensor, *flat: Tensor) -> Tensor:
        own, lse, ctx.rest = _flash(q, flat[0], flat[1], scale)
        later = list(zip(flat[2::2], flat[3::2], strict=True))
        scores = [_dot(q, k, lse.dtype) * scale for k, _ in later]
        whole = torch.stack([lse, *scores]).logsumexp(0)
        out = own * (lse - whole).exp().unsqueeze(-1).to(own.dtype)
        for score, (_, v) in zip(scores, later, strict=True):
            out.addcmul_((score - whole).exp().unsqueeze(-1).to(v.dtype), v)
        ctx.scale = scale
        ctx.save_for_backward(q, out, whole, *flat)
        return out

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        q, out, whole, *flat = ctx.saved_tensors
        grad, scale = above[0].contiguous(), ctx.scale
        dq, *found = _flash_backward(grad, q, flat[0], flat[1], out, whole, scale, ctx.rest)
        mean = _dot(grad, out, whole.dtype)
        for k, v in zip(flat[2::2], flat[3::2], strict=True):
            p = (_dot(q, k, whole.dtype) * scale - whole).exp()
            slope = (p * (_dot(grad, v, whole.dtype) - mean) * scale).unsqueeze(-1).to(q.dtype)
            dq = dq.addcmul(slope, k)
            found += [slope * q, p.unsqueeze(-1).to(grad.dtype) * grad]
        return (None, dq, *found)


def _dot(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    return (x * y).sum(-1, dtype=dtype)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, list[Any]]:
    """Returns causal attention, its logarithms of sums `[B, H, T]`, and what its backward pass takes besides."""
    if not q.is_cuda:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        return out, lse, []
    out, lse, *rest = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
    return out, lse, rest


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, rest: list[Any]
) -> tuple[Tensor, Tensor, Tensor]:
    aten = torch.ops.aten
    dq: Tensor
    dk: Tensor
    dv: Tensor
    if not q.is_cuda:
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = backward(grad, q, k, v, out, lse, 0.0, True, scale=scale)
        return dq, dk, dv
    starts_q, starts_k, most_q, most_k, seed, offset, _ = rest
    dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, starts_q, starts_k, most_q, most_k, 0.0, True, seed, offset, scale=scale
    )
    return dq, dk, dv
