"""Base class of models in host memory: rows over latent caches.

Prefill, decode, draft and verify all use one function, `rows`, so a row's logits do not depend on which of them
computed it. `Transformer` computes rows with torch, `CPUModel` with the CPU engine.

Legend: `M` rows of one pass, `D` hidden size, `V` vocabulary, `W` width of a cached latent.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mtp_spec.model.attention import JointPlan, RowPlan, padded, plan_rows
from mtp_spec.model.cache import PAGE, LatentCache
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.distributed.group import Ranks
from mtp_spec.model.rope import rope_table

Technique = Literal["batched", "single"]


class HostModel:
    """The verifier and its MTP modules.

    Attributes:
        dtype: of hidden states and caches.
        mtp: the MTP modules; only their number matters.
        runs_on: a description of what computes the model.
        technique: "batched" if a row's bits depend only on its context, so that any rows share a pass and a prompt may
            be cut anywhere; "single" if a library's products choose their loops by the number of rows, so that each
            row is verified separately, as plain decoding computes it.
        stored: a description of its matrices' dtypes, on which times depend besides its shape.
        ranks: the ranks that share the work.
    """

    mtp: Any  # a collection of modules, or of their numbers
    runs_on = "torch"
    technique: Technique = "single"
    stored: str

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, ranks: Ranks) -> None:
        self.config, self.dtype, self.device, self.ranks = config, dtype, device, ranks
        self.unsound: set[int] = set()  # MTP modules that have returned NaN or infinity
        self.stored = str(dtype).removeprefix("torch.")
        # grows with the context
        self._table = torch.empty(0, 2, config.qk_rope_head_dim, dtype=torch.float32, device=device)

    @abstractmethod
    def joint_rows(self, ids: Sequence[int], plan: JointPlan) -> Tensor:
        """Appends rows of several sequences to their caches (uncommitted); returns normed hidden states `[M, D]`."""

    @abstractmethod
    def joint_mtp_rows(self, module: int, ids: Sequence[int], hidden: Tensor, plan: JointPlan) -> Tensor:
        """Appends rows to caches of a module; returns the module's normed outputs `[M, D]`."""

    def scored_rows(
        self, ids: Sequence[int], plan: JointPlan, scored: Sequence[int], kept: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns hidden states `[K, D]` of some rows of `joint_rows`, and logits `[S, V]` of some of those.

        Args:
            scored: indices of the rows with logits.
            kept: indices of the rows with hidden states, ascending, among them `scored`; None for all.
        """
        hidden = self.joint_rows(ids, plan)
        return _kept(hidden, kept), self.logits(hidden[list(scored)])

    def scored_mtp_rows(
        self, module: int, ids: Sequence[int], hidden: Tensor, plan: JointPlan, scored: Sequence[int],
        kept: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Returns the same of `joint_mtp_rows`, with logits for drafting."""
        outputs = self.joint_mtp_rows(module, ids, hidden, plan)
        return _kept(outputs, kept), self.draft_logits(outputs[list(scored)], self.config.head_of(module))

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Returns `[M, V]` logits of normed hidden states `[M, D]`."""

    @abstractmethod
    def module_logits(self, module: int, hidden: Tensor) -> Tensor:
        """Returns `[M, V]` logits of a module's normed outputs `[M, D]`, by its own head if it has one."""

    @abstractmethod
    def draft_logits(self, hidden: Tensor, own: int | None = None) -> Tensor:
        """Returns `[M, V]` logits for drafting, -inf for tokens that may not be drafted; `own` as `config.head_of`."""

    @abstractmethod
    def draft_from(self, ids: Sequence[int]) -> None:
        """Drafts only these tokens: fewer rows of the head are read, and drafts cannot change the text."""

    @abstractmethod
    def fingerprint(self) -> float:
        """Returns a number that differs between models of one shape: the sum of the last norm's weights."""

    @abstractmethod
    def checkpoint_slots(self) -> dict[str, Tensor]:
        """Returns every weight by its name in a checkpoint."""

    def rows(self, ids: Sequence[int], cache: LatentCache, parents: Sequence[int]) -> Tensor:
        """Appends rows to the cache (uncommitted) and returns their normed hidden states `[M, D]`.

        Args:
            ids: M token ids.
            parents: for each row the row that it follows; -1 follows the committed context.
        """
        return self.joint_rows(ids, JointPlan.of((cache, plan_rows(self.table(cache.capacity), cache.length, parents))))

    def mtp_rows(self, module: int, ids: Sequence[int], hidden: Tensor, cache: LatentCache, plan: RowPlan) -> Tensor:
        """Appends rows to a module's cache and returns the module's normed outputs `[M, D]`."""
        return self.joint_mtp_rows(module, ids, hidden, JointPlan.of((cache, plan)))

    def new_cache(self, tokens: int) -> LatentCache:
        """Returns an empty cache of the main model with room for `tokens` slots (whole blocks)."""
        return self._cache(self.config.num_hidden_layers, tokens)

    def new_mtp_cache(self, tokens: int) -> LatentCache:
        """Returns an empty cache of one MTP module."""
        return self._cache(1, tokens)

    def new_layers(self, pages: int) -> list[Tensor]:
        """Returns memory for many sequences' caches, one `[pages * PAGE, W]` per layer and module, uninitialised."""
        width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        count = self.config.num_hidden_layers + len(self.mtp)
        return [torch.empty(pages * PAGE, width, dtype=self.dtype, device=self.device) for _ in range(count)]

    def _cache(self, layers: int, tokens: int) -> LatentCache:
        width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        return LatentCache.alone(layers, tokens, width, self.dtype, self.device)

    def table(self, length: int) -> Tensor:
        """Returns a rope table of at least `length` positions, grown on demand."""
        if self._table.shape[0] < length:
            with torch.inference_mode(False):  # training may backpropagate through it later
                self._table = rope_table(self.config, padded(length) + 64, self.device)
        return self._table


def _kept(rows: Tensor, kept: Sequence[int] | None) -> Tensor:
    return rows if kept is None or len(kept) == len(rows) else rows[list(kept)]
