"""The model's shape, read from any of the three JSON dialects in which DeepSeek models are described.

Field names are those of the Hugging Face `config.json`. An unknown architecture or an impossible number is refused
here, with its name, before any weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from typing import Any

from mtp_spec.model.errors import CheckpointError

SUPPORTED = {"deepseek_v3": "DeepseekV3ForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM"}
SCORING = ("sigmoid", "softmax")
TOPK_METHODS = ("noaux_tc", "group_limited_greedy", "greedy")
# keys of DeepSeek's inference/ JSON (dataclass ModelArgs) -> ours
DEEPSEEK_KEYS = {
    "dim": "hidden_size",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads",
    "n_activated_experts": "num_experts_per_tok",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "route_scale": "routed_scaling_factor",
    "score_func": "scoring_func",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnConfig:
    """Parameters of YaRN context extension (2309.00071)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        for name in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            _require(number and 0 < value < inf, f"rope scaling's {name}", value, "a number above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of a DeepSeek-V2 or V3 model; see the Hugging Face documentation of `config.json` for each field.

    `q_lora_rank` None means queries are projected directly (V2-Lite). `fp8_block` is the block of FP8 weight scales.
    """

    model_type: str = "deepseek_v3"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    num_experts_per_tok: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    n_shared_experts: int = 0
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    first_k_dense_replace: int = 0
    num_nextn_predict_layers: int = 0
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: YarnConfig | None = None
    rope_interleave: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    fp8_block: tuple[int, int] | None = None

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def has_gate_bias(self) -> bool:
        return self.topk_method == "noaux_tc"

    def __post_init__(self) -> None:
        positive = (
            "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
            "num_attention_heads", "n_routed_experts", "num_experts_per_tok", "kv_lora_rank", "qk_nope_head_dim",
            "qk_rope_head_dim", "v_head_dim", "n_group", "topk_group", "max_position_embeddings",
        )  # fmt: skip
        for name in positive:
            _require(self._is_int(name, 1), name, getattr(self, name), "an integer of at least 1")
        for name in ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"):
            _require(self._is_int(name, 0), name, getattr(self, name), "an integer of at least 0")
        rank = self.q_lora_rank
        _require(rank is None or self._is_int("q_lora_rank", 1), "q_lora_rank", rank, "null or at least 1")
        _require(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", self.qk_rope_head_dim, "even")
        _require(self.scoring_func in SCORING, "scoring_func", self.scoring_func, f"one of {SCORING}")
        _require(self.topk_method in TOPK_METHODS, "topk_method", self.topk_method, f"one of {TOPK_METHODS}")
        grouped = self.n_routed_experts % self.n_group == 0
        _require(grouped, "n_group", self.n_group, f"a divisor of n_routed_experts = {self.n_routed_experts}")
        _require(self.topk_group <= self.n_group, "topk_group", self.topk_group, f"at most n_group = {self.n_group}")
        pool = self.n_routed_experts // self.n_group * self.topk_group
        if self.topk_method == "greedy":
            pool = self.n_routed_experts
        _require(self.num_experts_per_tok <= pool, "num_experts_per_tok", self.num_experts_per_tok, f"at most {pool}")
        for name in ("rms_norm_eps", "rope_theta", "routed_scaling_factor"):
            _require(0 < getattr(self, name) < inf, name, getattr(self, name), "above 0")
        for name in ("norm_topk_prob", "rope_interleave", "tie_word_embeddings"):
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        ends = self.eos_token_ids
        _require(all(type(end) is int for end in ends), "eos_token_id", list(ends), "an id or a list of ids")
        block = self.fp8_block
        fits = block is None or (len(block) == 2 and all(type(size) is int and size > 0 for size in block))
        _require(fits, "weight_block_size", block, "two integers of at least 1")

    def _is_int(self, name: str, low: int) -> bool:
        value = getattr(self, name)
        return isinstance(value, int) and not isinstance(value, bool) and value >= low

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> ModelConfig:
        """Returns the shape described by a `config.json` (DeepSeek's or transformers' keys) or DeepSeek's own JSON.

        Raises:
            CheckpointError: another architecture, a missing key, or a value outside its range.
        """
        values = _from_deepseek(given) if "n_layers" in given and "dim" in given else dict(given)
        kind = values.get("model_type")
        if kind not in SUPPORTED:
            raise CheckpointError(
                f"model_type {kind!r} is not supported: this library runs {', '.join(SUPPORTED)} (DeepSeek V2, "
                "V2-Lite, V3, V3.1, R1). Distilled R1 models are Qwen or Llama: use transformers for them"
            )
        _refuse_variants(values)
        names = {field.name for field in fields(cls)}
        known = {name: value for name, value in values.items() if name in names and value is not None}
        known |= _family_defaults(kind, values) | _rope(values)
        if "num_mtp_layers" in values and "num_nextn_predict_layers" not in values:
            known["num_nextn_predict_layers"] = values["num_mtp_layers"]
        eos = values.get("eos_token_id")
        known["eos_token_ids"] = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
        block = (values.get("quantization_config") or {}).get("weight_block_size")
        known["fp8_block"] = tuple(block) if block else None
        missing = sorted(
            field.name for field in fields(cls) if field.name not in known and _is_required(field.name)
        )
        if missing:
            raise CheckpointError(f"config.json lacks {', '.join(missing)}: it does not describe a whole model")
        return cls(**known)

    def to_hf_dict(self) -> dict[str, Any]:
        """Returns a `config.json` in DeepSeek's dialect."""
        out: dict[str, Any] = {"architectures": [SUPPORTED[self.model_type]]}
        for field in fields(self):
            out[field.name] = getattr(self, field.name)
        eos = out.pop("eos_token_ids")
        out["eos_token_id"] = eos[0] if len(eos) == 1 else list(eos) or None
        block = out.pop("fp8_block")
        if block is not None:
            out["quantization_config"] = {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": list(block),
            }
        yarn = out.pop("rope_scaling")
        if yarn is not None:
            scaling = {field.name: getattr(yarn, field.name) for field in fields(yarn)}
            out["rope_scaling"] = {"type": "yarn", **{k: v for k, v in scaling.items() if v is not None}}
        out["hidden_act"] = "silu"
        return out


def load_config(path: Path) -> ModelConfig:
    """Returns the config in a folder's `config.json`, or in a JSON file.

    Raises:
        CheckpointError: the file is missing, is not JSON, or describes something else.
    """
    try:
        if not path.exists():
            raise CheckpointError(f"{path} does not exist: give the folder of a DeepSeek-V2/V3 checkpoint")
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise CheckpointError(f"{path} has no config.json: download the checkpoint's whole folder")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be looked into ({error}): give yourself the right to read it") from error
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{file} is not readable JSON ({error}): download it again") from error
    if not isinstance(given, dict):
        raise CheckpointError(f"{file} holds {type(given).__name__}, not an object: download it again")
    try:
        return ModelConfig.from_dict(given)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{file}: a value has the wrong kind ({error})") from error


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise CheckpointError(f"{name} is {value!r}, it must be {allowed}")


def _is_required(name: str) -> bool:
    optional = {
        "model_type", "q_lora_rank", "n_shared_experts", "n_group", "topk_group", "routed_scaling_factor",
        "norm_topk_prob", "scoring_func", "topk_method", "first_k_dense_replace", "num_nextn_predict_layers",
        "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_interleave",
        "tie_word_embeddings", "bos_token_id", "eos_token_ids", "fp8_block",
    }  # fmt: skip
    return name not in optional


def _refuse_variants(values: Mapping[str, Any]) -> None:
    """What the released models never use is refused rather than computed wrongly."""
    fixed = {"moe_layer_freq": 1, "attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
    for name, only in fixed.items():
        value = values.get(name)
        if value is not None and value != only:
            raise CheckpointError(f"{name} is {value!r}: only {only!r} is supported, as in every released model")
    heads, kv_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if kv_heads is not None and kv_heads != heads:
        raise CheckpointError(f"num_key_value_heads is {kv_heads}: it must equal num_attention_heads ({heads}) in MLA")


def _family_defaults(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """V3's transformers config leaves the gate implicit; V2's transformers code never normalises weights."""
    if kind == "deepseek_v3":
        scoring = {"scoring_func": values.get("scoring_func") or "sigmoid"}
        return {**scoring, "topk_method": values.get("topk_method") or "noaux_tc"}
    gate = {
        "scoring_func": values.get("scoring_func") or "softmax",
        "topk_method": values.get("topk_method") or "greedy",
        "norm_topk_prob": False,
    }
    groups = {name: values.get(name) or 1 for name in ("n_group", "topk_group")}
    return {**gate, **groups}


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Reads rope_theta / rope_scaling (DeepSeek) or rope_parameters (transformers 5)."""
    parameters = values.get("rope_parameters") or {}
    scaling = values.get("rope_scaling") or parameters
    out: dict[str, Any] = {"rope_scaling": None}
    theta = parameters.get("rope_theta", values.get("rope_theta"))
    if theta is not None:
        out["rope_theta"] = float(theta)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return out
    if kind != "yarn":
        raise CheckpointError(f"rope scaling {kind!r} is not supported: DeepSeek models use yarn or none")
    names = {field.name for field in fields(YarnConfig)}
    given = {name: value for name, value in scaling.items() if name in names and value is not None}
    given.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
    if "factor" not in given:
        raise CheckpointError("rope scaling yarn lacks its factor")
    out["rope_scaling"] = YarnConfig(**given)
    return out


def _from_deepseek(given: Mapping[str, Any]) -> dict[str, Any]:
    """Translates DeepSeek's inference/ JSON."""
    values = {DEEPSEEK_KEYS.get(name, name): value for name, value in given.items()}
    scoring = values.setdefault("scoring_func", "softmax")
    v3 = scoring == "sigmoid"
    values["model_type"] = "deepseek_v3" if v3 else "deepseek_v2"
    groups = values.get("n_group", 1)
    values["topk_method"] = "noaux_tc" if v3 else "group_limited_greedy" if groups > 1 else "greedy"
    values["q_lora_rank"] = values.get("q_lora_rank") or None
    original, maximum = values.pop("original_seq_len", 4096), values.pop("max_seq_len", 4096 * 4)
    factor, mscale = values.pop("rope_factor", 40), values.pop("mscale", 1.0)
    betas = {"beta_fast": values.pop("beta_fast", 32), "beta_slow": values.pop("beta_slow", 1)}
    values["max_position_embeddings"] = maximum
    if maximum > original:  # YaRN is on only then
        values["max_position_embeddings"] = max(maximum, int(original * factor))
        values["rope_scaling"] = {
            "type": "yarn", "factor": factor, "original_max_position_embeddings": original, **betas, "mscale": mscale,
            "mscale_all_dim": mscale,
        }  # fmt: skip
    if values.get("dtype") == "fp8":
        values["quantization_config"] = {"weight_block_size": [128, 128]}
    return values
