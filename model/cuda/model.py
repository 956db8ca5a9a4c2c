"""The model on a GPU: weights as stored, FP8 or 16 bits, and forward passes made of the kernels in `mtp_spec.kernels`.

One function, `rows`, serves prefill, decode, draft and verify, and all its inputs are on the device, so that a pass can
be captured in a CUDA graph. Arithmetic follows DeepSeek-V3 (2412.19437, section 3.3): activations quantised 1x128
before every FP8 product, bfloat16 (or float16) between, float32 in norms, softmax and gates. It also runs on a CPU, by
the kernels' references, so that it can be tested without a GPU.

Legend: `M` rows, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_spec.kernels import fp8, gemm, mla, quant
from mtp_spec.kernels.mla import EXPANDED_ROWS, Cache, Layout, new_caches, prompt
from mtp_spec.model.config import ModelConfig, ModuleShape
from mtp_spec.model.cuda.layers import BLOCK, Layer, Matrix, Slots, Store
from mtp_spec.model.distributed.group import ALONE, Ranks
from mtp_spec.model.errors import CheckpointError
from mtp_spec.model.rope import rope_table

HEAD_ROWS = 64 * BLOCK  # rows of the head quantised at once
LEAST_HIDDEN = 1024  # from which prompts are attended in the expanded form
PREFILL_TOKENS = 16384


def why_not(config: ModelConfig) -> str | None:
    """Returns what keeps a model from running on these kernels, or None."""
    dense = [config.intermediate_size] if config.first_k_dense_replace else []
    sizes = {
        "hidden_size": config.hidden_size,
        "moe_intermediate_size": config.moe_intermediate_size,
        "kv_lora_rank": config.kv_lora_rank,
        "q_lora_rank": config.q_lora_rank or 16,
        "num_attention_heads * v_head_dim": config.num_attention_heads * config.v_head_dim,
    }
    dense += [shape.intermediate_size or 16 for shape in config.modules]
    for name, size in (*sizes.items(), *(("intermediate_size", width) for width in dense)):
        if size % 16:
            return f"{name} {size} is no multiple of 16"
    for name in ("kv_lora_rank", "qk_rope_head_dim"):
        size = getattr(config, name)
        if size < 16 or size & (size - 1):
            return f"{name} {size} is no power of two from 16"
    return None


class Module:
    """One multi-token-prediction module (2412.19437, eq. 21-23), see `transformer.MTPModule`."""

    def __init__(
        self, config: ModelConfig, shape: ModuleShape, store: Store, prefix: str, ranks: Ranks = ALONE
    ) -> None:
        hidden, self.eps, self.ranks = config.hidden_size, config.rms_norm_eps, ranks
        self.norms = store.empty(3, hidden).unbind()  # enorm, hnorm, last
        rows = len(ranks.part(hidden, BLOCK))
        self.eh = store.matrix(rows, 2 * hidden, store.all_packed(prefix, "eh_proj"), hidden)
        self.layer = Layer(config, shape.intermediate_size, store, prefix, ranks)
        rows = ranks.share(config.vocab_size, "vocab_size")
        self.embed_tokens = store.empty(config.vocab_size, hidden) if shape.own_embedding else None
        self.head = store.empty(rows, hidden) if shape.own_head else None
        self.draft_head: Matrix | None = None

    def __call__(
        self, embedding: Tensor, hidden: Tensor, table: Tensor, cache: Cache, plan: mla.Plan | mla.Spans
    ) -> Tensor:
        first, _ = quant.rms_norm(embedding, self.norms[0], self.eps)
        second, _ = quant.rms_norm(hidden, self.norms[1], self.eps)
        mixed = self.ranks.gather_parts(self.eh(torch.cat((first, second), -1)), first.shape[-1], BLOCK)
        x, branch = self.layer(mixed, None, table, cache, plan)
        return quant.rms_norm(x, self.norms[2], self.eps, branch)[0]

    def slots(self, prefix: str) -> Slots:
        names = ("enorm", "hnorm", "shared_head.norm")
        norms = {f"{prefix}.{name}.weight": norm for name, norm in zip(names, self.norms, strict=True)}
        own = {f"{prefix}.embed_tokens.weight": self.embed_tokens, f"{prefix}.shared_head.head.weight": self.head}
        norms |= {name: weight for name, weight in own.items() if weight is not None}
        return norms | self.eh.slots(f"{prefix}.eh_proj.weight") | self.layer.slots(prefix)


class DeviceModel:
    """The verifier and its MTP modules.

    Args:
        config: `why_not(config)` must be None.
        packed: whether the checkpoint's matrix of that name is kept in FP8 with 128x128 scales; None: as in DeepSeek's
            checkpoints, if the config says FP8.
        dtype: of everything else, and of activations.
        router: dtype in which the gates are stored.
        fp8_products: whether the device supports them: drafting then reads an FP8 copy of the head, half the bytes.
        draft_ids: the tokens that may be drafted, in ascending order; None for all. Fewer are read faster, and drafts
            cannot change the text.
        packed_cache: whether latents are cached in FP8.
        ranks: the ranks that share the work, see `parallel`; this model then holds one rank's part of the matrices.
    """

    runs_on = "the kernels"

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device | str,
        packed: Callable[[str], bool] | None = None,
        router: torch.dtype = torch.bfloat16,
        draft_ids: Sequence[int] | None = None,
        packed_cache: bool = False,
        ranks: Ranks = ALONE,
        dtype: torch.dtype = torch.bfloat16,
        fp8_products: bool = True,
    ) -> None:
        if config.hidden_size <= BLOCK * (ranks.size - 1):
            raise CheckpointError(f"hidden_size {config.hidden_size}: fewer blocks of {BLOCK} than {ranks.size} ranks")
        self.packed_cache, self.ranks = packed_cache, ranks
        self.config, self.device, self.activations = config, torch.device(device), dtype
        store = Store(self.device, packed or _as_published(config), dtype, router, config.powers_of_two)
        self.embed_tokens = store.empty(config.vocab_size, config.hidden_size)
        dense = [config.intermediate_size] * config.first_k_dense_replace + [None] * config.num_hidden_layers
        count = config.num_hidden_layers
        self.layers = [Layer(config, dense[i], store, f"model.layers.{i}", ranks) for i in range(count)]
        self.norm = store.empty(config.hidden_size)
        tied = config.tie_word_embeddings
        rows, own = ranks.share(config.vocab_size, "vocab_size"), ranks.own(config.vocab_size)
        self.lm_head = self.embed_tokens[own] if tied else self.embed_tokens.new_empty(rows, config.hidden_size)
        modules = config.num_nextn_predict_layers
        self.draft_ids: Tensor | None = None
        if draft_ids is not None:
            places = [token - own.start for token in draft_ids if own.start <= token < own.stop]
            self.draft_ids, rows = torch.tensor(places, dtype=torch.int64).to(self.device), len(places)
        # drafting reads the head in FP8 if possible: half the bytes, and drafts cannot change the text
        heads = replace(store, power_of_two=False)
        copied = modules and (fp8_products or draft_ids is not None)
        self.draft_head = heads.matrix(rows, config.hidden_size, fp8_products) if copied else None
        self.mtp = [Module(config, config.module(module), store, f"model.layers.{count + module}", ranks)
                    for module in range(modules)]  # fmt: skip
        for one in self.mtp:
            if one.head is not None and self.draft_head is not None:
                one.draft_head = heads.matrix(rows, config.hidden_size, fp8_products)
        slots = self.checkpoint_slots().values()
        self.dtype = next((slot.dtype for slot in slots if slot.dtype == fp8.E4M3), dtype)
        # a prompt's rows are attended in the expanded form in whole runs of this many, 0 for none; most rows of a pass
        self.expanded, self.prefill_tokens = 0, PREFILL_TOKENS
        # tokens of the shortest prompt with such rows
        self.least_expanded = mla.EXPANDED_TOKENS
        self._table = torch.empty(0, 2, config.qk_rope_head_dim, dtype=torch.float32, device=self.device)

    def expanded_on(self, device: torch.device | str) -> int:
        """Returns what `expanded` may be on a device, 0 if the kernels do not run there.

        Small models are bound by launches, and only short passes are captured.
        """
        fits = self.config.hidden_size >= LEAST_HIDDEN and prompt.fits(self.layers[0].attention.head)
        return EXPANDED_ROWS if fits and prompt.available(torch.device(device)) else 0

    @property
    def passes(self) -> list[int]:
        """`expanded` and `prefill_tokens`."""
        return [self.expanded, self.prefill_tokens]

    def expanded_rows(self, tokens: int) -> int:
        """Returns how many rows of a prompt of `tokens` tokens, the first ones, are attended in the expanded form.

        It depends on nothing else, so that the bits of a row depend neither on the pass nor on what is cached. All
        slots of these rows in the MTP modules' caches are filled from the prompt's own tokens.
        """
        run = self.expanded
        return max(0, tokens - len(self.mtp)) // run * run if run and tokens >= self.least_expanded else 0

    @property
    def most_absorbed(self) -> int:
        """Most rows of a prompt that a pass over a long one attends in the absorbed form."""
        return max(self.expanded, self.least_expanded) + len(self.mtp) if self.expanded else 0

    def rows(self, ids: Tensor, caches: list[Cache], plan: mla.Plan | mla.Spans) -> Tensor:
        """Appends tokens ids `[M]` int64 to the caches and returns their normed hidden states `[M, D]`."""
        x, branch = F.embedding(ids, self.embed_tokens), None
        table = self.table(caches[0].capacity)
        for layer, cache in zip(self.layers, caches, strict=True):
            x, branch = layer(x, branch, table, cache, plan)
        return quant.rms_norm(x, self.norm, self.config.rms_norm_eps, branch)[0]

    def mtp_rows(self, module: int, ids: Tensor, hidden: Tensor, cache: Cache, plan: mla.Plan | mla.Spans) -> Tensor:
        """Returns a module's normed outputs `[M, D]` for tokens ids `[M]` after hidden states `[M, D]`."""
        own = self.mtp[module].embed_tokens
        embedding = F.embedding(ids, self.embed_tokens if own is None else own)
        return self.mtp[module](embedding, hidden, self.table(cache.capacity), cache, plan)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Returns `[M, V]` float32 logits of normed hidden states, in `out` if it is given."""
        return self._logits(hidden, self.lm_head, out)

    def module_logits(self, module: int, hidden: Tensor) -> Tensor:
        """Returns `[M, V]` float32 logits of a module's normed outputs, by its own head if it has one."""
        head = self.mtp[module].head
        return self._logits(hidden, self.lm_head if head is None else head)

    def _logits(self, hidden: Tensor, head: Tensor, out: Tensor | None = None) -> Tensor:
        launch = gemm.default_launch(self.config.vocab_size, self.config.hidden_size, "bf16")
        alone = self.ranks.size == 1
        own = gemm.bf16_gemm(hidden, head, dtype=torch.float32, out=out if alone else None, launch=launch)
        whole = self.ranks.gather(own)
        return whole if alone or out is None else out.copy_(whole)

    def draft_logits(self, hidden: Tensor, own: int | None = None) -> Tensor:
        """Returns `[M, V]` float32 logits for drafting; -inf for tokens that may not be drafted.

        Args:
            own: the module whose own head is used, as `config.head_of` says; None for the model's.
        """
        head = self.draft_head if own is None else self.mtp[own].draft_head
        if head is None:
            return self.logits(hidden) if own is None else self.module_logits(own, hidden)
        if self.draft_ids is not None and not len(self.draft_ids):  # all of them belong to other ranks
            none = torch.full((len(hidden), len(self.lm_head)), -torch.inf, dtype=torch.float32, device=self.device)
            return self.ranks.gather(none)
        some = head(hidden, torch.float32)
        if self.draft_ids is not None:
            row = some.new_full((len(some), len(self.lm_head)), -torch.inf)
            some = row.index_copy_(1, self.draft_ids, some)
        return self.ranks.gather(some)

    def finish(self) -> None:
        """Derives what the checkpoint does not hold; call it once its tensors are in place."""
        for head, source in self._draft_heads():
            for first in range(0, head.weight.shape[0], HEAD_ROWS):
                rows = slice(first, first + HEAD_ROWS)
                chosen = source[rows] if self.draft_ids is None else source[self.draft_ids[rows]]
                if head.scale is None:
                    head.weight[rows] = chosen
                    continue
                weight, scale = fp8.weight_quant(chosen)
                head.weight[rows] = weight
                head.scale[first // BLOCK : first // BLOCK + scale.shape[0]] = scale

    def _draft_heads(self) -> list[tuple[Matrix, Tensor]]:
        """Returns the heads used for drafting, each with the one it is derived from."""
        found = [(self.draft_head, self.lm_head), *((module.draft_head, module.head) for module in self.mtp)]
        return [(head, source) for head, source in found if head is not None and source is not None]

    def table(self, length: int) -> Tensor:
        """Returns a rope table of more than `length` positions; grown between passes, never inside a captured one."""
        if self._table.shape[0] <= length:
            self._table = rope_table(self.config, length + 64, self.device)
        return self._table

    @property
    def wide(self) -> bool:
        """Whether some MLP's second product takes 16-bit numbers."""
        blocks = [*self.layers, *(module.layer for module in self.mtp)]
        return not all(block.mlp.second_packed for block in blocks)

    @property
    def layout(self) -> Layout:
        """What a token's row of the caches holds."""
        return self.layers[0].attention.head.layout(self.packed_cache)

    def new_caches(self, tokens: int, nodes: int, pages: int | None = None) -> list[Cache]:
        """Returns caches of all layers and, last, of the MTP modules; arguments as `mla.new_caches`."""
        return new_caches(len(self.layers) + len(self.mtp), tokens, nodes, self.layout, self.device, pages)

    def parameters(self) -> list[Tensor]:
        """Returns the tensors that hold weights, scales included."""
        return [*self.checkpoint_slots().values(), *self.derived()]

    def derived(self) -> list[Tensor]:
        """Returns the tensors that the checkpoint does not hold: the heads used for drafting."""
        return [part for head, _ in self._draft_heads() for part in (head.weight, head.scale) if part is not None]

    def checkpoint_slots(self) -> Slots:
        """Returns every checkpoint tensor, scales included, with a view of its place.

        The shared expert's places have an extra dimension for its experts; its tensors fit after reshaping.
        """
        out: Slots = {"model.embed_tokens.weight": self.embed_tokens}
        blocks: list[Layer | Module] = [*self.layers, *self.mtp]
        for i, layer in enumerate(blocks):
            out |= layer.slots(f"model.layers.{i}")
        out["model.norm.weight"] = self.norm
        if not self.config.tie_word_embeddings:
            out["lm_head.weight"] = self.lm_head
        return out


def _as_published(config: ModelConfig) -> Callable[[str], bool]:
    """Returns which matrices are FP8 in a checkpoint like DeepSeek's: if the config says so, all except eh_proj."""
    blocks = config.fp8_block == (BLOCK, BLOCK)
    return lambda name: blocks and not name.endswith("eh_proj.weight")
