"""How far drafts are from their targets: the losses of `train` and their gradients, from logits, in one pass each.

With p and q the distributions of target and draft: cross-entropy with a token, KL(p, q), and total variation TV(p, q).
One program works on one row, and logits are read as they are: nothing as large as they are is kept but the gradient.

Legend: `N` rows, `V` vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mtp_spec.kernels.checks import FLOATS, expect
from mtp_spec.kernels.launching import runs_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: the references remain
    triton = None

SIZE = 4096  # logits of a row that a program holds at a time
LOWEST = -1e30


class Targets(NamedTuple):
    """Rows that drafts are compared with.

    Attributes:
        logits: `[N, V]`.
        sums: `[N]` float32, logarithms of their sums of exponentials.
        best: `[N]` int64, the likeliest tokens; the first of equals.
        entropies: `[N]` float32, negative entropies.
    """

    logits: Tensor
    sums: Tensor
    best: Tensor
    entropies: Tensor


class Divergence(NamedTuple):
    """What `divergence` returns.

    Attributes:
        loss: `[N]` float32, not weighted.
        overlap: `[N]` float32, 1 - TV.
        equal: `[N]` bool, whether draft and target have one likeliest token.
        slope: `[N, V]` in the logits' dtype, the loss's gradient with respect to the draft's logits, weighted.
    """

    loss: Tensor
    overlap: Tensor
    equal: Tensor
    slope: Tensor


def targets(logits: Tensor) -> Targets:
    """Returns what drafts of rows `[N, V]` are compared with."""
    if not runs_triton(logits):
        return targets_reference(logits)
    expect("logits", logits, (None, None), FLOATS)
    rows, vocabulary = logits.shape
    sums = torch.empty(rows, dtype=torch.float32, device=logits.device)
    entropies, best = torch.empty_like(sums), torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        _targets_kernel[(rows,)](logits, sums, best, entropies, vocabulary, SIZE=SIZE, LOWEST=LOWEST, num_warps=8)
    return Targets(logits, sums, best, entropies)


def targets_reference(logits: Tensor) -> Targets:
    """`targets` in plain torch."""
    sums = wide(logits).logsumexp(-1)
    log_p = wide(logits) - sums[:, None]
    return Targets(logits, sums, log_p.argmax(-1), torch.linalg.vecdot(log_p.exp(), log_p))


def divergence(p: Targets, q: Tensor, tokens: Tensor, weights: Tensor, ce: float, kl: float, tv: float) -> Divergence:
    """Returns `ce` cross-entropy + `kl` KL(p, q) + `tv` TV(p, q) of each row, and its gradient.

    Args:
        q: `[N, V]` logits of drafts.
        tokens: `[N]` int64, of the cross-entropy.
        weights: `[N]` float32, of the rows' gradients.
    """
    if not runs_triton(q):
        return divergence_reference(p, q, tokens, weights, ce, kl, tv)
    rows, vocabulary = p.logits.shape
    expect("q", q, (rows, vocabulary), FLOATS, beside=p.logits)
    expect("tokens", tokens, (rows,), torch.int64, beside=q)
    expect("weights", weights, (rows,), torch.float32, beside=q)
    loss, slope = torch.empty(rows, dtype=torch.float32, device=q.device), torch.empty_like(q)
    overlap, equal = torch.empty_like(loss), torch.empty(rows, dtype=torch.bool, device=q.device)
    if rows:
        _divergence_kernel[(rows,)](
            p.logits, q, tokens, p.sums, p.best, p.entropies, weights, loss, overlap, equal, slope, vocabulary,
            float(ce), float(kl), float(tv), SIZE=SIZE, LOWEST=LOWEST, num_warps=8,
        )  # fmt: skip
    return Divergence(loss, overlap, equal, slope)


def divergence_reference(
    p: Targets, q: Tensor, tokens: Tensor, weights: Tensor, ce: float, kl: float, tv: float
) -> Divergence:
    """`divergence` in plain torch."""
    # both by the same arithmetic: where draft and target are equal TV has no slope
    chances = (wide(p.logits) - p.sums[:, None]).exp_()
    log_q = wide(q)
    log_q = log_q - log_q.logsumexp(-1, keepdim=True)
    drafted = log_q.exp()
    slope = drafted - chances
    half = 0.5 * torch.linalg.vector_norm(slope, 1, -1)
    loss = tv * half
    if kl:
        loss = loss + kl * (p.entropies - torch.linalg.vecdot(chances, log_q))
    # with respect to the logits: q (ce + kl + tv / 2 (sign - sum q sign)) - kl p, and -ce at the own token
    if tv:
        slope.sign_()
        slope.sub_(torch.linalg.vecdot(drafted, slope)[:, None]).mul_(0.5 * tv)
        slope.add_(ce + kl).mul_(drafted)
    else:
        slope = drafted * (ce + kl)
    if kl:
        slope.sub_(chances, alpha=kl)
    if ce:
        own = tokens[:, None]
        loss = loss - ce * log_q.gather(-1, own).squeeze(-1)
        slope.scatter_add_(-1, own, torch.full_like(own, -ce, dtype=slope.dtype))
    slope *= weights[:, None]
    return Divergence(loss, 1 - half, log_q.argmax(-1) == p.best, slope.to(q.dtype))


def wide(x: Tensor) -> Tensor:
    """Returns x in float32, or unchanged if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


if triton is not None:

    @triton.jit
    def _row_sum(logits, offset, vocabulary, SIZE: tl.constexpr, LOWEST: tl.constexpr):
        """Returns a row's largest logit, its place, the sum of exponentials over it, and that weighted by logits."""
        top, total, weighted, likeliest = LOWEST, 0.0, 0.0, 0
        for first in range(0, vocabulary, SIZE):
            at = first + tl.arange(0, SIZE)
            x = tl.load(logits + offset + at, mask=at < vocabulary, other=LOWEST).to(tl.float32)
            most, place = tl.max(x, axis=0, return_indices=True)
            likeliest = tl.where(most > top, first + place, likeliest)
            new = tl.maximum(top, most)
            each = tl.where(at < vocabulary, tl.exp(x - new), 0.0)
            before = tl.exp(top - new)
            total = total * before + tl.sum(each, axis=0)
            weighted = weighted * before + tl.sum(each * x, axis=0)
            top = new
        return top, likeliest, total, weighted

    @triton.jit
    def _targets_kernel(logits, sums, best, entropies, vocabulary, SIZE: tl.constexpr, LOWEST: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        top, likeliest, total, weighted = _row_sum(logits, row * vocabulary, vocabulary, SIZE, LOWEST)
        whole = top + tl.log(total)
        tl.store(sums + row, whole)
        tl.store(best + row, likeliest.to(tl.int64))
        tl.store(entropies + row, weighted / total - whole)

    @triton.jit
    def _both(p, q, offset, at, vocabulary, sum_p, sum_q):
        """Returns the target's chances, the draft's and their logarithms, 0 past the vocabulary."""
        inside = at < vocabulary
        log_p = tl.load(p + offset + at, mask=inside, other=0.0).to(tl.float32) - sum_p
        log_q = tl.load(q + offset + at, mask=inside, other=0.0).to(tl.float32) - sum_q
        return tl.where(inside, tl.exp(log_p), 0.0), tl.where(inside, tl.exp(log_q), 0.0), log_q

    @triton.jit
    def _sign(x):
        return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))

    @triton.jit
    def _divergence_kernel(
        p, q, tokens, sums, best, entropies, weights, losses, overlaps, equals, slopes, vocabulary, ce, kl, tv,
        SIZE: tl.constexpr, LOWEST: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        offset = row * vocabulary
        top, likeliest, total, _weighted = _row_sum(q, offset, vocabulary, SIZE, LOWEST)
        sum_p, sum_q = tl.load(sums + row), top + tl.log(total)
        distance, cross, signs = 0.0, 0.0, 0.0
        for first in range(0, vocabulary, SIZE):
            at = first + tl.arange(0, SIZE)
            chance, drafted, log_q = _both(p, q, offset, at, vocabulary, sum_p, sum_q)
            apart = drafted - chance
            distance += tl.sum(tl.abs(apart), axis=0)
            cross += tl.sum(chance * log_q, axis=0)
            signs += tl.sum(drafted * _sign(apart), axis=0)
        token = tl.load(tokens + row)
        own = tl.load(q + offset + token).to(tl.float32) - sum_q
        tl.store(losses + row, tv * 0.5 * distance + kl * (tl.load(entropies + row) - cross) - ce * own)
        tl.store(overlaps + row, 1 - 0.5 * distance)
        tl.store(equals + row, likeliest.to(tl.int64) == tl.load(best + row))
        weight = tl.load(weights + row)
        for first in range(0, vocabulary, SIZE):
            at = first + tl.arange(0, SIZE)
            chance, drafted, log_q = _both(p, q, offset, at, vocabulary, sum_p, sum_q)
            slope = drafted * (ce + kl + 0.5 * tv * (_sign(drafted - chance) - signs)) - kl * chance
            slope = (slope - tl.where(at == token, ce, 0.0)) * weight
            tl.store(slopes + offset + at, slope.to(slopes.dtype.element_ty), mask=at < vocabulary)
