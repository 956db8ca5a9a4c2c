"""The layers of the model on a GPU: attention, dense and expert MLPs of the kernels; ranks divide their matrices.

Legend: `M` rows, `D` hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_spec.kernels import fp8, gemm, mla, moe, quant
from mtp_spec.kernels.mla import Cache
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.distributed.group import ALONE, Ranks
from mtp_spec.model.errors import CheckpointError
from mtp_spec.model.layers import LATENT_NORM_EPS
from mtp_spec.model.rope import softmax_scale

BLOCK = fp8.BLOCK
SCALE = "_scale_inv"
Slots = dict[str, Tensor]


@dataclass(slots=True)
class Matrix:
    """A weight `[N, K]`: e4m3 with 128x128 scales, or bfloat16 without.

    Attributes:
        whole: rows of the matrix that this is, or is a rank's part of: how its products sum follows from these.
        power_of_two: whether the scales of what it is multiplied with are rounded up to powers of two ("ue8m0").
    """

    weight: Tensor
    scale: Tensor | None
    whole: int
    power_of_two: bool = False

    @classmethod
    def empty(
        cls, rows: int, columns: int, device: torch.device, packed: bool = True, whole: int | None = None,
        power_of_two: bool = False,
    ) -> Matrix:  # fmt: skip
        """Returns room for a matrix, or for `rows` of one of `whole`, from the beginning of a block of scales."""
        if not packed:
            return cls(torch.empty(rows, columns, dtype=torch.bfloat16, device=device), None, whole or rows)
        weight = torch.empty(rows, columns, dtype=fp8.E4M3, device=device)
        scales = torch.empty(_blocks(rows), _blocks(columns), dtype=torch.float32, device=device)
        return cls(weight, scales, whole or rows, power_of_two)

    def __call__(self, x: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Returns x @ weight.T in bfloat16; x `[M, K]` bfloat16, or e4m3 with scales for an FP8 weight."""
        if self.scale is None:
            assert isinstance(x, Tensor)
            return gemm.bf16_gemm(x, self.weight, launch=self._launch("bf16"))
        given = quant.quant(x, self.power_of_two) if isinstance(x, Tensor) else x
        return gemm.fp8_gemm(*given, self.weight, self.scale, launch=self._launch("fp8"))

    def _launch(self, kind: str) -> gemm.Launch:
        return gemm.default_launch(self.whole, self.weight.shape[1], kind, part=self.weight.shape[0])

    def slots(self, name: str, first: int = 0, rows: int | None = None) -> Slots:
        """Returns the places of a checkpoint tensor, and of its scales, that fill some of the rows."""
        end = self.weight.shape[0] if rows is None else first + rows
        out = {name: self.weight[first:end]}
        if self.scale is not None:
            out[name + SCALE] = self.scale[first // BLOCK : _blocks(end)]
        return out


class Attention:
    """One MLA layer; ranks have some of the heads each, and some of the outputs."""

    def __init__(self, config: ModelConfig, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.ranks, self.hidden = ranks, config.hidden_size
        heads = ranks.share(config.num_attention_heads, "num_attention_heads")
        for name, size in (("queries", config.qk_head_dim), ("values", config.v_head_dim),
                           ("keys and values", config.qk_nope_head_dim + config.v_head_dim)):  # fmt: skip
            ranks.share(config.num_attention_heads * size, f"the heads' {name} of", BLOCK)
        self.head = mla.Head(
            heads, config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank,
            config.v_head_dim, softmax_scale(config), config.rope_interleave, config.powers_of_two,
        )  # fmt: skip
        hidden, q_rows = config.hidden_size, heads * config.qk_head_dim
        whole = config.num_attention_heads * config.qk_head_dim
        self.q_rank = config.q_lora_rank
        self.a_rows, a_whole = (q_rows, whole) if self.q_rank is None else (self.q_rank, self.q_rank)
        # one product reads both down-projections, where the scales of the first end with its rows
        self.fused = self.a_rows % BLOCK == 0
        if self.fused:
            self.a = Matrix.empty(self.a_rows + self.head.width, hidden, device, whole=a_whole + self.head.width)
        else:
            self.a = Matrix.empty(self.a_rows, hidden, device, whole=a_whole)
            self.kv_a = Matrix.empty(self.head.width, hidden, device)
        self.q_norm: Tensor | None = None
        if self.q_rank is not None:
            self.q_norm = torch.empty(self.q_rank, dtype=torch.bfloat16, device=device)
            self.q_b = Matrix.empty(q_rows, self.q_rank, device, whole=whole)
        self.kv_norm = torch.empty(self.head.latent, dtype=torch.bfloat16, device=device)
        self.kv_b = Matrix.empty(self.head.heads * (self.head.nope + self.head.value), self.head.latent, device)
        outputs, columns = len(ranks.part(hidden, BLOCK)), config.num_attention_heads * self.head.value
        self.o = Matrix.empty(outputs, columns, device, whole=hidden)

    def __call__(self, x: tuple[Tensor, Tensor], table: Tensor, cache: Cache, plan: mla.Plan) -> Tensor:
        """Returns the outputs `[M, D]` of rows x (e4m3 with scales), which join the cache."""
        down = self.a(x) if self.fused else torch.cat((self.a(x), self.kv_a(x)), -1)
        latent = mla.prepare(down, self.q_norm, self.kv_norm, table, cache, plan, self.head, LATENT_NORM_EPS)
        q = down[:, : self.a_rows] if latent is None else self.q_b(latent)
        q = mla.absorb(q, self.kv_b.weight, self.kv_b.scale, table, plan, self.head)
        context = mla.attend(q, cache, plan, self.head)
        values = mla.up(context, self.kv_b.weight, self.kv_b.scale, self.head)
        return self.ranks.gather_parts(self.o(self.ranks.gather_all(*values)), self.hidden, BLOCK)

    def slots(self, prefix: str) -> Slots:
        first, kv = f"{prefix}.{'q_proj' if self.q_rank is None else 'q_a_proj'}.weight", "kv_a_proj_with_mqa.weight"
        out = self.a.slots(first, 0, self.a_rows)
        second, row = (self.a, self.a_rows) if self.fused else (self.kv_a, 0)
        out |= second.slots(f"{prefix}.{kv}", row, self.head.width)
        if self.q_norm is not None:
            out[f"{prefix}.q_a_layernorm.weight"] = self.q_norm
            out |= self.q_b.slots(f"{prefix}.q_b_proj.weight")
        out[f"{prefix}.kv_a_layernorm.weight"] = self.kv_norm
        return out | self.kv_b.slots(f"{prefix}.kv_b_proj.weight") | self.o.slots(f"{prefix}.o_proj.weight")


class Dense:
    """`down(silu(gate(x)) * up(x))`; ranks have some of the columns each, and some of the outputs."""

    def __init__(
        self, hidden: int, intermediate: int, device: torch.device, ranks: Ranks = ALONE, power_of_two: bool = False
    ) -> None:
        self.ranks, self.hidden, self.power_of_two = ranks, hidden, power_of_two
        inner = ranks.share(intermediate, "intermediate_size", BLOCK)
        # gate and up are quantised on their own: their scales meet where the rows do only at whole blocks
        self.inner, self.fused = inner, inner % BLOCK == 0
        each = 2 if self.fused else 1
        self.parts = [Matrix.empty(each * inner, hidden, device, whole=each * intermediate) for _ in range(3 - each)]
        self.down = Matrix.empty(len(ranks.part(hidden, BLOCK)), intermediate, device, whole=hidden)

    def __call__(self, x: tuple[Tensor, Tensor]) -> Tensor:
        both = [part(x) for part in self.parts]
        inner = quant.silu_mul_quant(both[0] if self.fused else torch.cat(both, -1), self.power_of_two)
        return self.ranks.gather_parts(self.down(self.ranks.gather_all(*inner)), self.hidden, BLOCK)

    def slots(self, prefix: str) -> Slots:
        up, row = (self.parts[0], self.inner) if self.fused else (self.parts[1], 0)
        return (
            self.parts[0].slots(f"{prefix}.gate_proj.weight", 0, self.inner)
            | up.slots(f"{prefix}.up_proj.weight", row, self.inner)
            | self.down.slots(f"{prefix}.down_proj.weight")
        )


class Mixture:
    """Routed experts; the shared expert's parts are further experts that every row chooses.

    Ranks have some of the columns of every expert, and some of its outputs: a step's few experts then keep all equally
    busy, where experts placed whole would leave one rank waiting for the other.
    """

    def __init__(self, config: ModelConfig, device: torch.device, router: torch.dtype, ranks: Ranks = ALONE) -> None:
        hidden, shared, self.ranks = config.hidden_size, config.n_shared_experts, ranks
        self.inner = ranks.share(config.moe_intermediate_size, "moe_intermediate_size", BLOCK)
        if ranks.size > 1 and shared > 1:
            raise CheckpointError(f"n_shared_experts {shared}: several ranks run one at most on the FP8 kernels")
        self.routed, self.shared, self.hidden = config.n_routed_experts, shared, hidden
        limited = config.topk_method != "greedy" and config.topk_group < config.n_group
        self.routing = moe.Routing(
            experts=self.routed, chosen=config.num_experts_per_tok, shared=shared,
            groups=config.n_group if limited else 1, kept_groups=config.topk_group if limited else 1,
            best=2 if config.topk_method == "noaux_tc" else 1, scoring=config.scoring_func,
            normalise=config.norm_topk_prob and not config.is_v2,
            scale=config.routed_scaling_factor,
        )  # fmt: skip
        self.router = torch.empty(self.routed, hidden, dtype=router, device=device)
        self.bias = torch.empty(self.routed, dtype=torch.float32, device=device) if config.has_gate_bias else None
        count, outputs, inner = self.routed + shared, len(ranks.part(hidden, BLOCK)), config.moe_intermediate_size
        self.experts = moe.Experts(
            torch.empty(count, 2 * self.inner, hidden, dtype=fp8.E4M3, device=device),
            torch.empty(count, 2 * _blocks(self.inner), _blocks(hidden), dtype=torch.float32, device=device),
            torch.empty(count, outputs, inner, dtype=fp8.E4M3, device=device),
            torch.empty(count, _blocks(outputs), _blocks(inner), dtype=torch.float32, device=device),
            config.powers_of_two,
        )

    def __call__(self, x: Tensor) -> Tensor:
        exchange = self.ranks.gather_all if self.ranks.size > 1 else None
        out = moe.moe(x, self.router, self.bias, self.routing, self.experts, exchange=exchange)
        return self.ranks.gather_parts(out, self.hidden, BLOCK)

    def slots(self, prefix: str) -> Slots:
        out = {f"{prefix}.gate.weight": self.router}
        if self.bias is not None:
            out[f"{prefix}.gate.e_score_correction_bias"] = self.bias
        ex, narrow = self.experts, _blocks(self.inner)
        for e in range(self.routed):
            name = f"{prefix}.experts.{e}"
            for part, rows, blocks in (("gate_proj", slice(0, self.inner), slice(0, narrow)),
                                       ("up_proj", slice(self.inner, None), slice(narrow, None))):  # fmt: skip
                out[f"{name}.{part}.weight"] = ex.gate_up[e, rows]
                out[f"{name}.{part}.weight{SCALE}"] = ex.gate_up_scale[e, blocks]
            out[f"{name}.down_proj.weight"] = ex.down[e]
            out[f"{name}.down_proj.weight{SCALE}"] = ex.down_scale[e]
        if self.shared:
            # one MLP of width shared * I in the checkpoint, `shared` experts of width I here
            s, name = slice(self.routed, None), f"{prefix}.shared_experts"
            for part, rows, blocks in (("gate_proj", slice(0, self.inner), slice(0, narrow)),
                                       ("up_proj", slice(self.inner, None), slice(narrow, None))):  # fmt: skip
                out[f"{name}.{part}.weight"] = ex.gate_up[s, rows]
                out[f"{name}.{part}.weight{SCALE}"] = ex.gate_up_scale[s, blocks]
            # [shared, D, I] seen as [D, shared, I]: the rows of the checkpoint's matrix
            out[f"{name}.down_proj.weight"] = ex.down[s].transpose(0, 1)
            out[f"{name}.down_proj.weight{SCALE}"] = ex.down_scale[s].transpose(0, 1)
        return out


class Layer:
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`; the second sum is left to whoever reads it.

    `dense` is the width of a dense MLP, None for experts.
    """

    def __init__(
        self, config: ModelConfig, dense: int | None, device: torch.device, router: torch.dtype, ranks: Ranks = ALONE
    ) -> None:
        hidden, self.eps, self.power_of_two = config.hidden_size, config.rms_norm_eps, config.powers_of_two
        self.norms = torch.empty(2, hidden, dtype=torch.bfloat16, device=device)
        self.attention = Attention(config, device, ranks)
        self.mlp: Dense | Mixture = (
            Mixture(config, device, router, ranks)
            if dense is None
            else Dense(hidden, dense, device, ranks, config.powers_of_two)
        )

    def __call__(
        self, x: Tensor, branch: Tensor | None, table: Tensor, cache: Cache, plan: mla.Plan
    ) -> tuple[Tensor, Tensor]:
        """Returns the stream and the branch still to be added to it, `[M, D]` each, of such a pair."""
        quantised, scales, x = quant.rms_norm_quant(x, self.norms[0], self.eps, branch, self.power_of_two)
        branch = self.attention((quantised, scales), table, cache, plan)
        if isinstance(self.mlp, Mixture):
            normed, x = quant.rms_norm(x, self.norms[1], self.eps, branch)
            return x, self.mlp(normed)
        quantised, scales, x = quant.rms_norm_quant(x, self.norms[1], self.eps, branch, self.power_of_two)
        return x, self.mlp((quantised, scales))

    def slots(self, prefix: str) -> Slots:
        norms = (f"{prefix}.input_layernorm.weight", f"{prefix}.post_attention_layernorm.weight")
        return (
            dict(zip(norms, self.norms, strict=True))
            | self.attention.slots(f"{prefix}.self_attn")
            | self.mlp.slots(f"{prefix}.mlp")
        )


def _blocks(size: int) -> int:
    return -(-size // BLOCK)
