"""Small models on the CPU engine: random, or with the weights of transformers' own, stored in any of the four types."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lms import lm_of
from mtp_spec.kernels.cpu import team
from mtp_spec.kernels.cpu.engine import SWITCH, Library, library, why_not
from mtp_spec.kernels.fp8 import weight_dequant, weight_quant
from mtp_spec.model.attention import JointPlan, plan_rows
from mtp_spec.model.cache import LatentCache
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.cpu import model as cpu
from mtp_spec.model.cpu.model import SCALE, CPUModel
from mtp_spec.model.transformer import Transformer

E4M3 = torch.float8_e4m3fn
STORED = (torch.float32, torch.bfloat16, torch.float16, E4M3)
BLOCK = 32  # several blocks even of these small matrices, and cut ones
# sizes that are no multiples of the lanes, more heads than are attended at once
SIZES: dict[str, Any] = {
    "vocab_size": 150, "hidden_size": 72, "intermediate_size": 100, "moe_intermediate_size": 40,
    "num_hidden_layers": 3, "num_attention_heads": 5, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5, "kv_lora_rank": 36,
    "q_lora_rank": 48, "qk_nope_head_dim": 20, "qk_rope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1, "max_position_embeddings": 512, "fp8_block": (BLOCK, BLOCK),
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "v3": {},
    "halves, two modules": {"rope_interleave": False, "num_nextn_predict_layers": 2},
    "many heads, two shared experts": {"num_attention_heads": 17, "n_shared_experts": 2},
    "no shared expert": {"n_shared_experts": 0, "n_group": 1, "topk_group": 1, "q_lora_rank": None},
    "v2": {"model_type": "deepseek_v2", "topk_method": "group_limited_greedy", "scoring_func": "softmax",
           "num_nextn_predict_layers": 0, "norm_topk_prob": False},
    "v2 greedy, all dense": {"model_type": "deepseek_v2", "topk_method": "greedy", "scoring_func": "softmax",
                             "q_lora_rank": None, "num_nextn_predict_layers": 0, "norm_topk_prob": False,
                             "n_group": 1, "topk_group": 1, "first_k_dense_replace": 3},
}  # fmt: skip


def store(weights: Mapping[str, Tensor], kind: torch.dtype) -> dict[str, Tensor]:
    """Returns weights as a checkpoint of this type has them: matrices, of FP8 without embedding, head and routers."""
    out: dict[str, Tensor] = {}
    for name, weight in weights.items():
        wide = any(part in name for part in ("embed_tokens", "lm_head", "mlp.gate.", "eh_proj"))
        if weight.dim() != 2:
            out[name] = weight.float().contiguous()
        elif kind == E4M3 and not wide:
            out[name], out[name + SCALE] = weight_quant(weight.float(), BLOCK)
        else:
            out[name] = weight.to(torch.bfloat16 if kind == E4M3 else kind).contiguous()
    return out


def wide(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the numbers that stored weights stand for, in float32."""
    return {
        name: weight.float() if name + SCALE not in weights
        else weight_dequant(weight, weights[name + SCALE], BLOCK, torch.float32)
        for name, weight in weights.items() if not name.endswith(SCALE)
    }  # fmt: skip


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, Tensor] = {}
    for name, slot in Transformer(config, torch.float32).checkpoint_slots().items():
        values = torch.randn(slot.shape, generator=generator)
        out[name] = 1 + 0.2 * values if "norm" in name else values * slot.shape[-1] ** -0.5
    return out


def random_model(kind: str = "v3", stored: torch.dtype = torch.bfloat16, **changes: Any) -> CPUModel:
    config = ModelConfig(**{**SIZES, **KINDS[kind], **changes})
    return CPUModel(config, store(random_weights(config), stored))


def of_checkpoint(config: ModelConfig, weights: Mapping[str, Tensor], kind: torch.dtype) -> CPUModel:
    return CPUModel(dataclasses.replace(config, fp8_block=(BLOCK, BLOCK)), store(weights, kind))


# of each engine one team: two would have helpers of one number, which share that number's memory
_TEAMS: dict[str, team.Team] = {library().level: team.TEAM} if why_not() is None else {}


def use(patch: pytest.MonkeyPatch, engine: str | Library) -> None:
    """Makes new models run on this level, or on an engine that a test has compiled, with helpers of its own."""
    if isinstance(engine, str):
        patch.setenv(SWITCH, engine)
    else:
        for module in (cpu, team):
            patch.setattr(module, "library", lambda: engine)
    patch.setattr(cpu, "TEAM", _TEAMS.setdefault(engine if isinstance(engine, str) else engine.level, team.Team()))


def ids_of(count: int, seed: int = 0, vocab: int = 150) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (count,), generator=generator).tolist()


def chain(count: int) -> range:
    """Returns the parents of rows that follow one another."""
    return range(-1, count - 1)


def random_tree(count: int, seed: int) -> list[int]:
    """Returns the parents of a random tree's nodes; some follow the context itself."""
    generator = torch.Generator().manual_seed(seed)
    return [int(torch.randint(-1, max(row, 1), (1,), generator=generator)) if row else -1 for row in range(count)]


def prompt(model: CPUModel, ids: Sequence[int], room: int = 80, chunk: int = 512) -> tuple[LatentCache, Tensor]:
    """Returns a cache that holds a prompt, and its hidden states."""
    cache, parts = model.new_cache(len(ids) + room), list[Tensor]()
    for first in range(0, len(ids), chunk):
        part = ids[first : first + chunk]
        parts.append(model.rows(part, cache, chain(len(part))))
        cache.commit(range(len(part)))
    return cache, torch.cat(parts)


def mtp_prompt(model: CPUModel, module: int, ids: Sequence[int], hidden: Tensor, chunk: int = 512,
               room: int = 80) -> tuple[LatentCache, Tensor]:  # fmt: skip
    """Returns the same of a module; `ids` and `hidden` are the tokens and states that it joins."""
    cache, parts, offset = model.new_mtp_cache(len(ids) + room), list[Tensor](), module + 1
    table = model.table(len(ids) + room + offset)
    for first in range(0, len(ids), chunk):
        part = ids[first : first + chunk]
        plan = plan_rows(table, cache.length, chain(len(part)), offset)
        parts.append(model.mtp_rows(module, part, hidden[first : first + chunk], cache, plan))
        cache.commit(range(len(part)))
    return cache, torch.cat(parts)


def copy_of(model: CPUModel, cache: LatentCache, module: bool = False) -> LatentCache:
    """Returns a cache of its own with the same committed slots, NaN in all others."""
    made = model.new_mtp_cache(cache.capacity) if module else model.new_cache(cache.capacity)
    for slots in made.slots:
        slots.fill_(torch.nan)
    made.take(cache, cache.length)
    return made


def path_to(node: int, parents: Sequence[int]) -> list[int]:
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path[::-1]


def scenario(model: CPUModel, context: int = 70) -> list[Tensor]:
    """Returns hidden states and logits of a prompt, a line, a tree, several sequences at once, and of modules."""
    ids, out = ids_of(context + 1), list[Tensor]()
    first, hidden = prompt(model, ids[:-1])
    second, other = prompt(model, ids_of(37, 5))
    third, _ = prompt(model, ids_of(3, 6))
    out += hidden, other, model.logits(hidden[-20:]), model.draft_logits(hidden[-3:])
    for count in (1, 2, 5, 16, 17, 64):
        out.append(model.rows(ids_of(count, count), first, chain(count)))
        out.append(model.rows(ids_of(count, count), first, random_tree(count, count)))
    for counts in ((1, 1, 1), (3, 1, 7), (20, 30, 14)):
        parts = [(cache, plan_rows(model.table(cache.capacity), cache.length, random_tree(count, count)))
                 for cache, count in zip((first, second, third), counts, strict=True)]  # fmt: skip
        out.append(model.joint_rows(ids_of(sum(counts), 8), JointPlan.of(*parts)))
    for module in range(len(model.mtp)):
        cache, inner = mtp_prompt(model, module, ids[module + 1 :], hidden[: len(ids) - module - 1])
        plan = plan_rows(model.table(200), cache.length, random_tree(9, 1), module + 1)
        out += inner, model.mtp_rows(module, ids_of(9, 2), hidden[:9], cache, plan)
    return out


def all_equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def digest(parts: Sequence[Tensor]) -> str:
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


def text(model: CPUModel, tokens: int = 24) -> list[int]:
    return lm_of(model, None, 256).generate(ids_of(20), max_new_tokens=tokens, seed=3, speculation=2).token_ids


def child_of(connection: Any, model: CPUModel | None) -> None:
    torch.set_num_threads(3)
    own = random_model() if model is None else model
    connection.send((text(own), len(team.TEAM._helpers), digest(scenario(own))))
