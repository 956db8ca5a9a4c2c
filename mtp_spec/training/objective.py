"""What modules are trained for: that the target accepts their drafts.

At each depth the draft distribution q is drawn towards the target's own distribution p of the same position, by any
mixture of cross-entropy with the text's token, the divergence KL(p, q), and total variation TV(p, q). Rejection
sampling accepts a draft with probability 1 - TV, and coupled sampling with at least half of that and about all of it;
a greedy draft is accepted when the likeliest tokens are equal. Cross-entropy and KL have gradients where q is far from
p, TV is what acceptance itself is made of.

Legend: `B` sequences, `T` tokens, `D` hidden size, `V` vocabulary, `K` depths, `N` rows of a batch that are trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_spec.errors import OptionError
from mtp_spec.kernels import divergence
from mtp_spec.model.training import ModulesForward

PARTS = ("ce", "kl", "tv")
LARGEST = 1e30  # of a weight, and of other options: float32 has room for it
CHUNK = {"cpu": 2**20, "cuda": 2**27}  # logits that are computed at once


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss.

    Attributes:
        ce, kl, tv: weights of cross-entropy with the text, of KL(p, q) and of TV(p, q).
        depths: weight of each depth.
    """

    ce: float
    kl: float
    tv: float
    depths: tuple[float, ...]

    @classmethod
    def of(cls, loss: str, depth: int, decay: float) -> Objective:
        """Returns the objective that options describe.

        Args:
            loss: parts and their weights, such as "kl" or "tv:0.9,ce:0.1".
            depth: K.
            decay: weight of a depth, relative to the one before; all add up to 1.

        Raises:
            OptionError: an unknown part, or a weight that is no positive number.
        """
        weights: dict[str, float] = {}
        for part in str(loss).split(","):
            name, _, number = part.strip().partition(":")
            try:
                weight = float(number) if number else 1.0
            except ValueError:
                weight = math.nan
            if name not in PARTS or name in weights or not 0 < weight <= LARGEST:
                raise OptionError(
                    f"loss={loss!r}: give some of {', '.join(PARTS)}, each with a positive weight, at most "
                    f"{LARGEST:g}, as tv:0.9,ce:0.1"
                )
            weights[name] = weight
        whole = [decay**number for number in range(depth)]
        depths = tuple(weight / sum(whole) for weight in whole)
        return cls(weights.get("ce", 0.0), weights.get("kl", 0.0), weights.get("tv", 0.0), depths)


@dataclass(slots=True)
class Outcome:
    """Sums over a batch.

    Attributes:
        loss: a scalar with gradients: the weighted mean over rows, summed over depths.
        rows: `[K]` weights of the rows of each depth.
        greedy: `[K]` how many drafts are the target's likeliest token.
        overlap: `[K]` sums of 1 - TV(p, q).
    """

    loss: Tensor
    rows: Tensor
    greedy: Tensor
    overlap: Tensor


def draft_loss(
    forward: ModulesForward, objective: Objective, ids: Tensor, hidden: Tensor, weights: Tensor,
    total: Callable[[Tensor], Tensor] = lambda x: x, chosen: Tensor | None = None, lengths: Tensor | None = None,
) -> Outcome:  # fmt: skip
    """Returns the loss of modules along a text, recursive to the objective's depth.

    Args:
        forward: the modules.
        ids: `[B, T]` the text, followed by as many padding tokens as there are depths.
        hidden: `[B, T, D]` the main model's normed hidden states.
        weights: `[B, T]` of each row of the main model as a target: row t predicts token t + 1; 0 leaves it out.
        total: sums the weights `[K]` over all processes that share a batch; each then has its part of the loss.
        chosen: `[N]` places of the weights that are not 0, and maybe of others, if they are known: else the device is
            waited for.
        lengths: `[B]` tokens of the texts, as for `ModulesForward.drafts`.
    """
    depths, shape = len(objective.depths), ids.shape
    chosen = weights.flatten().nonzero().squeeze(1) if chosen is None else chosen
    place = torch.arange(shape[1], device=ids.device).expand(shape).flatten()[chosen]
    tokens = ids.roll(-1, 1).flatten()[chosen]
    aligned, heads = list[Tensor](), list[Tensor]()
    for depth, output in forward.drafts(ids, hidden, depths, lengths):
        # row t of this depth is about token t + depth + 1, as is row t + depth of the main model
        moved = F.pad(output, (0, 0, depth, depths - depth))
        aligned.append(moved.flatten(0, 1)[chosen])
        heads.append(forward.head_of(min(depth, len(forward.modules)) - 1))
    own = weights.flatten()[chosen]
    rows = torch.stack([own * (place >= depth) for depth in range(1, depths + 1)])
    target = hidden.flatten(0, 1)[chosen]
    whole = total(rows.sum(1))
    each = _on_device(objective.depths, rows.dtype, rows.device) / whole.clamp_min(1e-30)
    loss, greedy, overlap = _Loss.apply(
        torch.stack(aligned), target, tokens, rows, each, forward.head, heads, objective
    )
    return Outcome(loss, whole, greedy, overlap)


@lru_cache(maxsize=16)
def _on_device(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns numbers as a tensor, copied once: a copy waits for the device."""
    return torch.tensor(numbers, dtype=dtype, device=device)


class _Loss(torch.autograd.Function):
    """The loss from hidden states, some rows at a time: logits of all rows and depths are never held together.

    Gradients with respect to the drafts' hidden states are computed on the way; the heads are frozen.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, drafts: Tensor, target: Tensor, tokens: Tensor, rows: Tensor,
        each: Tensor, head: Tensor, heads: Sequence[Tensor], objective: Objective,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Returns the loss, greedy matches `[K]` and overlaps `[K]` of drafts `[K, N, D]` and targets `[N, D]`; a row
        counts in the loss as its weight in `rows` `[K, N]` times `each` `[K]`."""
        depths, scale = len(drafts), rows * each[:, None]
        gradient = torch.empty_like(drafts)
        loss, greedy, overlap = rows.new_zeros(()), rows.new_zeros(depths), rows.new_zeros(depths)
        size = max(1, CHUNK[drafts.device.type] // len(head))
        for first in range(0, drafts.shape[1], size):
            part = slice(first, first + size)
            p = divergence.targets(F.linear(target[part], head))
            for depth in range(depths):
                q, counted = F.linear(drafts[depth, part], heads[depth]), rows[depth, part]
                found = divergence.divergence(
                    p, q, tokens[part], scale[depth, part], objective.ce, objective.kl, objective.tv
                )
                loss += (found.loss * scale[depth, part]).sum()
                greedy[depth] += (counted * found.equal).sum()
                overlap[depth] += (counted * found.overlap).sum()
                slope = found.slope.to(heads[depth].dtype)
                gradient[depth, part] = F.linear(slope, heads[depth].T).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(greedy, overlap)
        return loss, greedy, overlap

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *above: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return (gradient * above[0].to(gradient.dtype), *[None] * 7)
