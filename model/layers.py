"""Building blocks: RMSNorm, linear and the gated MLP.

Legend: `M` rows (tokens), `D` hidden size, `I` intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_spec.model.parallel import ALONE, Ranks
from mtp_spec.model.steady import LARGEST, MOST, Key, Limits, cancelling, probe, steadily

# the norms on MLA's latents keep this epsilon whatever `rms_norm_eps` says, as in the released weights
LATENT_NORM_EPS = 1e-6


def empty_parameter(*shape: int, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    """Returns an uninitialised parameter; the checkpoint loader proves that every one is filled."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))


def packed(weight: Tensor) -> Tensor | None:
    """Returns a copy of a matrix `[N, K]` in oneDNN's own layout, or None where it has none.

    A product otherwise brings the matrix into that layout every time, which for a few rows costs as much as the
    product. Results are the same to the last bit.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return None
    try:
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
    except (AttributeError, RuntimeError, NotImplementedError):  # another build of torch, or no bfloat16 here
        return None


def product(x: Tensor, weight: Tensor, layout: Tensor | None = None) -> Tensor:
    """Returns x @ weight.T of rows within the limits of `steady`; `layout` is the weight as `packed` left it."""
    if x.dim() != 2:
        return _multiplied(x, weight, layout)
    return steadily(partial(_multiplied, weight=weight, layout=layout), x, product_name(weight, layout))


def _multiplied(x: Tensor, weight: Tensor, layout: Tensor | None) -> Tensor:
    if layout is None:
        return F.linear(x, weight)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, layout, None, "none", [], "")
    return out


def product_name(weight: Tensor, layout: Tensor | None) -> Key:
    """Returns what the loops of `product` may depend on besides rows and threads."""
    return (*weight.shape, weight.dtype, layout is None)


def probe_product(weight: Tensor, layout: Tensor | None) -> Limits:
    """Returns the limits of `product` with a matrix like this one."""

    def prepare() -> tuple[Callable[[Tensor], Tensor], Tensor]:
        if weight.numel() > LARGEST:  # it has so many outputs that noise tells as well
            noise = torch.randn(MOST, weight.shape[1], generator=torch.Generator().manual_seed(0))
            return partial(_multiplied, weight=weight, layout=layout), noise.to(weight.dtype)
        x, own = cancelling((MOST,), (weight.shape[0],), weight.shape[1])
        return partial(_multiplied, weight=own, layout=None if layout is None else packed(own)), x

    return probe(product_name(weight, layout), prepare)


class Linear(nn.Module):
    """`x @ weight.T`, weight `[N, K]`."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = empty_parameter(rows, columns, dtype=dtype, device=device)
        self.layout: Tensor | None = None

    def pack(self) -> None:
        """Prepares for inference; later changes of the weight are not seen."""
        self.layout = packed(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.layout)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight`, computed in float32, returned in the input's dtype."""

    def __init__(
        self, size: int, eps: float, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.weight = empty_parameter(size, dtype=dtype, device=device)
        self.eps = eps
        self.shape = (size,)
        self._mirrored: Tensor | None = None

    def pack(self) -> None:
        """Prepares for inference in bfloat16 on a CPU, where one fused operation beats eight."""
        if self.weight.device.type == "cpu" and self.weight.dtype == torch.bfloat16:
            self._mirrored = torch.cat((self.weight, self.weight)).detach()

    def forward(self, x: Tensor) -> Tensor:
        if self._mirrored is not None:
            # layer norm of [x, -x] has mean 0 and variance mean(x^2): it is RMSNorm, and it is fused
            both = torch.cat((x, x.neg()), dim=-1)
            return F.layer_norm(both, self._mirrored.shape, self._mirrored, None, self.eps)[..., : self.shape[0]]
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.shape, self.weight, self.eps)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class MLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`; gate and up are one matrix, so that a step makes one product less.

    Args:
        hidden: D.  intermediate: I.
        ranks: divide the columns of I and, of the second product, of D.
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

        Ranks exchange them before the activation, whose bits depend on where a column stands among vectors.
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
