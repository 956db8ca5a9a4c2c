"""The model's layers on a GPU: attention, dense and expert MLPs made of the kernels; ranks divide their matrices.

Every matrix is multiplied as the checkpoint stores it: e4m3 with block scales by quantised activations, bfloat16 or
float16 by activations of that type. One model may have both.

Legend: `M` rows, `D` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_spec.kernels import fp8, gemm, mla, moe, quant
from mtp_spec.kernels.mla import Cache
from mtp_spec.kernels.quant import Operand
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.distributed.group import ALONE, Ranks
from mtp_spec.model.errors import CheckpointError
from mtp_spec.model.layers import LATENT_NORM_EPS
from mtp_spec.model.rope import softmax_scale

BLOCK = fp8.BLOCK
SCALE = "_scale_inv"
KV_A = "kv_a_proj_with_mqa"
Slots = dict[str, Tensor]


@dataclass(slots=True)
class Matrix:
    """A weight `[N, K]`: e4m3 with 128x128 scales, or bfloat16 or float16 without.

    Attributes:
        whole: rows of the full matrix, of which this may be a rank's part: they decide the order of its sums.
        dtype: of activations.
        power_of_two: whether scales of the other operand are rounded up to powers of two ("ue8m0").
    """

    weight: Tensor
    scale: Tensor | None
    whole: int
    dtype: torch.dtype = torch.bfloat16
    power_of_two: bool = False

    @property
    def packed(self) -> bool:
        """Whether it is e4m3."""
        return self.scale is not None

    def __call__(self, x: Operand, dtype: torch.dtype | None = None) -> Tensor:
        """Returns x @ weight.T in `dtype`, by default that of activations.

        Args:
            x: `[M, K]`, or for an FP8 weight also e4m3 with scales.
        """
        if self.scale is None:
            assert isinstance(x, Tensor)
            return gemm.bf16_gemm(x, self.weight, dtype=dtype or self.weight.dtype, launch=self._launch("bf16"))
        given = quant.quant(x, self.power_of_two) if isinstance(x, Tensor) else x
        out = dtype or self.dtype
        return gemm.fp8_gemm(*given, self.weight, self.scale, dtype=out, launch=self._launch("fp8"))

    def _launch(self, kind: str) -> gemm.Launch:
        return gemm.default_launch(self.whole, self.weight.shape[1], kind, part=self.weight.shape[0])

    def slots(self, name: str, first: int = 0, rows: int | None = None) -> Slots:
        """Returns the places of a checkpoint tensor, and of its scales, that fill some of the rows."""
        end = self.weight.shape[0] if rows is None else first + rows
        out = {name: self.weight[first:end]}
        if self.scale is not None:
            out[name + SCALE] = self.scale[first // BLOCK : _blocks(end)]
        return out


@dataclass(frozen=True, slots=True)
class Store:
    """How the weights of a model are stored on its device.

    Attributes:
        device: where they are.
        packed: whether the checkpoint's matrix of that name is kept in e4m3 with scales.
        dtype: of activations, the cache and weights that are not packed: bfloat16 or float16.
        router: dtype of the gates.
        power_of_two: see `Matrix`.
    """

    device: torch.device
    packed: Callable[[str], bool]
    dtype: torch.dtype = torch.bfloat16
    router: torch.dtype = torch.bfloat16
    power_of_two: bool = False

    def matrix(self, rows: int, columns: int, packed: bool, whole: int | None = None) -> Matrix:
        """Returns an empty matrix, or `rows` of one of `whole` rows, beginning at a block of scales."""
        if not packed:
            return Matrix(self.empty(rows, columns), None, whole or rows, self.dtype)
        scales = self.empty(_blocks(rows), _blocks(columns), dtype=torch.float32)
        return Matrix(self.empty(rows, columns, dtype=fp8.E4M3), scales, whole or rows, self.dtype, self.power_of_two)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Returns an empty tensor, of activations' dtype unless another is given."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def all_packed(self, prefix: str, *names: str) -> bool:
        """Whether all these matrices are packed: those that one product reads must share a format."""
        return all(self.packed(f"{prefix}.{name}.weight") for name in names)


class Attention:
    """One MLA layer; heads and outputs are divided among the ranks."""

    def __init__(self, config: ModelConfig, store: Store, prefix: str, ranks: Ranks = ALONE) -> None:
        self.ranks, self.hidden = ranks, config.hidden_size
        heads = ranks.share(config.num_attention_heads, "num_attention_heads")
        for name, size in (("queries", config.qk_head_dim), ("values", config.v_head_dim),
                           ("keys and values", config.qk_nope_head_dim + config.v_head_dim)):  # fmt: skip
            ranks.share(config.num_attention_heads * size, f"the heads' {name} of", BLOCK)
        self.head = mla.Head(
            heads, config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank,
            config.v_head_dim, softmax_scale(config), config.rope_interleave, config.powers_of_two, store.dtype,
        )  # fmt: skip
        hidden, q_rows = config.hidden_size, heads * config.qk_head_dim
        whole = config.num_attention_heads * config.qk_head_dim
        self.q_rank = config.q_lora_rank
        self.a_rows, a_whole = (q_rows, whole) if self.q_rank is None else (self.q_rank, self.q_rank)
        packed = store.all_packed(prefix, _query(config), KV_A)
        # one product reads both down-projections if the scales of the first, if any, end with its rows
        self.fused = not packed or self.a_rows % BLOCK == 0
        if self.fused:
            self.a = store.matrix(self.a_rows + self.head.width, hidden, packed, a_whole + self.head.width)
        else:
            self.a = store.matrix(self.a_rows, hidden, packed, a_whole)
            self.kv_a = store.matrix(self.head.width, hidden, packed)
        self.q_norm: Tensor | None = None
        if self.q_rank is not None:
            self.q_norm = store.empty(self.q_rank)
            self.q_b = store.matrix(q_rows, self.q_rank, store.all_packed(prefix, "q_b_proj"), whole)
        self.kv_norm = store.empty(self.head.latent)
        kv_rows = self.head.heads * (self.head.nope + self.head.value)
        self.kv_b = store.matrix(kv_rows, self.head.latent, store.all_packed(prefix, "kv_b_proj"))
        outputs, columns = len(ranks.part(hidden, BLOCK)), config.num_attention_heads * self.head.value
        self.o = store.matrix(outputs, columns, store.all_packed(prefix, "o_proj"), hidden)

    def __call__(self, x: Operand, table: Tensor, cache: Cache, plan: mla.Plan | mla.Spans) -> Tensor:
        """Appends rows x (as `a` takes them) to the cache and returns their outputs `[M, D]`."""
        down = self.a(x) if self.fused else torch.cat((self.a(x), self.kv_a(x)), -1)
        values: Operand
        if isinstance(plan, mla.Plan):
            values = self._absorbed(self._query(down, table, cache, plan), table, cache, plan, self.o.packed)
        else:
            wide = self._values(down, table, cache, plan)
            values = quant.quant(wide, self.head.power_of_two) if self.o.packed else wide
        return self.ranks.gather_parts(self.o(_gathered(values, self.ranks)), self.hidden, BLOCK)

    def _latent(self, down: Tensor, table: Tensor, cache: Cache, plan: mla.Plan) -> Operand | None:
        """Writes the rows' latents to the cache; returns the query's, if it has one."""
        quantise = self.q_rank is not None and self.q_b.packed
        return mla.prepare(down, self.q_norm, self.kv_norm, table, cache, plan, self.head, LATENT_NORM_EPS, quantise)

    def _query(self, down: Tensor, table: Tensor, cache: Cache, plan: mla.Plan) -> Tensor:
        """Writes the rows' latents to the cache; returns their queries `[M, H (N + R)]`, not rotated yet."""
        latent = self._latent(down, table, cache, plan)
        return down[:, : self.a_rows] if latent is None else self.q_b(latent)

    def _absorbed(
        self, q: Tensor, table: Tensor, cache: Cache, plan: mla.Plan, quantise: bool, out: Tensor | None = None
    ) -> Operand:
        """Returns the values `[M, H V]` of queries, by attention in the latent space."""
        q = mla.absorb(q, self.kv_b.weight, self.kv_b.scale, table, plan, self.head)
        context = mla.attend(q, cache, plan, self.head)
        return mla.up(context, self.kv_b.weight, self.kv_b.scale, self.head, quantise, out)

    def _values(self, down: Tensor, table: Tensor, cache: Cache, spans: mla.Spans) -> Tensor:
        """Returns the values `[M, H V]` of prompts' rows: products for all of them, attention for one after another."""
        latents = [self._latent(down[span.first : span.end], table, cache, span.plan) for span in spans]
        q = down[:, : self.a_rows] if self.q_norm is None else self.q_b(_joined([x for x in latents if x is not None]))
        out = q.new_empty(len(q), self.head.heads * self.head.value)
        for span in spans:
            middle = span.first + span.expanded
            if span.expanded:
                mla.attend_prompt(
                    q[span.first : middle], self.kv_b.weight, self.kv_b.scale, table, cache, span.plan, span.start,
                    self.head, out[span.first : middle],
                )  # fmt: skip
            if span.rest is not None:
                self._absorbed(q[middle : span.end], table, cache, span.rest, False, out[middle : span.end])
        return out

    def slots(self, prefix: str) -> Slots:
        first = "q_proj" if self.q_rank is None else "q_a_proj"
        out = self.a.slots(f"{prefix}.{first}.weight", 0, self.a_rows)
        second, row = (self.a, self.a_rows) if self.fused else (self.kv_a, 0)
        out |= second.slots(f"{prefix}.{KV_A}.weight", row, self.head.width)
        if self.q_norm is not None:
            out[f"{prefix}.q_a_layernorm.weight"] = self.q_norm
            out |= self.q_b.slots(f"{prefix}.q_b_proj.weight")
        out[f"{prefix}.kv_a_layernorm.weight"] = self.kv_norm
        return out | self.kv_b.slots(f"{prefix}.kv_b_proj.weight") | self.o.slots(f"{prefix}.o_proj.weight")


class Dense:
    """`down(silu(gate(x)) * up(x))`; columns and outputs are divided among the ranks."""

    def __init__(self, hidden: int, intermediate: int, store: Store, prefix: str, ranks: Ranks = ALONE) -> None:
        self.ranks, self.hidden, self.power_of_two = ranks, hidden, store.power_of_two
        inner = ranks.share(intermediate, "intermediate_size", BLOCK)
        self.packed = store.all_packed(prefix, "gate_proj", "up_proj")
        # gate and up are quantised separately: their scales join where the rows do only at whole blocks
        self.inner, self.fused = inner, not self.packed or inner % BLOCK == 0
        each = 2 if self.fused else 1
        self.parts = [store.matrix(each * inner, hidden, self.packed, each * intermediate) for _ in range(3 - each)]
        outputs = len(ranks.part(hidden, BLOCK))
        self.down = store.matrix(outputs, intermediate, store.all_packed(prefix, "down_proj"), hidden)

    @property
    def second_packed(self) -> bool:
        """Whether the second product is FP8."""
        return self.down.packed

    def __call__(self, x: Operand) -> Tensor:
        parts = [part(x) for part in self.parts]
        both = parts[0] if self.fused else torch.cat(parts, -1)
        inner = quant.silu_mul_quant(both, self.power_of_two) if self.down.packed else quant.silu_mul(both)
        return self.ranks.gather_parts(self.down(_gathered(inner, self.ranks)), self.hidden, BLOCK)

    def slots(self, prefix: str) -> Slots:
        up, row = (self.parts[0], self.inner) if self.fused else (self.parts[1], 0)
        return (
            self.parts[0].slots(f"{prefix}.gate_proj.weight", 0, self.inner)
            | up.slots(f"{prefix}.up_proj.weight", row, self.inner)
            | self.down.slots(f"{prefix}.down_proj.weight")
        )


class Mixture:
    """Routed experts; the shared expert's parts are additional experts that every row chooses.

    Every expert's columns and outputs are divided among the ranks: a step's few experts then keep all ranks equally
    busy, whereas with whole experts per rank some ranks would wait for others.
    """

    def __init__(self, config: ModelConfig, store: Store, prefix: str, ranks: Ranks = ALONE) -> None:
        hidden, shared, self.ranks = config.hidden_size, config.n_shared_experts, ranks
        self.inner = ranks.share(config.moe_intermediate_size, "moe_intermediate_size", BLOCK)
        if ranks.size > 1 and shared > 1:
            raise CheckpointError(f"n_shared_experts {shared}: several ranks run one at most on the kernels")
        self.routed, self.shared, self.hidden = config.n_routed_experts, shared, hidden
        limited = config.topk_method != "greedy" and config.topk_group < config.n_group
        self.routing = moe.Routing(
            experts=self.routed, chosen=config.num_experts_per_tok, shared=shared,
            groups=config.n_group if limited else 1, kept_groups=config.topk_group if limited else 1,
            best=2 if config.topk_method == "noaux_tc" else 1, scoring=config.scoring_func,
            normalise=config.norm_topk_prob and not config.is_v2,
            scale=config.routed_scaling_factor,
        )  # fmt: skip
        self.router = store.empty(self.routed, hidden, dtype=store.router)
        self.bias = store.empty(self.routed, dtype=torch.float32) if config.has_gate_bias else None
        count, outputs, inner = self.routed + shared, len(ranks.part(hidden, BLOCK)), config.moe_intermediate_size
        names = [f"experts.{expert}" for expert in range(self.routed)] + ["shared_experts"] * bool(shared)
        each = [f"{name}.{part}" for name in names for part in ("gate_proj", "up_proj", "down_proj")]
        # the scales of one shared expert must not reach into the next
        packed = store.all_packed(prefix, *each) and (shared < 2 or inner % BLOCK == 0)
        dtype = fp8.E4M3 if packed else store.dtype

        def scales(rows: int, columns: int) -> Tensor | None:
            return store.empty(count, rows, columns, dtype=torch.float32) if packed else None

        self.experts = moe.Experts(
            store.empty(count, 2 * self.inner, hidden, dtype=dtype), scales(2 * _blocks(self.inner), _blocks(hidden)),
            store.empty(count, outputs, inner, dtype=dtype), scales(_blocks(outputs), _blocks(inner)),
            config.powers_of_two,
        )  # fmt: skip

    @property
    def second_packed(self) -> bool:
        """Whether the second product is FP8."""
        return self.experts.scaled

    def __call__(self, x: Tensor, long: Sequence[slice] = ()) -> Tensor:
        """Returns the outputs `[M, D]` of rows x.

        Args:
            long: rows whose gates are computed by matrix products, see `moe.route`.
        """
        exchange = self.ranks.gather_all if self.ranks.size > 1 else None
        out = moe.moe(x, self.router, self.bias, self.routing, self.experts, exchange=exchange, long=long)
        return self.ranks.gather_parts(out, self.hidden, BLOCK)

    def slots(self, prefix: str) -> Slots:
        out = {f"{prefix}.gate.weight": self.router}
        if self.bias is not None:
            out[f"{prefix}.gate.e_score_correction_bias"] = self.bias
        for e in range(self.routed):
            out |= self._expert_slots(f"{prefix}.experts.{e}", e)
        if self.shared == 1:
            out |= self._expert_slots(f"{prefix}.shared_experts", self.routed)
        elif self.shared:
            # one MLP of width shared * I in the checkpoint, `shared` experts of width I here
            shared = self._expert_slots(f"{prefix}.shared_experts", slice(self.routed, None))
            # [shared, D, I] seen as [D, shared, I]: the rows of the checkpoint's matrix
            out |= {name: slot.transpose(0, 1) if "down_proj" in name else slot for name, slot in shared.items()}
        return out

    def _expert_slots(self, name: str, which: int | slice) -> Slots:
        ex, narrow, out = self.experts, _blocks(self.inner), Slots()
        for part, rows, blocks in (("gate_proj", slice(0, self.inner), slice(0, narrow)),
                                   ("up_proj", slice(self.inner, None), slice(narrow, None))):  # fmt: skip
            out[f"{name}.{part}.weight"] = ex.gate_up[which][..., rows, :]
            if ex.gate_up_scale is not None:
                out[f"{name}.{part}.weight{SCALE}"] = ex.gate_up_scale[which][..., blocks, :]
        out[f"{name}.down_proj.weight"] = ex.down[which]
        if ex.down_scale is not None:
            out[f"{name}.down_proj.weight{SCALE}"] = ex.down_scale[which]
        return out


class Layer:
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`; the second sum is left to the next layer.

    `dense` is the width of a dense MLP, None for experts.
    """

    def __init__(self, config: ModelConfig, dense: int | None, store: Store, prefix: str, ranks: Ranks = ALONE) -> None:
        hidden, self.eps, self.power_of_two = config.hidden_size, config.rms_norm_eps, store.power_of_two
        self.norms = store.empty(2, hidden).unbind()
        self.attention, mlp = Attention(config, store, f"{prefix}.self_attn", ranks), f"{prefix}.mlp"
        self.mlp: Dense | Mixture = (
            Mixture(config, store, mlp, ranks) if dense is None else Dense(hidden, dense, store, mlp, ranks)
        )

    def __call__(
        self, x: Tensor, branch: Tensor | None, table: Tensor, cache: Cache, plan: mla.Plan | mla.Spans
    ) -> tuple[Tensor, Tensor]:
        """Takes and returns the residual stream and the branch still to be added to it, `[M, D]` each."""
        normed, x = self._normed(x, 0, branch, self.attention.a.packed)
        branch = self.attention(normed, table, cache, plan)
        if isinstance(self.mlp, Mixture):
            rows, x = quant.rms_norm(x, self.norms[1], self.eps, branch)
            return x, self.mlp(rows, () if isinstance(plan, mla.Plan) else mla.long_rows(plan))
        normed, x = self._normed(x, 1, branch, self.mlp.packed)
        return x, self.mlp(normed)

    def _normed(self, x: Tensor, norm: int, branch: Tensor | None, quantise: bool) -> tuple[Operand, Tensor]:
        """Returns the norm of x + branch, in a product's input form, and that sum."""
        if not quantise:
            return quant.rms_norm(x, self.norms[norm], self.eps, branch)
        quantised, scales, x = quant.rms_norm_quant(x, self.norms[norm], self.eps, branch, self.power_of_two)
        return (quantised, scales), x

    def slots(self, prefix: str) -> Slots:
        norms = (f"{prefix}.input_layernorm.weight", f"{prefix}.post_attention_layernorm.weight")
        return (
            dict(zip(norms, self.norms, strict=True))
            | self.attention.slots(f"{prefix}.self_attn")
            | self.mlp.slots(f"{prefix}.mlp")
        )


def _query(config: ModelConfig) -> str:
    """Returns the name of the first matrix of the query projection."""
    return "q_proj" if config.q_lora_rank is None else "q_a_proj"


def _gathered(x: Operand, ranks: Ranks) -> Operand:
    """Returns x with the columns of all ranks."""
    if isinstance(x, Tensor):
        return ranks.gather_all(x)[0]
    numbers, scales = ranks.gather_all(*x)
    return numbers, scales


def _joined(parts: list[Operand]) -> Operand:
    """Returns the rows of several operands of one form."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    numbers, scales = zip(*parts, strict=True)
    return torch.cat([part.view(torch.uint8) for part in numbers]).view(fp8.E4M3), torch.cat(scales)


def _blocks(size: int) -> int:
    return -(-size // BLOCK)
