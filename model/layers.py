"""Building blocks: RMSNorm, linear and the gated MLP.

Legend: `M` rows (tokens), `D` hidden size, `I` intermediate size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_spec.model.distributed.group import ALONE, Ranks

# the norms on MLA's latents keep this epsilon whatever `rms_norm_eps` says, as in the released weights
LATENT_NORM_EPS = 1e-6


def empty_parameter(*shape: int, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    """Returns an uninitialised parameter; the checkpoint loader proves that every one is filled."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))


class Linear(nn.Module):
    """`x @ weight.T`, weight `[N, K]`."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = empty_parameter(rows, columns, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight`, computed in float32 or wider, returned in the input's dtype."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = empty_parameter(size, dtype=dtype, device=device)
        self.eps = eps
        self.shape = (size,)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float32, torch.float64):
            return F.rms_norm(x, self.shape, self.weight, self.eps)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class MLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`; gate and up are one matrix, which saves a product per step.

    Args:
        hidden: D.
        intermediate: I.
        ranks: the ranks that divide the columns I and, for the second product, D.
    """

    def __init__(
        self, hidden: int, intermediate: int, dtype: torch.dtype, device: torch.device | str, ranks: Ranks = ALONE
    ) -> None:
        super().__init__()
        self.intermediate, self.ranks = ranks.share(intermediate, "intermediate_size"), ranks
        self.gate_up = Linear(2 * self.intermediate, hidden, dtype, device)
        self.down = Linear(ranks.share(hidden, "hidden_size"), intermediate, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(gated_silu(self.begin(x)))

    def begin(self, x: Tensor) -> Tensor:
        """Returns gate and up `[..., 2 I]` of rows x.

        Ranks exchange them before the activation, whose bits depend on a column's place within vectors.
        """
        both: Tensor = self.gate_up(x)
        return both if self.ranks.size == 1 else self.ranks.gather(both.unflatten(-1, (2, -1))).flatten(-2)

    def finish(self, inner: Tensor) -> Tensor:
        """Returns the outputs `[..., D]` of activated columns `[..., I]`."""
        return self.ranks.gather(self.down(inner))

    def checkpoint_slots(self, prefix: str) -> dict[str, Tensor]:
        return {
            f"{prefix}.gate_proj.weight": self.gate_up.weight[: self.intermediate],
            f"{prefix}.up_proj.weight": self.gate_up.weight[self.intermediate :],
            f"{prefix}.down_proj.weight": self.down.weight,
        }


def gated_silu(gate_up: Tensor) -> Tensor:
    """Returns silu(first half) * second half of the last dimension."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
