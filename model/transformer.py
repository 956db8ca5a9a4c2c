"""DeepSeek-V2/V3 with its multi-token-prediction modules, in torch.

Legend: `M` rows of one pass, `D` hidden size, `V` vocabulary.

`rows` and `mtp_rows` append rows to a latent cache. Prefill, decode, draft and verify all use this one function, so a
row's logits do not depend on which of them computed it. `model.training` passes whole sequences through the same
weights, with gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_spec.model.attention import MLA, JointMasks, JointPlan
from mtp_spec.model.config import ModelConfig, ModuleShape
from mtp_spec.model.distributed.group import ALONE, Ranks
from mtp_spec.model.host import HostModel
from mtp_spec.model.layers import MLP, Linear, RMSNorm, empty_parameter
from mtp_spec.model.moe import MoE


class Block(nn.Module):
    """`x + MLA(norm(x))`, then `x + MLP(norm(x))` with an MLP of width `dense`, or MoE if that is None."""

    def __init__(
        self, config: ModelConfig, dense: int | None, dtype: torch.dtype, device: torch.device | str,
        ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, eps, dtype, device)
        self.self_attn = MLA(config, dtype, device, ranks)
        self.post_attention_layernorm = RMSNorm(hidden, eps, dtype, device)
        self.mlp: MLP | MoE = (
            MoE(config, dtype, device, ranks) if dense is None else MLP(hidden, dense, dtype, device, ranks)
        )

    def rows(self, x: Tensor, layer: int, plan: JointMasks) -> Tensor:
        """Appends rows x `[M, D]` to this layer of their caches and returns the outputs."""
        x = x + self.self_attn.rows(self.input_layernorm(x), layer, plan)
        out: Tensor = self.mlp(self.post_attention_layernorm(x))
        return x + out

    def checkpoint_slots(self, prefix: str) -> dict[str, Tensor]:
        return {
            f"{prefix}.input_layernorm.weight": self.input_layernorm.weight,
            **self.self_attn.checkpoint_slots(f"{prefix}.self_attn"),
            f"{prefix}.post_attention_layernorm.weight": self.post_attention_layernorm.weight,
            **self.mlp.checkpoint_slots(f"{prefix}.mlp"),
        }


class MTPModule(nn.Module):
    """One multi-token-prediction module (V3 report, 2412.19437, eq. 21-23).

    `h' = block(eh_proj([enorm(embedding); hnorm(hidden)]))`, then `shared_head.norm`. The report prints the
    hidden state first; the released weights take the embedding first. `shape` describes the rest of the module.
    """

    def __init__(
        self, config: ModelConfig, shape: ModuleShape, dtype: torch.dtype, device: torch.device | str,
        ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(hidden, eps, dtype, device)
        self.hnorm = RMSNorm(hidden, eps, dtype, device)
        self.eh_proj = Linear(hidden, 2 * hidden, dtype, device)
        self.block = Block(config, shape.intermediate_size, dtype, device, ranks)
        self.norm = RMSNorm(hidden, eps, dtype, device)
        rows = ranks.share(config.vocab_size, "vocab_size")
        self.embed_tokens: Tensor | None = (
            empty_parameter(config.vocab_size, hidden, dtype=dtype, device=device) if shape.own_embedding else None
        )
        self.head: Tensor | None = empty_parameter(rows, hidden, dtype=dtype, device=device) if shape.own_head else None

    def mix(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        mixed: Tensor = self.eh_proj(torch.cat((self.enorm(embedding), self.hnorm(hidden)), -1))
        return mixed

    def checkpoint_slots(self, prefix: str) -> dict[str, Tensor]:
        own = {f"{prefix}.embed_tokens.weight": self.embed_tokens, f"{prefix}.shared_head.head.weight": self.head}
        return {
            **{name: weight for name, weight in own.items() if weight is not None},
            f"{prefix}.enorm.weight": self.enorm.weight,
            f"{prefix}.hnorm.weight": self.hnorm.weight,
            f"{prefix}.eh_proj.weight": self.eh_proj.weight,
            **self.block.checkpoint_slots(prefix),
            f"{prefix}.shared_head.norm.weight": self.norm.weight,
        }


class Transformer(nn.Module, HostModel):
    """The verifier and its MTP modules. Parameters start uninitialised; `checkpoint_slots` names them.

    Args:
        config: the model's shape.
        dtype: of every parameter except the gates, which stay float32.
        ranks: the ranks that share the work, see `parallel`; this model then holds one rank's part of the matrices.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        HostModel.__init__(self, config, dtype, torch.device(device), ranks)
        shape = (config.vocab_size, config.hidden_size)
        self.embed_tokens = empty_parameter(*shape, dtype=dtype, device=device)
        self.layers = nn.ModuleList(
            Block(config, config.intermediate_size if i < config.first_k_dense_replace else None, dtype, device, ranks)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        rows = ranks.share(config.vocab_size, "vocab_size")
        self.lm_head: Tensor = (
            (self.embed_tokens if ranks.size == 1 else self.embed_tokens.detach()[ranks.own(config.vocab_size)])
            if config.tie_word_embeddings
            else empty_parameter(rows, config.hidden_size, dtype=dtype, device=device)
        )
        self.mtp = nn.ModuleList(
            MTPModule(config, config.module(module), dtype, device, ranks)
            for module in range(config.num_nextn_predict_layers)
        )
        self._draft_ids: Tensor | None = None
        self._draft_heads: dict[int | None, Tensor] = {}

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns `[..., V]` logits of normed hidden states `[..., D]`, in the model's dtype."""
        return self.ranks.gather(F.linear(hidden, self.lm_head))

    def module_logits(self, module: int, hidden: Tensor) -> Tensor:
        return self.ranks.gather(F.linear(hidden, self._head(self.config.head_of(module))))

    def _head(self, own: int | None) -> Tensor:
        head = None if own is None else self._module(own).head
        return self.lm_head if head is None else head

    def _embeddings(self, mtp: MTPModule) -> Tensor:
        return self.embed_tokens if mtp.embed_tokens is None else mtp.embed_tokens

    def fingerprint(self) -> float:
        return float(self.norm.weight.detach().double().sum())

    def draft_from(self, ids: Sequence[int]) -> None:
        own = range(self.config.vocab_size)[self.ranks.own(self.config.vocab_size)]
        places = [token - own.start for token in ids if token in own]
        self._draft_ids = torch.tensor(places, dtype=torch.int64, device=self.device)
        heads = {self.config.head_of(module) for module in range(len(self.mtp))}
        self._draft_heads = {own: self._head(own).detach()[self._draft_ids] for own in heads}

    def draft_logits(self, hidden: Tensor, own: int | None = None) -> Tensor:
        if self._draft_ids is None:
            return self.ranks.gather(F.linear(hidden, self._head(own)))
        some = F.linear(hidden, self._draft_heads[own])
        row = some.new_full((len(some), len(self.lm_head)), -torch.inf)
        return self.ranks.gather(row.index_copy_(1, self._draft_ids, some))

    # rows over a cache

    def joint_rows(self, ids: Sequence[int], plan: JointPlan) -> Tensor:
        x, masks = self.embed(ids), plan.masks()
        for number, layer in enumerate(self.blocks()):
            x = layer.rows(x, number, masks)
        out: Tensor = self.norm(x)
        return out

    def joint_mtp_rows(self, module: int, ids: Sequence[int], hidden: Tensor, plan: JointPlan) -> Tensor:
        mtp = self._module(module)
        embedding = F.embedding(torch.tensor(ids, device=self.device), self._embeddings(mtp))
        x = mtp.block.rows(mtp.mix(embedding, hidden), 0, plan.masks())
        out: Tensor = mtp.norm(x)
        return out

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Returns embeddings `[M, D]`."""
        return F.embedding(torch.tensor(ids, device=self.device), self.embed_tokens)

    def blocks(self) -> list[Block]:
        """Returns the main model's layers."""
        return cast("list[Block]", list(self.layers))

    def _module(self, module: int) -> MTPModule:
        mtp = self.mtp[module]
        assert isinstance(mtp, MTPModule)
        return mtp

    def checkpoint_slots(self) -> dict[str, Tensor]:
        """Returns every checkpoint tensor name with a view of its place in this model."""
        slots: dict[str, Tensor] = {"model.embed_tokens.weight": self.embed_tokens}
        for i, layer in enumerate([*self.layers, *self.mtp]):
            assert isinstance(layer, Block | MTPModule)
            slots |= layer.checkpoint_slots(f"model.layers.{i}")
        slots["model.norm.weight"] = self.norm.weight
        if not self.config.tie_word_embeddings:
            slots["lm_head.weight"] = self.lm_head
        return slots
