"""Translates the JSON dialects that describe models of this family into the fields of `ModelConfig`.

Three are read: Hugging Face's `config.json` as DeepSeek writes it, the same as transformers 5 writes it
(`rope_parameters`, `mlp_layer_types`, `num_mtp_layers`, `num_local_experts`), and the JSON of DeepSeek's inference/
programs. A missing field has the default of transformers' class of that name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtp_spec.model.errors import CheckpointError
from mtp_spec.model.files.keys import ROPE_KEYS, refuse_keys

# model_type -> class in `architectures`. All but V2 are DeepSeek-V3 under another name
SUPPORTED = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "joyai_llm_flash": "JoyAILLMFlashForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "sarvam_mla": "SarvamMLAForCausalLM",
}
V2 = "deepseek_v2"
V3_DEFAULTS: dict[str, Any] = {
    "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "n_shared_experts": 1,
    "q_lora_rank": 1536, "norm_topk_prob": True,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "glm4_moe_lite": {
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.8, "n_shared_experts": 1,
        "q_lora_rank": 768, "rms_norm_eps": 1e-5, "max_position_embeddings": 202752,
    },
    "sarvam_mla": {**V3_DEFAULTS, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": None},
    V2: {"n_shared_experts": 2, "q_lora_rank": 1536, "max_position_embeddings": 2048},
}  # fmt: skip
# other spellings -> ours
SPELLINGS = {
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
    "score_function": "scoring_func",
    "moe_router_topk_scaling_factor": "routed_scaling_factor",  # Megatron's
}
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
# keys of which programs know one value only -> that value, and what they do with another
IGNORED = "transformers computes with {} whatever it says, and DeepSeek's code refuses it"
ONE_WAY_V2: dict[str, tuple[Any, str]] = {
    "norm_topk_prob": (False, "DeepSeek's code then normalises without scaling, and transformers' never normalises"),
    "rope_interleave": (True, "V2's programs turn neighbouring dimensions together whatever it says"),
    "scoring_func": ("softmax", IGNORED.format("softmax")),
}
ONE_WAY: dict[str, tuple[Any, str]] = {"scoring_func": ("sigmoid", IGNORED.format("the sigmoid"))}
# keys whose null programs read differently, or not at all
NO_NULL = ("norm_topk_prob", "rope_interleave", "rms_norm_eps", "routed_scaling_factor", "max_position_embeddings")
DENSE, SPARSE = "dense", "sparse"
YARN_TYPES = ("yarn", "deepseek_yarn")  # the second is some engines' name for the first with mscale


def translated(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a description in the fields of DeepSeek's `config.json`, every default filled in.

    `rope_scaling` is YaRN's parameters or None, `eos_token_ids` a tuple.

    Raises:
        CheckpointError: another architecture, or a key that implies one.
    """
    if "n_layers" in given and "dim" in given:
        values = _from_deepseek(given)
        refuse_keys(given, str(values["model_type"]))
    else:
        values = dict(given)
        kind = values["model_type"] = _model_type(values)
        refuse_keys(values, kind)
        _respell(values)
        values = {**(DEFAULTS.get(kind, V3_DEFAULTS)), **values}
    _refuse_values(values)
    values["first_k_dense_replace"] = _dense_layers(values, "first_k_dense_replace" in given)
    for name in ("n_group", "topk_group"):
        values[name] = 1 if values.get(name) is None else values[name]
    values |= _gate(values) | _rope(values)
    eos = values.get("eos_token_id")
    values["eos_token_ids"] = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    return values


def _model_type(values: Mapping[str, Any]) -> str:
    """Returns the model's type, by name or by its class."""
    kind = values.get("model_type")
    if kind is None:
        classes = {name: kind for kind, name in reversed(SUPPORTED.items())}
        kind = next((classes[name] for name in values.get("architectures") or () if name in classes), None)
    if kind not in SUPPORTED:
        refuse_keys(values, str(kind))  # raises with what is missing, if it is known
        raise CheckpointError(
            f"model_type {kind!r} is not supported: this library runs {', '.join(SUPPORTED)} (DeepSeek V2, V2-Lite, "
            "V3, V3.1, R1, and models of their architecture); use transformers for others"
        )
    return str(kind)


def _respell(values: dict[str, Any]) -> None:
    """Renames fields to their usual names; two names of one field must agree."""
    for name, usual in SPELLINGS.items():
        if name not in values:
            continue
        value = values.pop(name)
        if values.get(usual) is None:
            values[usual] = value
        elif value is not None and value != values[usual]:
            raise CheckpointError(f"{name} is {value!r} and {usual} {values[usual]!r}: they mean the same, correct one")


def _dense_layers(values: Mapping[str, Any], said: bool) -> int:
    """Returns how many of the first layers are dense; `said`: `first_k_dense_replace` was given, not a default."""
    first, layers = values.get("first_k_dense_replace") or 0, values.get("num_hidden_layers")
    for name, words in (("mlp_layer_types", (DENSE, SPARSE)), ("moe_layer_freq", (0, 1))):
        kinds = values.get(name)
        if kinds is None or (name == "moe_layer_freq" and not isinstance(kinds, list)):
            continue
        if not isinstance(kinds, list):
            raise CheckpointError(f"{name} is {kinds!r}, it must be a list of {words[0]!r} and {words[1]!r}")
        count = len(kinds) if words[1] not in kinds else kinds.index(words[1])
        if kinds != [words[0]] * count + [words[1]] * (len(kinds) - count) or len(kinds) < (layers or 0):
            raise CheckpointError(
                f"{name} is {_shortened(kinds)}: only dense layers first and mixtures of experts after them, one entry "
                f"for each of {layers} layers, can be run"
            )
        count = min(count, layers or count)
        if said and first != count:
            raise CheckpointError(f"{name} has {count} dense layers and first_k_dense_replace is {first}: correct one")
        return count
    return first


def _shortened(values: Sequence[object]) -> str:
    return f"[{', '.join(map(repr, values[:6]))}{', ...' if len(values) > 6 else ''}] ({len(values)} entries)"


def _gate(values: Mapping[str, Any]) -> dict[str, Any]:
    """V3's transformers config leaves the gate implicit; V2's transformers code never normalises weights."""
    if values["model_type"] != V2:
        return {
            "scoring_func": values.get("scoring_func") or "sigmoid",
            "topk_method": values.get("topk_method") or "noaux_tc",
        }
    return {
        "scoring_func": values.get("scoring_func") or "softmax",
        "topk_method": values.get("topk_method") or "greedy",
        "norm_topk_prob": False,
    }


def _refuse_values(values: Mapping[str, Any]) -> None:
    """Refuses numbers that contradict each other, or that no released model has."""
    heads, kv_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if kv_heads is not None and kv_heads != heads:
        raise CheckpointError(f"num_key_value_heads is {kv_heads}: it must equal num_attention_heads ({heads}) in MLA")
    for name in NO_NULL:
        if values.get(name, False) is None:
            raise CheckpointError(f"{name} is null, give it a value: programs differ in what null means")
    v2 = values["model_type"] == V2
    for name, (usual, told) in (ONE_WAY_V2 if v2 else ONE_WAY).items():
        if values.get(name) not in (None, usual):
            raise CheckpointError(
                f"{name} is {values[name]!r}, which no released {'V2' if v2 else 'model of this family'} has: {told}. "
                "Use the program that the model was made for"
            )
    for name in ("qk_head_dim", "q_head_dim"):
        size, parts = values.get(name), (values.get("qk_nope_head_dim"), values.get("qk_rope_head_dim"))
        if size is not None and None not in parts and size != sum(parts):  # type: ignore[arg-type]
            raise CheckpointError(f"{name} is {size}: qk_nope_head_dim + qk_rope_head_dim = {sum(parts)} is expected")  # type: ignore[arg-type]


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Reads rope_theta / rope_scaling (DeepSeek) or rope_parameters (transformers 5)."""
    scaling: dict[str, Any] = {}
    for where in ("rope_parameters", "rope_scaling"):
        given = values.get(where) or {}
        if not isinstance(given, Mapping):
            raise CheckpointError(f"{where} is {given!r}, it must be an object such as {{'rope_type': 'default'}}")
        for name, value in given.items():
            _agree(scaling, "rope_type" if name == "type" else name, value, where)
    for name in ("rope_theta", "original_max_position_embeddings"):
        _agree(scaling, name, values.get(name), "config.json")
    out: dict[str, Any] = {"rope_scaling": None}
    if "rope_theta" in scaling:
        out["rope_theta"] = scaling["rope_theta"]
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        return out
    if kind not in YARN_TYPES:
        raise CheckpointError(f"rope scaling {kind!r} is not supported: models of this family use yarn or none")
    given = {name: value for name, value in scaling.items() if name in ROPE_KEYS}
    given.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
    if "factor" not in given:
        raise CheckpointError("rope scaling yarn lacks its factor")
    return out | {"rope_scaling": given}


def _agree(scaling: dict[str, Any], name: str, value: object, where: str) -> None:
    """Adds a rope parameter found in one more place; two places must agree."""
    if value is not None and scaling.setdefault(name, value) != value:
        raise CheckpointError(f"{where} has {name} {value!r}, elsewhere it is {scaling[name]!r}: correct one")


def _from_deepseek(given: Mapping[str, Any]) -> dict[str, Any]:
    """Translates DeepSeek's inference/ JSON."""
    values = {DEEPSEEK_KEYS.get(name, name): value for name, value in given.items()}
    scoring = values.setdefault("scoring_func", "softmax")
    v3 = scoring == "sigmoid"
    values["model_type"] = "deepseek_v3" if v3 else V2
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
        scale_fmt = values.get("scale_fmt")
        values["quantization_config"] = {
            "quant_method": "fp8", "weight_block_size": [128, 128], **({"scale_fmt": scale_fmt} if scale_fmt else {}),
        }  # fmt: skip
    return values
