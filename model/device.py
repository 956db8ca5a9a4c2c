"""The model on a GPU: FP8 weights as stored, and passes made of the kernels in `mtp_spec.kernels`.

One function, `rows`, is prefill, decode, draft and verify, and all it needs lies on the device, so that a pass can be
captured in a CUDA graph. Arithmetic follows DeepSeek-V3 (2412.19437, section 3.3): activations quantised 1x128 before
every FP8 product, bfloat16 between, float32 in norms, softmax and gates. It runs on a CPU too, by the kernels'
references, which is how it is tested without a GPU.

Legend: `M` rows, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_spec.kernels import fp8, gemm, mla, moe, quant
from mtp_spec.kernels.mla_cache import Cache, Layout, new_caches
from mtp_spec.model.config import CheckpointError, ModelConfig
from mtp_spec.model.layers import LATENT_NORM_EPS
from mtp_spec.model.parallel import ALONE, Ranks
from mtp_spec.model.rope import rope_table, softmax_scale

BLOCK = fp8.BLOCK
SCALE = "_scale_inv"
HEAD_ROWS = 64 * BLOCK  # rows of the head quantised at once
Slots = dict[str, Tensor]


def why_not(config: ModelConfig) -> str | None:
    """Returns what keeps a model from running on these kernels, or None."""
    sizes = {
        "hidden_size": config.hidden_size,
        "moe_intermediate_size": config.moe_intermediate_size,
        "kv_lora_rank": config.kv_lora_rank,
        "q_lora_rank": config.q_lora_rank or 16,
    }
    for name, size in sizes.items():
        if size % 16:
            return f"{name} {size} is no multiple of 16"
    for name in ("kv_lora_rank", "qk_rope_head_dim"):
        size = getattr(config, name)
        if size < 16 or size & (size - 1):
            return f"{name} {size} is no power of two from 16"
    if config.fp8_block != (BLOCK, BLOCK):
        return "its weights are not FP8 with 128x128 scales"
    if config.moe_intermediate_size % BLOCK and config.n_shared_experts > 1:
        return f"moe_intermediate_size {config.moe_intermediate_size} with {config.n_shared_experts} shared experts"
    return None


@dataclass(slots=True)
class Matrix:
    """A weight `[N, K]`: e4m3 with 128x128 scales, or bfloat16 without.

    Attributes:
        whole: rows of the matrix that this is, or is a rank's part of: how its products sum follows from these.
    """

    weight: Tensor
    scale: Tensor | None
    whole: int

    @classmethod
    def empty(
        cls, rows: int, columns: int, device: torch.device, packed: bool = True, whole: int | None = None
    ) -> Matrix:
        """Returns room for a matrix, or for `rows` of one of `whole`, from the beginning of a block of scales."""
        if not packed:
            return cls(torch.empty(rows, columns, dtype=torch.bfloat16, device=device), None, whole or rows)
        weight = torch.empty(rows, columns, dtype=fp8.E4M3, device=device)
        return cls(weight, torch.empty(_blocks(rows), _blocks(columns), device=device), whole or rows)

    def __call__(self, x: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Returns x @ weight.T in bfloat16; x `[M, K]` bfloat16, or e4m3 with scales for an FP8 weight."""
        if self.scale is None:
            assert isinstance(x, Tensor)
            return gemm.bf16_gemm(x, self.weight, launch=self._launch("bf16"))
        given = quant.quant(x) if isinstance(x, Tensor) else x
        return gemm.fp8_gemm(*given, self.weight, self.scale, launch=self._launch("fp8"))

    def _launch(self, kind: str) -> gemm.Launch:
        return gemm.default_launch(self.whole, self.weight.shape[1], kind)

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
            config.v_head_dim, softmax_scale(config), config.rope_interleave,
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

    def __init__(self, hidden: int, intermediate: int, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.ranks, self.hidden = ranks, hidden
        inner = ranks.share(intermediate, "intermediate_size", BLOCK)
        # gate and up are quantised on their own: their scales meet where the rows do only at whole blocks
        self.inner, self.fused = inner, inner % BLOCK == 0
        each = 2 if self.fused else 1
        self.parts = [
            Matrix.empty(each * inner, hidden, device, whole=each * intermediate) for _ in range(3 - each)
        ]
        self.down = Matrix.empty(len(ranks.part(hidden, BLOCK)), intermediate, device, whole=hidden)

    def __call__(self, x: tuple[Tensor, Tensor]) -> Tensor:
        both = [part(x) for part in self.parts]
        inner = quant.silu_mul_quant(both[0] if self.fused else torch.cat(both, -1))
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

    def __init__(
        self, config: ModelConfig, device: torch.device, router: torch.dtype, ranks: Ranks = ALONE
    ) -> None:
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
            normalise=config.norm_topk_prob and config.model_type != "deepseek_v2",
            scale=config.routed_scaling_factor,
        )  # fmt: skip
        self.router = torch.empty(self.routed, hidden, dtype=router, device=device)
        self.bias = torch.empty(self.routed, device=device) if config.has_gate_bias else None
        count, outputs, inner = self.routed + shared, len(ranks.part(hidden, BLOCK)), config.moe_intermediate_size
        self.experts = moe.Experts(
            torch.empty(count, 2 * self.inner, hidden, dtype=fp8.E4M3, device=device),
            torch.empty(count, 2 * _blocks(self.inner), _blocks(hidden), device=device),
            torch.empty(count, outputs, inner, dtype=fp8.E4M3, device=device),
            torch.empty(count, _blocks(outputs), _blocks(inner), device=device),
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
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`; the second sum is left to whoever reads it."""

    def __init__(
        self, config: ModelConfig, dense: bool, device: torch.device, router: torch.dtype, ranks: Ranks = ALONE
    ) -> None:
        hidden, self.eps = config.hidden_size, config.rms_norm_eps
        self.norms = torch.empty(2, hidden, dtype=torch.bfloat16, device=device)
        self.attention = Attention(config, device, ranks)
        self.mlp: Dense | Mixture = (
            Dense(hidden, config.intermediate_size, device, ranks) if dense else Mixture(config, device, router, ranks)
        )

    def __call__(
        self, x: Tensor, branch: Tensor | None, table: Tensor, cache: Cache, plan: mla.Plan
    ) -> tuple[Tensor, Tensor]:
        """Returns the stream and the branch still to be added to it, `[M, D]` each, of such a pair."""
        quantised, scales, x = quant.rms_norm_quant(x, self.norms[0], self.eps, branch)
        branch = self.attention((quantised, scales), table, cache, plan)
        if isinstance(self.mlp, Mixture):
            normed, x = quant.rms_norm(x, self.norms[1], self.eps, branch)
            return x, self.mlp(normed)
        quantised, scales, x = quant.rms_norm_quant(x, self.norms[1], self.eps, branch)
        return x, self.mlp((quantised, scales))

    def slots(self, prefix: str) -> Slots:
        norms = (f"{prefix}.input_layernorm.weight", f"{prefix}.post_attention_layernorm.weight")
        return (
            dict(zip(norms, self.norms, strict=True))
            | self.attention.slots(f"{prefix}.self_attn")
            | self.mlp.slots(f"{prefix}.mlp")
        )


class Module:
    """One multi-token-prediction module (2412.19437, eq. 21-23), see `transformer.MTPModule`."""

    def __init__(
        self, config: ModelConfig, device: torch.device, packed: bool, router: torch.dtype, ranks: Ranks = ALONE
    ) -> None:
        hidden, self.eps, self.ranks = config.hidden_size, config.rms_norm_eps, ranks
        self.norms = torch.empty(3, hidden, dtype=torch.bfloat16, device=device)  # enorm, hnorm, last
        self.eh = Matrix.empty(len(ranks.part(hidden, BLOCK)), 2 * hidden, device, packed, whole=hidden)
        self.layer = Layer(config, False, device, router, ranks)

    def __call__(self, embedding: Tensor, hidden: Tensor, table: Tensor, cache: Cache, plan: mla.Plan) -> Tensor:
        first, _ = quant.rms_norm(embedding, self.norms[0], self.eps)
        second, _ = quant.rms_norm(hidden, self.norms[1], self.eps)
        mixed = self.ranks.gather_parts(self.eh(torch.cat((first, second), -1)), first.shape[-1], BLOCK)
        x, branch = self.layer(mixed, None, table, cache, plan)
        return quant.rms_norm(x, self.norms[2], self.eps, branch)[0]

    def slots(self, prefix: str) -> Slots:
        names = ("enorm", "hnorm", "shared_head.norm")
        norms = {f"{prefix}.{name}.weight": norm for name, norm in zip(names, self.norms, strict=True)}
        return norms | self.eh.slots(f"{prefix}.eh_proj.weight") | self.layer.slots(prefix)


class DeviceModel:
    """The verifier and its MTP modules in FP8.

    Args:
        config: `why_not(config)` is None.
        eh_packed: whether the module's eh_proj is stored in FP8 like the other matrices; DeepSeek's is in bfloat16.
        router: dtype in which the gates are stored.
        draft_ids: the tokens that drafts may be, in ascending order; None for all. Fewer are read faster, and a draft
            cannot change the text.
        packed_cache: whether latents are cached in FP8.
        ranks: that share the work, see `parallel`; this model then holds one rank's part of the matrices.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device | str,
        eh_packed: bool = False,
        router: torch.dtype = torch.bfloat16,
        draft_ids: Sequence[int] | None = None,
        packed_cache: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.packed_cache, self.ranks = packed_cache, ranks
        self.config, self.device, self.dtype = config, torch.device(device), fp8.E4M3
        shape = (config.vocab_size, config.hidden_size)
        self.embed_tokens = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        self.layers = [Layer(config, i < config.first_k_dense_replace, self.device, router, ranks)
                       for i in range(config.num_hidden_layers)]  # fmt: skip
        self.norm = torch.empty(config.hidden_size, dtype=torch.bfloat16, device=self.device)
        tied = config.tie_word_embeddings
        rows, own = ranks.share(config.vocab_size, "vocab_size"), ranks.own(config.vocab_size)
        self.lm_head = self.embed_tokens[own] if tied else self.embed_tokens.new_empty(rows, config.hidden_size)
        # drafts read the head in FP8: half the bytes, and a draft cannot change the text
        drafts = config.num_nextn_predict_layers > 0
        self.draft_ids: Tensor | None = None
        if draft_ids is not None:
            places = [token - own.start for token in draft_ids if own.start <= token < own.stop]
            self.draft_ids, rows = torch.tensor(places, dtype=torch.int64).to(self.device), len(places)
        self.draft_head = Matrix.empty(rows, config.hidden_size, self.device) if drafts else None
        modules = config.num_nextn_predict_layers
        self.mtp = [Module(config, self.device, eh_packed, router, ranks) for _ in range(modules)]
        self._table = torch.empty(0, 2, config.qk_rope_head_dim, device=self.device)

    def rows(self, ids: Tensor, caches: list[Cache], plan: mla.Plan) -> Tensor:
        """Returns the normed hidden states `[M, D]` of tokens ids `[M]` int64, which join the caches."""
        x, branch = F.embedding(ids, self.embed_tokens), None
        table = self.table(caches[0].capacity)
        for layer, cache in zip(self.layers, caches, strict=True):
            x, branch = layer(x, branch, table, cache, plan)
        return quant.rms_norm(x, self.norm, self.config.rms_norm_eps, branch)[0]

    def mtp_rows(self, module: int, ids: Tensor, hidden: Tensor, cache: Cache, plan: mla.Plan) -> Tensor:
        """Returns a module's normed outputs `[M, D]` for tokens ids `[M]` after hidden states `[M, D]`."""
        embedding = F.embedding(ids, self.embed_tokens)
        return self.mtp[module](embedding, hidden, self.table(cache.capacity), cache, plan)

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns `[M, V]` float32 logits of normed hidden states."""
        launch = gemm.default_launch(self.config.vocab_size, self.config.hidden_size, "bf16")
        return self.ranks.gather(gemm.bf16_gemm(hidden, self.lm_head, dtype=torch.float32, launch=launch))

    def draft_logits(self, hidden: Tensor) -> Tensor:
        """Returns `[M, V]` float32 logits that propose drafts, from the head in FP8; -inf where none may be."""
        head = self.draft_head
        assert head is not None
        assert head.scale is not None
        if self.draft_ids is not None and not len(self.draft_ids):  # all of them are other ranks'
            none = torch.full((len(hidden), len(self.lm_head)), -torch.inf, device=self.device)
            return self.ranks.gather(none)
        some = gemm.fp8_gemm(*quant.quant(hidden), head.weight, head.scale, dtype=torch.float32)
        if self.draft_ids is not None:
            row = some.new_full((len(some), len(self.lm_head)), -torch.inf)
            some = row.index_copy_(1, self.draft_ids, some)
        return self.ranks.gather(some)

    def finish(self) -> None:
        """Derives what the checkpoint does not hold; to be called once its tensors are in place."""
        if self.draft_head is None or self.draft_head.scale is None:
            return
        for first in range(0, self.draft_head.weight.shape[0], HEAD_ROWS):
            rows = slice(first, first + HEAD_ROWS)
            source = self.lm_head[rows] if self.draft_ids is None else self.lm_head[self.draft_ids[rows]]
            weight, scale = fp8.weight_quant(source)
            self.draft_head.weight[rows] = weight
            self.draft_head.scale[first // BLOCK : first // BLOCK + scale.shape[0]] = scale

    def table(self, length: int) -> Tensor:
        """Returns a rope table of more than `length` positions; grown between passes, never inside a captured one."""
        if self._table.shape[0] <= length:
            self._table = rope_table(self.config, length + 64, self.device)
        return self._table

    @property
    def layout(self) -> Layout:
        """What a token's row of the caches holds."""
        return self.layers[0].attention.head.layout(self.packed_cache)

    def new_caches(self, tokens: int, nodes: int) -> list[Cache]:
        """Returns caches of all layers and, last, of the MTP modules."""
        return new_caches(len(self.layers) + len(self.mtp), tokens, nodes, self.layout, self.device)

    def parameters(self) -> list[Tensor]:
        """Returns the tensors that hold weights, scales included."""
        return [*self.checkpoint_slots().values(), *self.derived()]

    def derived(self) -> list[Tensor]:
        """Returns those that the checkpoint does not hold: the head that drafts read."""
        head = self.draft_head
        return [] if head is None or head.scale is None else [head.weight, head.scale]

    def checkpoint_slots(self) -> Slots:
        """Returns every checkpoint tensor, scales included, with a view of its place.

        The shared expert's places have its experts as a dimension of their own; reshaped, its tensors fit.
        """
        out: Slots = {"model.embed_tokens.weight": self.embed_tokens}
        blocks: list[Layer | Module] = [*self.layers, *self.mtp]
        for i, layer in enumerate(blocks):
            out |= layer.slots(f"model.layers.{i}")
        out["model.norm.weight"] = self.norm
        if not self.config.tie_word_embeddings:
            out["lm_head.weight"] = self.lm_head
        return out


def _blocks(size: int) -> int:
    return -(-size // BLOCK)
