"""Mixture of experts: the gate of V3 (sigmoid, bias, groups) and of V2 (softmax), and the experts.

V3 report (2412.19437) eq. 12-16: scores s choose experts with a correction bias and weight them without it.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_spec.model.config import ModelConfig
from mtp_spec.model.distributed.group import ALONE, Ranks
from mtp_spec.model.layers import MLP, empty_parameter, gated_silu


class Gate(nn.Module):
    """Chooses `num_experts_per_tok` experts per row and weights them; float32 throughout."""

    def __init__(self, config: ModelConfig, device: torch.device | str) -> None:
        super().__init__()
        self.config = config
        experts, hidden = config.n_routed_experts, config.hidden_size
        self.weight = empty_parameter(experts, hidden, dtype=torch.float32, device=device)
        bias = torch.empty(experts, dtype=torch.float32, device=device)
        self.e_score_correction_bias: Tensor | None
        self.register_buffer("e_score_correction_bias", bias if config.has_gate_bias else None)

    @np.errstate(all="ignore")  # NaN and infinity are checked below
    def choose(self, x: Tensor) -> tuple[list[list[float]], list[list[int]]]:
        """Returns weights and experts of rows x `[M, D]`, experts in ascending order.

        Uses NumPy, whose functions give a number the same bits at every place in an array; torch's sigmoid does not.
        """
        config = self.config
        logits: npt.NDArray[np.float32] = row_products(x.float(), self.weight).detach().cpu().numpy()
        if config.scoring_func == "sigmoid":
            scores = 1 / (1 + np.exp(-logits))
        else:
            scores = np.exp(logits - logits.max(-1, keepdims=True))
            scores /= scores.sum(-1, keepdims=True)
        bias = self.e_score_correction_bias
        choice = scores if bias is None else scores + bias.cpu().numpy()
        # sorting is stable: among equals the lowest index wins
        best = np.argsort(-self._within_groups(choice), axis=-1, kind="stable")[:, : config.num_experts_per_tok]
        indices = np.sort(best, axis=-1)
        weights = scores[np.arange(len(scores))[:, None], indices].astype(np.float64)
        scale = np.full(len(weights), config.routed_scaling_factor)
        if config.norm_topk_prob and not config.is_v2:
            scale /= sum(weights.T) + 1e-20  # added one by one, in ascending order of experts
        weights *= scale[:, None]
        if not math.isfinite((logits + choice).sum()):  # sorting and sigmoid would hide it: pass it on
            weights[~np.isfinite(logits + choice).all(-1)] = math.nan
        return weights.tolist(), indices.tolist()

    def _within_groups(self, choice: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Returns -inf for experts outside each row's best `topk_group` groups."""
        config = self.config
        if config.topk_method == "greedy" or config.n_group == config.topk_group:
            return choice
        grouped = choice.reshape(len(choice), config.n_group, -1)
        best_of = 2 if config.topk_method == "noaux_tc" else 1
        worth = np.sort(grouped, axis=-1)[..., -best_of:].sum(-1, dtype=np.float64)
        best = np.argsort(-worth, axis=-1, kind="stable")[:, : config.topk_group]
        allowed, rows = np.full_like(grouped, -np.inf), np.arange(len(choice))[:, None]
        allowed[rows, best] = grouped[rows, best]
        return allowed.reshape(choice.shape)

    def checkpoint_slots(self, prefix: str) -> dict[str, Tensor]:
        slots: dict[str, Tensor] = {f"{prefix}.weight": self.weight}
        if self.e_score_correction_bias is not None:
            slots[f"{prefix}.e_score_correction_bias"] = self.e_score_correction_bias
        return slots


def row_products(x: Tensor, weight: Tensor) -> Tensor:
    """Returns x @ weight.T for float32 rows, each by the same arithmetic in any batch."""
    return torch.stack([torch.mv(weight, row) for row in x])


class MoE(nn.Module):
    """`shared(x) + sum over chosen experts of weight * expert(x)`, summed in ascending expert order.

    Every rank has some whole experts; all ranks choose alike, exchange the outputs and add them in that order.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str, ranks: Ranks = ALONE
    ) -> None:
        super().__init__()
        hidden, size = config.hidden_size, config.moe_intermediate_size
        experts, self.ranks = ranks.share(config.n_routed_experts, "n_routed_experts"), ranks
        self.size, self.experts, self.first = size, experts, ranks.rank * experts
        self.gate = Gate(config, device)
        self.gate_up = empty_parameter(experts, 2 * size, hidden, dtype=dtype, device=device)
        self.down = empty_parameter(experts, hidden, size, dtype=dtype, device=device)
        self.shared: MLP | None = None
        if config.n_shared_experts:
            self.shared = MLP(hidden, size * config.n_shared_experts, dtype, device, ranks)

    def forward(self, x: Tensor) -> Tensor:
        """Runs each chosen expert once over its rows; outputs return to [row, slot] before the sum."""
        weights, indices = self.gate.choose(x)
        rows, slots = len(indices), len(indices[0])
        flat = [expert for row in indices for expert in row]
        order, back = list(range(len(flat))), None
        if rows > 1:
            order = sorted(order, key=flat.__getitem__)  # pairs grouped by expert
            back = torch.tensor(sorted(range(len(flat)), key=order.__getitem__))
        counts = Counter(flat)
        here = range(self.first, self.first + self.experts)
        hit = [e for e in sorted(counts) if e in here]
        parts = [x] * len(hit)
        if rows > 1 and hit:
            own = torch.tensor([pair // slots for pair in order if flat[pair] in here])
            parts = list(x[own].split([counts[e] for e in hit]))
        ups = [F.linear(part, self.gate_up[e - self.first]) for part, e in zip(parts, hit, strict=True)]
        if self.shared is not None:
            ups.append(self.shared.begin(x))
        # one activation for all of them: in a decode step the number of operations costs more than arithmetic
        inner = self._activated(ups)
        outs = [F.linear(h, self.down[e - self.first]) for h, e in zip(inner, hit, strict=False)]
        by_rank = [sum(e // self.experts == rank for e in flat) for rank in range(self.ranks.size)]
        pairs = self.ranks.join(torch.cat(outs) if outs else x[:0], by_rank)
        out = (pairs if back is None else pairs[back]).view(rows, slots, -1)
        routed = weighted_sum(out, torch.tensor(weights, dtype=torch.float32, device=x.device))
        return routed if self.shared is None else routed + self.shared.finish(inner[-1])

    def _activated(self, ups: list[Tensor]) -> list[Tensor]:
        """Returns silu(gate) * up of each expert's `[rows, 2 I]`; the shared expert may have another I."""
        if not ups or any(up.shape[-1] != ups[0].shape[-1] for up in ups):
            return [gated_silu(up) for up in ups]
        return list(gated_silu(torch.cat(ups)).split([up.shape[0] for up in ups]))

    def checkpoint_slots(self, prefix: str) -> dict[str, Tensor]:
        slots = self.gate.checkpoint_slots(f"{prefix}.gate")
        for e in range(self.experts):
            name = f"{prefix}.experts.{self.first + e}"
            slots[f"{name}.gate_proj.weight"] = self.gate_up[e, : self.size]
            slots[f"{name}.up_proj.weight"] = self.gate_up[e, self.size :]
            slots[f"{name}.down_proj.weight"] = self.down[e]
        if self.shared is not None:
            slots |= self.shared.checkpoint_slots(f"{prefix}.shared_experts")
        return slots


def weighted_sum(out: Tensor, weights: Tensor) -> Tensor:
    """Returns `sum_k weights[m, k] * out[m, k]` `[M, D]`, summed in float32 in the order of k, in out's dtype."""
    weighted = out.float() * weights.unsqueeze(-1)
    if weighted.shape[1] <= 2:
        return weighted.sum(1).to(out.dtype)
    total = weighted[:, 0]
    for k in range(1, weighted.shape[1]):
        total = total + weighted[:, k]
    return total.to(out.dtype)
