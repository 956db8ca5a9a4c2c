"""The model on the CPU engine: weights as they are stored, a forward pass through all layers as one call.

A row has the same bits in every batch, with any number of threads and on every processor that the engine supports,
because the order of every sum is fixed in its code (`kernels/cpu/lanes.h`).

Legend: `M` rows of one pass, `D` hidden size, `V` vocabulary, `H` heads, `K` experts a token.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtp_spec.kernels.cpu.engine import (
    EXCHANGE,
    HeadStruct,
    LayerStruct,
    Matrix,
    MatrixStruct,
    ModelStruct,
    ModuleStruct,
    PassStruct,
    RoutingStruct,
    library,
)  # fmt: skip
from mtp_spec.kernels.cpu.team import TEAM
from mtp_spec.kernels.fp8 import BLOCK, block_counts, weight_quant
from mtp_spec.kernels.fp8_cpu import dequantise
from mtp_spec.model.attention import JointPlan
from mtp_spec.model.cache import PAGE, LatentCache, pages_for
from mtp_spec.model.checkpoint.found import module_prefix
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.cpu.room import Rooms, zeros
from mtp_spec.model.distributed.group import ALONE, Ranks
from mtp_spec.model.host import HostModel
from mtp_spec.model.layers import LATENT_NORM_EPS
from mtp_spec.model.rope import softmax_scale

T = TypeVar("T")
SCALE = "_scale_inv"
METHODS = {"greedy": 0, "group_limited_greedy": 1, "noaux_tc": 2}
ATTENDED_AT_ONCE = 8  # rows of a sequence, as in pass.h
CONTEXT_STEP = 512  # memory for scores grows in steps of so many slots
HEAD_UNIT = 64  # ranks divide a head's rows in multiples of this
PIECE_BLOCKS = 32  # blocks of a head's rows that are widened at once for conversion to FP8
NO_MATRIX = MatrixStruct()


class CPUModel(HostModel):
    """A model whose passes the CPU engine runs.

    Args:
        weights: every tensor of the checkpoint, contiguous, as it is stored; kept and read in place. The float32
            scales of an FP8 matrix have its name plus `_scale_inv`.
    """

    technique = "batched"

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], ranks: Ranks = ALONE) -> None:
        super().__init__(config, torch.float32, torch.device("cpu"), ranks)
        self.runs_on = f"the CPU engine ({library().level})"
        self._engine, self._weights = library(), dict(weights)
        for name in ("num_attention_heads", "vocab_size", "hidden_size", "intermediate_size", "n_routed_experts"):
            ranks.share(getattr(config, name), name)  # raises if the ranks do not divide them
        for shape in config.modules:
            ranks.share(shape.intermediate_size or 0, "an MTP module's intermediate size")
        self._lost: BaseException | None = None
        self.hits: ctypes.c_int64 | None = None  # if set, every pass adds the number of experts it read
        self._kept: list[object] = []  # what the structures point to
        self.stored = ", ".join(sorted({str(w.dtype).removeprefix("torch.") for w in weights.values() if w.dim() > 1}))
        self.mtp = range(config.num_nextn_predict_layers)
        self.norm = self._vector("model.norm.weight")
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        self._head = self._keep(_Head(self._matrix(head)))
        self._draft_ids: Tensor | None = None
        self._draft_heads: dict[int | None, _Head] = {}
        self._own_heads = {
            module: self._keep(_Head(self._matrix(f"{module_prefix(config, module)}.shared_head.head.weight")))
            for module in self.mtp if config.module(module).own_head
        }  # fmt: skip
        self._model = self._structure()
        # the engine takes one embedding: a module with its own gets a model structure with that one
        self._models = {module: self._keep(self._with_embedding(module))
                        for module in self.mtp if config.module(module).own_embedding}  # fmt: skip
        engine, own = library(), self._model
        self._rooms = Rooms(lambda *sizes: int(engine.memory(ctypes.byref(own), *sizes)), CONTEXT_STEP)
        columns = self._head.struct  # the same for all heads, and all that their working memory depends on
        self._head_rooms = Rooms(lambda rows, context, threads: int(engine.head_memory(ctypes.byref(columns), threads)))
        weakref.finalize(self, TEAM.release, self._weights, self._kept, own, self._rooms, self._head_rooms)

    # rows over a cache

    def joint_rows(self, ids: Sequence[int], plan: JointPlan) -> Tensor:
        return self._pass(-1, ids, None, plan, self._head, ())[0]

    def joint_mtp_rows(self, module: int, ids: Sequence[int], hidden: Tensor, plan: JointPlan) -> Tensor:
        return self._pass(module, ids, hidden, plan, self._head, ())[0]

    def scored_rows(
        self, ids: Sequence[int], plan: JointPlan, scored: Sequence[int], kept: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._pass(-1, ids, None, plan, self._head, scored, kept)

    def scored_mtp_rows(
        self, module: int, ids: Sequence[int], hidden: Tensor, plan: JointPlan, scored: Sequence[int],
        kept: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        head = self._drafts(self.config.head_of(module))
        outputs, logits = self._pass(module, ids, hidden, plan, head, scored, kept)
        return outputs, self._placed(logits)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._multiplied(hidden, self._head)

    def module_logits(self, module: int, hidden: Tensor) -> Tensor:
        return self._multiplied(hidden, self._own_heads.get(module, self._head))

    def draft_logits(self, hidden: Tensor, own: int | None = None) -> Tensor:
        """Returns `[M, V]` logits for drafting, by the head in FP8: they need not be exact."""
        return self._placed(self._multiplied(hidden, self._drafts(own)))

    def _drafts(self, own: int | None) -> _Head:
        if own not in self._draft_heads:
            self._draft_heads[own] = self._keep(self._fp8_head(self._head if own is None else self._own_heads[own]))
        return self._draft_heads[own]

    def _placed(self, some: Tensor) -> Tensor:
        """Returns logits of all tokens, given those of the tokens that may be drafted."""
        if self._draft_ids is None:
            return some
        whole = some.new_full((len(some), self.config.vocab_size), -torch.inf)
        return whole.index_copy_(1, self._draft_ids, some)

    def draft_from(self, ids: Sequence[int]) -> None:
        TEAM.release(*self._draft_heads.values())
        self._draft_ids = torch.tensor(list(ids), dtype=torch.int64)
        self._draft_heads.clear()

    def _cache(self, layers: int, tokens: int) -> LatentCache:
        pages, width = pages_for(tokens), self.config.kv_lora_rank + self.config.qk_rope_head_dim
        memory = [zeros(pages * PAGE * width).view(-1, width) for _ in range(layers)]
        return LatentCache(memory, range(pages))

    def fingerprint(self) -> float:
        return float(self.norm.double().sum())

    def scales(self) -> dict[str, Tensor]:
        """Returns the block scales of FP8 matrices by their names in a checkpoint."""
        return {name: weight for name, weight in self._weights.items() if name.endswith(SCALE)}

    def checkpoint_slots(self) -> dict[str, Tensor]:
        return {name: weight for name, weight in self._weights.items() if not name.endswith(SCALE)}

    def _pass(
        self, module: int, ids: Sequence[int], hidden: Tensor | None, plan: JointPlan, head: _Head,
        scored: Sequence[int], kept: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        rows, picked = len(ids), np.asarray(scored, np.int32)
        some = None if kept is None or len(kept) == rows else np.asarray(kept, np.int32)
        if some is not None:
            picked = np.searchsorted(some, picked).astype(np.int32)
        after = _floats(rows if some is None else len(some), self.config.hidden_size)
        logits = _floats(len(picked), head.rows)
        if not rows:
            return after, logits
        given = _Rows(plan)
        kept_rows = given.rows if some is None else given.rows[some]
        kept_blocks = given.blocks if some is None else _blocks(np.unique(kept_rows[:, 0], return_counts=True)[1])
        tokens = np.asarray(ids, np.int64)
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise ValueError(f"ids from {tokens.min()} to {tokens.max()}: the vocabulary has {self.config.vocab_size}")
        before = None if hidden is None else hidden.float().contiguous()
        threads, exchange = torch.get_num_threads(), EXCHANGE()
        if self.ranks.size > 1:
            exchange = EXCHANGE(self._exchanged)
        with self._rooms.lent(rows, given.longest, threads) as room, TEAM.called(threads) as able:
            whole = self._engine.run(ctypes.byref(PassStruct(
                ctypes.pointer(self._models.get(module, self._model)), module, rows, able, len(given.blocks) - 1,
                tokens.ctypes.data, given.further.ctypes.data, given.blocks.ctypes.data, given.rows.ctypes.data,
                given.caches.ctypes.data,
                given.table.data_ptr(), None if before is None else before.data_ptr(),
                None if some is None else some.ctypes.data, len(after), len(kept_blocks) - 1,
                kept_rows.ctypes.data, kept_blocks.ctypes.data, after.data_ptr(),
                head.struct, picked.ctypes.data, logits.data_ptr(), len(picked),
                room.memory.data_ptr(), room.rows, room.context, room.threads, self.ranks.rank, self.ranks.size,
                exchange, None if self.hits is None else ctypes.pointer(self.hits),
            )))  # fmt: skip
            if not whole:
                self._fail()
        return after, logits

    def _multiplied(self, hidden: Tensor, head: _Head) -> Tensor:
        rows, threads = hidden.shape[0], torch.get_num_threads()
        out = _floats(rows, head.rows)
        if not rows:
            return out
        given = hidden.float().contiguous()
        own = self.ranks.part(head.rows, HEAD_UNIT)
        with self._head_rooms.lent(0, 0, threads) as room, TEAM.called(threads) as able:
            self._engine.head(ctypes.byref(HeadStruct(
                head.struct, given.data_ptr(), out.data_ptr(), rows, able, own.start, own.stop,
                room.memory.data_ptr(),
            )))  # fmt: skip
        if self.ranks.size > 1 and not self._exchanged(out.data_ptr(), rows, head.rows, head.rows, HEAD_UNIT):
            self._fail()
        return out

    def _exchanged(self, data: int, rows: int, stride: int, count: int, unit: int) -> int:
        """Fills in the columns that other ranks computed, for rows at an address; called by the engine."""
        try:
            whole = np.ctypeslib.as_array((ctypes.c_float * (rows * stride)).from_address(data)).reshape(rows, stride)
            own = self.ranks.part(count, unit)
            given = torch.from_numpy(whole[:, own.start : own.stop].copy())
            whole[:, :count] = self.ranks.gather_parts(given, count, unit).numpy()
        except BaseException as error:  # an exception cannot propagate through the engine
            self._lost = error
            return 0
        return 1

    def _fail(self) -> NoReturn:
        error, self._lost = self._lost, None
        assert error is not None
        raise error

    # structures

    def _structure(self) -> ModelStruct:
        config = self.config
        count = config.num_hidden_layers + config.num_nextn_predict_layers
        layers = self._keep((LayerStruct * count)(*(self._layer(i) for i in range(count))))
        modules = (ModuleStruct * max(1, len(self.mtp)))()
        for i in range(len(self.mtp)):
            prefix = module_prefix(config, i)
            modules[i] = ModuleStruct(
                self._matrix(f"{prefix}.eh_proj.weight").struct(), self._address(f"{prefix}.enorm.weight"),
                self._address(f"{prefix}.hnorm.weight"), self._address(f"{prefix}.shared_head.norm.weight"),
            )  # fmt: skip
        self._keep(modules)
        inner = max((layers[i].gate.rows for i in range(count)), default=0)
        routing = RoutingStruct(
            config.n_routed_experts, config.num_experts_per_tok, config.n_group, config.topk_group,
            config.scoring_func == "sigmoid", METHODS[config.topk_method],
            config.norm_topk_prob and not config.is_v2, config.routed_scaling_factor,
        )  # fmt: skip
        return ModelStruct(
            config.hidden_size, config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim,
            config.qk_nope_head_dim, config.v_head_dim, config.q_lora_rank or 0, config.num_hidden_layers,
            len(self.mtp), inner, config.moe_intermediate_size, config.rope_interleave, config.rms_norm_eps,
            LATENT_NORM_EPS, softmax_scale(config), routing, self._matrix("model.embed_tokens.weight").struct(),
            self.norm.data_ptr(), ctypes.addressof(layers), ctypes.addressof(modules),
        )  # fmt: skip

    def _with_embedding(self, module: int) -> ModelStruct:
        """Returns the model's structure with the embedding of one of its modules."""
        model = ModelStruct.from_buffer_copy(self._model)
        model.embedding = self._matrix(f"{module_prefix(self.config, module)}.embed_tokens.weight").struct()
        return model

    def _layer(self, number: int) -> LayerStruct:
        config, prefix = self.config, f"model.layers.{number}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"

        def matrix(name: str) -> MatrixStruct:
            return self._matrix(f"{name}.weight").struct()

        lora = config.q_lora_rank is not None
        dense = f"{mlp}.gate.weight" not in self._weights
        part = mlp if dense else f"{mlp}.shared_experts"
        gated = [NO_MATRIX] * 3
        if dense or config.n_shared_experts:
            gated = [matrix(f"{part}.{name}_proj") for name in ("gate", "up", "down")]
        bias = f"{mlp}.gate.e_score_correction_bias"
        experts = None
        if not dense:
            all_of = [matrix(f"{mlp}.experts.{e}.{name}_proj") for e in range(config.n_routed_experts)
                      for name in ("gate", "up", "down")]  # fmt: skip
            experts = ctypes.addressof(self._keep((MatrixStruct * len(all_of))(*all_of)))
        return LayerStruct(
            matrix(f"{attention}.{'q_a_proj' if lora else 'q_proj'}"), matrix(f"{attention}.kv_a_proj_with_mqa"),
            matrix(f"{attention}.q_b_proj") if lora else NO_MATRIX, matrix(f"{attention}.kv_b_proj"),
            matrix(f"{attention}.o_proj"), NO_MATRIX if dense else matrix(f"{mlp}.gate"), *gated,
            self._address(f"{prefix}.input_layernorm.weight"),
            self._address(f"{prefix}.post_attention_layernorm.weight"),
            self._address(f"{attention}.q_a_layernorm.weight") if lora else None,
            self._address(f"{attention}.kv_a_layernorm.weight"),
            self._address(bias) if bias in self._weights else None, experts,
        )  # fmt: skip

    def _matrix(self, name: str) -> Matrix:
        data, block = self._weights[name], self.config.fp8_block or (128, 128)
        return Matrix(data, self._weights.get(name + SCALE), block)

    def _vector(self, name: str) -> Tensor:
        """Returns a norm's weights or a bias in float32."""
        return self._keep(self._weights[name].detach().float().contiguous())

    def _address(self, name: str) -> int:
        return self._vector(name).data_ptr()

    def _keep(self, value: T) -> T:
        self._kept.append(value)
        return value

    def _fp8_head(self, head: _Head) -> _Head:
        matrix = head.matrix
        if matrix.scale is not None and self._draft_ids is None:
            return head
        data = matrix.data
        if matrix.scale is not None:
            data = dequantise(data, matrix.scale, matrix.block[0], torch.float32)
        data = data if self._draft_ids is None else data[self._draft_ids]
        stored = torch.empty(data.shape, dtype=torch.float8_e4m3fn, device="cpu")
        scale = _floats(*block_counts(*data.shape))
        for number in range(0, len(scale), PIECE_BLOCKS):
            blocks = slice(number, number + PIECE_BLOCKS)
            rows = slice(number * BLOCK, blocks.stop * BLOCK)
            stored[rows], scale[blocks] = weight_quant(data[rows])
            # FP8 codes cannot tell the engine so: such drafts must be dropped. (A check of every block by itself would
            # let torch's threads wait for each other so often that a busy machine takes seconds.)
            endless = ~data[rows].abs().amax(1).isfinite()
            scale[number + endless.nonzero()[:, 0] // BLOCK] = torch.nan
        return _Head(Matrix(stored, scale))


def _floats(*shape: int) -> Tensor:
    """Returns an output buffer for the engine, whatever torch's default dtype and device are."""
    return torch.empty(*shape, dtype=torch.float32, device="cpu")


class _Head:
    """A matrix that gives logits, and its structure."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix, self.rows, self.struct = matrix, matrix.data.shape[0], matrix.struct()


class _Rows:
    """A `JointPlan` in the engine's form.

    Attributes:
        rows: `[M, 6]` sequence, position, slot, run, number of further slots, index of the first of those; int64.
        further: slots that rows see after their run.
        blocks: the first row of each group that is attended at once, and the end.
        caches: for each sequence the addresses of its layers and pages.
        longest: most slots that a row sees.
    """

    def __init__(self, plan: JointPlan) -> None:
        count = sum(plan.counts)
        self.rows = np.zeros((count, 6), np.int64)
        self.caches = np.empty((len(plan.parts), 2), np.int64)
        self._places = [cache.places() for cache, _ in plan.parts]
        self.table = plan.parts[0][1].table
        further: list[int] = []
        self.longest = first = 0
        for number, (cache, own) in enumerate(plan.parts):
            last = first + own.count
            part = self.rows[first:last]
            part[:, 0], part[:, 1], part[:, 3] = number, own.positions, own.runs
            part[:, 2] = np.arange(own.start, own.start + own.count)
            if own.start + own.count > cache.capacity:
                raise ValueError(f"{own.count} rows from slot {own.start} on: the cache has {cache.capacity} slots")
            longest = max(own.runs)
            if own.more:
                for row, slots in enumerate(own.more):
                    part[row, 4:] = len(slots), len(further)
                    further += slots
                longest += max(map(len, own.more))
            if own.table.shape[0] > self.table.shape[0]:
                self.table = own.table
            self.longest = max(self.longest, longest)
            self.caches[number] = [place.ctypes.data for place in self._places[number]]
            first = last
        self.further, self.blocks = np.array(further, np.int64), _blocks(plan.counts)


def _blocks(counts: Iterable[int]) -> npt.NDArray[np.int64]:
    """Returns the first row of each group that is attended at once, and the end, given each sequence's rows."""
    blocks, first = list[int](), 0
    for count in map(int, counts):
        blocks += range(first, first + count, ATTENDED_AT_ONCE)
        first += count
    return np.array([*blocks, first], np.int64)
