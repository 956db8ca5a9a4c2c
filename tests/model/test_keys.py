"""Keys of config.json: other spellings are read, other mathematics refused by name, the harmless left aside."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import mtp_spec
import tiny
from mtp_spec.model.config import ModelConfig, load_config
from mtp_spec.model.errors import CheckpointError
from mtp_spec.model.files.dialects import SUPPORTED
from mtp_spec.model.files.keys import key_notes, tensor_needs
from places import CONFIGS

V3 = {**{name: value for name, value in tiny.V3.items() if value is not None}, "model_type": "deepseek_v3"}
DSA, POSITION, NORMS = "sparse attention", "scaling of queries by position", "further norms"
# what public configurations carry beside the fields
HARMLESS: dict[str, Any] = {
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "torch_dtype": "bfloat16",
    "transformers_version": "4.48.3", "use_cache": True, "initializer_range": 0.02, "pretraining_tp": 1, "ep_size": 1,
    "aux_loss_alpha": 0.001, "seq_aux": True, "attention_dropout": 0.0, "attention_bias": False, "moe_layer_freq": 1,
    "hidden_act": "silu", "num_key_value_heads": 4, "head_dim": 8, "qk_head_dim": 24, "pad_token_id": 3,
    "output_router_logits": False, "router_aux_loss_coef": 0.001, "_attn_implementation": "eager",
    "_name_or_path": "/models/x", "unsloth_fixed": True, "partial_rotary_factor": 1.0, "sliding_window": None,
    "use_sliding_window": False, "layer_types": ["full_attention"] * 3, "index_topk": None, "q_head_dim": 24,
    "return_dict": True, "id2label": {"0": "LABEL_0"}, "chunk_size_feed_forward": 0, "temperature": 1.0,
    "logit_scale": 1.0, "embedding_initializer_range": 0.02, "use_flash_attn": True, "unk_token_id": 5,
    "layer_norm_eps": 1e-5, "rms_norm_eps": 1e-6,
}  # fmt: skip
REFUSED: list[tuple[str, Any, str]] = [
    ("index_topk", 2048, DSA), ("index_n_heads", 64, DSA), ("index_head_dim", 128, DSA),
    ("indexer_types", ["full"], DSA), ("use_dsa", True, DSA),
    ("llama_4_scaling_beta", 0.1, POSITION), ("llama_4_scaling", {"beta": 0.1}, POSITION),
    ("attn_temperature_tuning", True, POSITION),
    ("sliding_window", 4096, "sliding window"), ("layer_types", ["sliding_attention", "full_attention"], "layer_types"),
    ("attention_chunk_size", 8192, "sliding window"), ("use_attention_gate", True, "a gate on attention"),
    ("attn_output_gate", True, "a gate on attention"), ("gated_attention", True, "a gate on attention"),
    ("use_qk_norm", True, "norms of queries"), ("qk_layernorm", True, "norms of queries"),
    ("use_post_norm", True, NORMS), ("post_mlp_layernorm", True, NORMS), ("gated_norm_rank", 16, NORMS),
    ("sandwich_norm", True, NORMS), ("final_logit_softcapping", 30.0, "capped"),
    ("attn_logit_softcapping", 50.0, "capped"), ("logits_scaling", 8.0, "scaling of embeddings"),
    ("embedding_multiplier", 12.0, "scaling of embeddings"), ("scale_emb", 12, "scaling of embeddings"),
    ("residual_multiplier", 0.22, "scaling of embeddings"), ("scale_depth", 1.4, "scaling of embeddings"),
    ("attention_multiplier", 0.01, "scale of attention"), ("query_pre_attn_scalar", 256, "scale of attention"),
    ("hc_mult", 4, "residual streams"), ("mhc_expansion", 4, "residual streams"),
    ("linear_attn_config", {"kda_layers": [1]}, "linear attention"), ("full_attention_interval", 4, "linear attention"),
    ("compress_ratios", [4, 128], "compressed attention"), ("use_sinks", True, "attention sinks"),
    ("swiglu_limit", 7.0, "clipped activation"), ("zero_expert_num", 256, "zero experts"),
    ("ngram_vocab_size_ratio", 78, "n-grams"), ("attention_bias", True, "biases"), ("mlp_bias", True, "biases"),
    ("qkv_bias", True, "biases"), ("add_bias_linear", True, "biases"), ("mlp_only_layers", [3], "order of dense"),
    ("moe_layer_freq", 2, "moe_layer_freq"), ("decoder_sparse_step", 2, "decoder_sparse_step"),
    ("no_rope_layers", [4], "without rope"), ("mla_use_nope", True, "without rope"),
    ("vision_config", {"depth": 27}, "sees"), ("text_config", {"model_type": "kimi_k2"}, "sees"),
    ("hidden_act", "gelu", "hidden_act"), ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
    ("use_alibi", True, "ALiBi"), ("parallel_attn", True, "parallel"), ("zero_centered_gamma", True, "shifted"),
    ("is_causal", False, "is_causal"), ("num_kv_shared_layers", 20, "share or repeat"),
    ("expert_capacity_factor", 1.5, "another gate"), ("moe_router_activation_func", "softmax", "moe_router_act"),
    # nobody knows them, and by their names they matter
    ("my_attention_scale", 2.0, "its name says"), ("rope_wobble", 3, "its name says"),
    ("router_twist", True, "its name says"),
    ("scale_embedding", True, "scaling of embeddings"), ("mup_enabled", True, "scaling of embeddings"),
    ("gating", True, "its name says"), ("normalize_before", True, "its name says"),
    ("positional_encoding", "learned", "its name says"), ("rescale_every", 6, "its name says"),
    ("mup", True, "its name says"), ("use_hybrid", True, "its name says"), ("new_norm_kind", "deep", "its name says"),
]  # fmt: skip


def read(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict({**V3, **changes})


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_keys(name: str) -> None:
    assert read(**{"rms_norm_eps": 1e-6, name: HARMLESS[name]}) == read()
    assert key_notes({name: HARMLESS[name]}) == []


@pytest.mark.parametrize(("name", "value", "delta"), REFUSED, ids=[f"{name}" for name, *_ in REFUSED])
def test_other_mathematics_is_refused_under_any_type(name: str, value: Any, delta: str) -> None:
    for kind in SUPPORTED:
        with pytest.raises(CheckpointError, match=delta):
            ModelConfig.from_dict({**V3, "model_type": kind, name: value})
    inference = json.loads((CONFIGS / "config_671B.json").read_text())
    with pytest.raises(CheckpointError, match=delta):
        ModelConfig.from_dict({**inference, name: value})


@pytest.mark.parametrize(("name", "value", "delta"), [
    ("llama_4_scaling_beta", 0.1, POSITION), ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
    ("short_factor", [1.0, 2.0], "another rope"), ("unheard_of", 3, "another rope"),
])  # fmt: skip
@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
def test_rope_keys(where: str, name: str, value: Any, delta: str) -> None:
    rope = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    assert read(**{where: rope}).rope_scaling is not None
    assert read(**{where: {**rope, name: 1.0 if "partial" in name else None}}) == read(**{where: rope})
    with pytest.raises(CheckpointError, match=delta):
        read(**{where: {**rope, name: value}})
    with pytest.raises(CheckpointError, match=delta):
        read(**{where: {"rope_type": "default", "rope_theta": 1e4, name: value}})
    for kind in ("linear", "dynamic", "llama3", "longrope", "axial"):
        with pytest.raises(CheckpointError, match=kind):
            read(**{where: {"rope_type": kind, "factor": 2.0}})


def test_unknown_keys_are_noted(tmp_path: Path) -> None:
    made = tiny.make(tmp_path / "model", "v3")
    config = json.loads((made.folder / "config.json").read_text())
    (made.folder / "config.json").write_text(json.dumps({**config, "made_by": "someone", "off": None, "zero": 0}))
    with pytest.warns(UserWarning, match="has made_by, which this library does not know"):
        mtp_spec.load(made.folder, measure=False)
    (made.folder / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mtp_spec.load(made.folder, measure=False)


@pytest.mark.parametrize(("kind", "delta"), [
    ("deepseek_v32", DSA), ("glm_moe_dsa", DSA), ("axk2", DSA), ("mistral4", POSITION), ("axk1", NORMS),
    ("deepseek_v4", "compressed attention"), ("kimi_k25", "sees"), ("kimi_linear", "linear attention"),
    ("longcat_flash", "two attentions"), ("youtu", "without experts"), ("llama", "distilled R1"),
    ("qwen2", "distilled R1"), ("gpt_oss", "is not supported: this library runs"), (None, "is not supported"),
])  # fmt: skip
def test_other_architectures_say_what_is_missing(kind: str | None, delta: str) -> None:
    with pytest.raises(CheckpointError, match=delta) as refused:
        ModelConfig.from_dict({**V3, "model_type": kind})
    assert kind in ("llama", "qwen2") or "R1 models are" not in str(refused.value)


def test_transformers_own_defaults_of_refused_types() -> None:
    """Their configuration classes, as they write themselves."""
    for kind, delta in (("deepseek_v32", DSA), ("glm_moe_dsa", DSA), ("mistral4", POSITION), ("axk1", NORMS)):
        with pytest.raises(CheckpointError, match=delta):
            ModelConfig.from_dict(AutoConfig.for_model(kind).to_dict())
        if kind in ("deepseek_v32", "glm_moe_dsa", "mistral4"):  # relabelled, their keys still say so
            with pytest.raises(CheckpointError, match=delta):
                ModelConfig.from_dict({**AutoConfig.for_model(kind).to_dict(), "model_type": "deepseek_v3"})


@pytest.mark.parametrize(("name", "need"), [
    ("model.layers.3.self_attn.indexer.wq_b.weight", DSA),
    ("model.layers.3.post_mlp_layernorm.weight", NORMS),
    ("model.layers.3.self_attn.q_norm.weight", "norms of queries"),
    ("model.layers.3.self_attn.g_proj.weight", "a gate on attention"),
    ("model.layers.3.self_attn.sinks", "attention sinks"),
    ("model.layers.3.self_attn.q_a_proj.bias", "biases"),
    ("vision_tower.encoder.blocks.0.wqkv.weight", "sees"),
])  # fmt: skip
def test_tensors_of_other_architectures(name: str, need: str) -> None:
    assert need in str(tensor_needs(["model.extra", name]))
    assert tensor_needs(["model.extra", "model.layers.3.mlp.shared_experts.gate_proj.weight"]) is None


def test_classes_stand_for_types() -> None:
    values = {name: value for name, value in V3.items() if name != "model_type"}
    assert ModelConfig.from_dict({**values, "architectures": ["DeepseekV3ForCausalLM"]}) == read()
    assert ModelConfig.from_dict({**values, "architectures": ["Glm4MoeLiteForCausalLM"]}).model_type == "glm4_moe_lite"


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3", "glm4_moe_lite", "sarvam_mla"])
def test_what_is_left_out_is_what_transformers_takes(kind: str) -> None:
    try:
        made = AutoConfig.for_model(kind)
    except ValueError:
        pytest.skip(f"this version of transformers has no {kind}")
    made.num_experts_per_tok = made.num_experts_per_tok or 8  # V2's class leaves it open
    whole = ModelConfig.from_dict(made.to_dict())
    required = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
                "num_attention_heads", "n_routed_experts", "num_experts_per_tok", "kv_lora_rank", "qk_nope_head_dim",
                "qk_rope_head_dim", "v_head_dim")  # fmt: skip
    short = {name: made.to_dict().get(name, getattr(whole, name)) for name in required}
    found = ModelConfig.from_dict({**short, "model_type": kind})
    beside = {"bos_token_id": None, "eos_token_ids": (), "num_nextn_predict_layers": 0}
    assert replace(found, **beside) == replace(whole, **beside)


@pytest.mark.parametrize("kind", ["deepseek_v3", "joyai_llm_flash", "glm4_moe_lite"])
def test_layer_types(kind: str) -> None:
    values = {name: value for name, value in V3.items() if name != "first_k_dense_replace"} | {"model_type": kind}
    for dense in range(4):
        types = ["dense"] * dense + ["sparse"] * (3 - dense)
        assert ModelConfig.from_dict({**values, "mlp_layer_types": types}).first_k_dense_replace == dense
        freq = [0] * dense + [1] * (3 - dense)
        assert ModelConfig.from_dict({**values, "moe_layer_freq": freq}).first_k_dense_replace == dense
    for wrong in (["sparse", "dense", "sparse"], ["dense", "sparse"], ["dense", "sparse", "odd"]):
        with pytest.raises(CheckpointError, match="only dense layers first"):
            ModelConfig.from_dict({**values, "mlp_layer_types": wrong})
    with pytest.raises(CheckpointError, match="mlp_layer_types is 'dense', it must be a list"):
        ModelConfig.from_dict({**values, "mlp_layer_types": "dense"})
    with pytest.raises(CheckpointError, match="first_k_dense_replace is 1: correct one"):
        ModelConfig.from_dict({**values, "first_k_dense_replace": 1, "mlp_layer_types": ["dense", "dense", "sparse"]})


def test_other_spellings() -> None:
    values = {name: value for name, value in V3.items() if name not in ("n_routed_experts", "n_shared_experts")}
    for routed in ("num_local_experts", "num_experts"):
        given = {**values, routed: 8, "num_shared_experts": 1, "num_mtp_layers": 2}
        assert ModelConfig.from_dict(given) == read(num_nextn_predict_layers=2)
    with pytest.raises(CheckpointError, match="num_local_experts is 9 and n_routed_experts 8"):
        read(num_local_experts=9)
    assert read(n_group=None, topk_group=None) == read(n_group=1, topk_group=1)
    yarn = {"factor": 4, "original_max_position_embeddings": 64}
    assert read(rope_scaling={"type": "deepseek_yarn", **yarn}) == read(rope_parameters={"rope_type": "yarn", **yarn})


def test_two_places_of_the_rope_agree() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    both = {**yarn, "type": "yarn", "rope_theta": 1e4}
    assert read(rope_parameters=both, rope_theta=10000) == read(rope_scaling=yarn)
    short = {name: value for name, value in yarn.items() if name != "original_max_position_embeddings"}
    assert read(rope_scaling=short, original_max_position_embeddings=64) == read(rope_scaling=yarn)  # as transformers
    for wrong in (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": 1e4},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": yarn},
        {"rope_scaling": yarn, "original_max_position_embeddings": 128},
        {"rope_scaling": {**yarn, "type": "default"}},
    ):
        with pytest.raises(CheckpointError, match=r"elsewhere it is .* correct one"):
            read(**wrong)
    for where in ("rope_scaling", "rope_parameters"):
        with pytest.raises(CheckpointError, match=f"{where} is 'yarn', it must be an object"):
            read(**{where: "yarn"})


def test_values_of_which_programs_think_differently() -> None:
    for name in ("norm_topk_prob", "rope_interleave", "rms_norm_eps", "routed_scaling_factor"):
        with pytest.raises(CheckpointError, match=f"{name} is null, give it a value"):
            read(**{name: None})
    for name, value in (("norm_topk_prob", True), ("rope_interleave", False), ("scoring_func", "sigmoid")):
        with pytest.raises(CheckpointError, match=f"{name} is {value!r}, which no released V2 has"):
            read(model_type="deepseek_v2", **{"norm_topk_prob": False, name: value})
    with pytest.raises(CheckpointError, match="scoring_func is 'softmax', which no released model"):
        read(scoring_func="softmax")
    for name in ("n_group", "topk_group"):  # transformers divides by none, or chooses from none
        with pytest.raises(CheckpointError, match=f"{name} is 0, it must be an integer of at least 1"):
            read(**{name: 0})
    assert read(moe_router_topk_scaling_factor=2.5) == read()
    with pytest.raises(CheckpointError, match=r"moe_router_topk_scaling_factor is 2\.0 and routed_scaling_factor 2.5"):
        read(moe_router_topk_scaling_factor=2.0)


@pytest.mark.parametrize("name", ["num_hidden_layers", "n_routed_experts", "num_nextn_predict_layers"])
def test_numbers_beyond_reason_are_told_at_once(name: str) -> None:
    with pytest.raises(CheckpointError, match="layers and experts of at most"):
        read(**{name: 8 * 10**8})


def test_written_and_read_again() -> None:
    for file in sorted(CONFIGS.glob("*.json")):
        config = load_config(file)
        again = ModelConfig.from_dict(config.to_hf_dict())
        if config.modules:  # which are found in files
            again = ModelConfig.from_dict({**config.to_hf_dict(), "mtp_mlp_layer_types": ["dense"]})
        assert again == config
