"""Keys of `config.json` that are not fields of `ModelConfig`: harmless, another architecture's, or unknown.

Public configurations have many keys that change no result, and sometimes one that changes all of them. A key known to
be harmless is ignored. A key known to change the mathematics is refused whatever the model_type, naming the missing
feature, unless its value switches it off. Of the others, those whose names suggest mathematics are refused too, because
nobody would notice a slightly wrong text; the rest are ignored with a note.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mtp_spec.model.errors import CheckpointError

FIELDS = frozenset({
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim", "q_head_dim", "v_head_dim", "q_lora_rank",
    "n_shared_experts", "n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob", "scoring_func",
    "topk_method", "first_k_dense_replace", "num_nextn_predict_layers", "max_position_embeddings", "rms_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "rope_interleave", "tie_word_embeddings", "bos_token_id",
    "eos_token_id", "quantization_config", "scale_fmt", "mlp_layer_types", "num_local_experts", "num_experts",
    "num_shared_experts", "num_mtp_layers", "score_function", "mtp_mlp_layer_types", "moe_router_topk_scaling_factor",
    "original_max_position_embeddings", "quantization", "compression_config",
    # DeepSeek's inference/ JSON
    "dim", "inter_dim", "moe_inter_dim", "n_layers", "n_dense_layers", "n_heads", "n_activated_experts",
    "n_expert_groups", "n_limited_groups", "route_scale", "score_func", "dtype", "max_batch_size", "max_seq_len",
    "original_seq_len", "rope_factor", "beta_fast", "beta_slow", "mscale",
})  # fmt: skip
# YaRN's, in rope_scaling or rope_parameters
ROPE_KEYS = frozenset({
    "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "attention_factor", "truncate",
})  # fmt: skip
ROPE_HARMLESS = frozenset({"type", "rope_type", "rope_theta", "max_position_embeddings", "finetuned"})
# keys that are allowed with these values only
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "hidden_activation": ("silu",), "activation_function": ("silu",), "act_fn": ("silu",),
    "moe_layer_freq": (1,), "decoder_sparse_step": (1,),
    "partial_rotary_factor": (1,), "layer_types": ("full_attention",), "is_causal": (True,), "use_rope": (True,),
    "position_embedding_type": ("rope", "absolute"), "norm_type": ("rmsnorm", "rms_norm", "RMSNorm"),
    "normalization": ("rmsnorm", "rms_norm", "RMSNorm"), "use_rmsnorm": (True,), "use_mla": (True,),
    "moe_router_enable_expert_bias": (True,), "moe_router_enable_shared_expert": (True,), "use_expert_bias": (True,),
    "moe_router_activation_func": ("sigmoid",), "moe_renormalize": (True,), "use_grouped_topk": (True,),
    "multi_latent_attention": (True,), "rotary_percent": (1,),
}  # fmt: skip
HARMLESS = frozenset({
    "architectures", "auto_map", "torch_dtype", "transformers_version", "use_cache", "name_or_path", "pretraining_tp",
    "ep_size", "aux_loss_alpha", "seq_aux", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder",
    "is_decoder", "add_cross_attention", "cross_attention_hidden_size", "tie_encoder_decoder", "finetuning_task",
    "task_specific_params", "problem_type", "prefix", "pruned_heads", "tokenizer_class", "torchscript",
    "use_bfloat16", "tf_legacy_loss", "id2label", "label2id", "num_labels", "head_dim", "unsloth_fixed",
    "model_name", "license", "max_window_layers", "default_theta",
    "mtp_loss_scaling_factor", "mtp_layer_types", "temperature", "top_k", "top_p", "typical_p", "do_sample",
    "early_stopping",
    "num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "repetition_penalty", "max_length",
    "min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
    "output_scores", "return_dict_in_generate", "remove_invalid_values", "suppress_tokens", "begin_suppress_tokens",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "model_max_length",
    "vocab_size_padded", "pad_vocab_size_multiple",
})  # fmt: skip
HARMLESS_PATTERNS = re.compile(
    r"_.*|.*(token_ids?|dropout|initializer|init_std|init_method|_loss|loss_|_aux|aux_|implementation|flash|"
    r"parallel_size|checkpointing|recompute|fused|fusion|_version|output_(router_logits|attentions|hidden_states)).*"
)
DSA = "sparse attention with an indexer (DSA, as in DeepSeek-V3.2 and GLM-5)"
BY_POSITION = "scaling of queries by position (llama 4, Mistral 4)"
NORMS = "further norms (as A.X-K1 has after its experts)"
SCALES = "scaling of embeddings, branches or logits"
LINEAR = "layers of linear attention"
INSIDE = "a way to the language model inside a model that sees or hears"
# reasons for keys that are not known themselves; an architecture known by name gives a better reason
OTHER, UNKNOWN, OTHER_ROPE = "other mathematics", "what its name says, which is not known here", "another rope"
VAGUE = (OTHER, UNKNOWN, OTHER_ROPE)
NO_LATENTS = "attention without latents; distilled R1 models are Llama or Qwen"
# names -> what the model would need
DELTAS: tuple[tuple[str, str], ...] = (
    (r"index_.*|indexer.*|(use_)?(dsa|nsa)(_.*)?|sparse_attention.*|sparse_config|attn_sparse.*",
     DSA),
    (r"llama_4_scaling.*|attn_temperature_tuning|attention_temperature_tuning|floor_scale|attn_scale|"
     r"position_scaling.*|query_scale.*", BY_POSITION),
    (r"(use_)?sliding_window.*|swa_.*|attention_window.*|window_size|local_attention.*|attention_chunk_size|"
     r"chunked_attention.*", "attention over a sliding window"),
    (r".*(attn|attention).*gat(e|ed|ing).*|gated_(attn|attention).*|.*output_gate.*|head_gate.*|use_g_proj",
     "a gate on attention's output"),
    (r".*(qk|query_key|q_k)_?(layer)?_?norm.*|qk_layernorm.*", "norms of queries and keys"),
    (r"(use_)?(post|pre)_.*norm.*|.*sandwich.*|.*post_norm.*|.*gated_norm.*|.*extra_norm.*|.*mlp_(layer)?norm.*|"
     r"mup_norm.*|normalize_embedd.*|.*embed(ding)?_(layer)?norm.*|apply_residual_connection_post_layernorm|"
     r"use_layernorm|layer_norm_eps(ilon)?", NORMS),
    (r".*soft_?cap.*|.*logits?_cap.*", "capped logits"),
    (r"attention_multiplier|softmax_scale|query_pre_attn_scalar|attention_scal.*|attn_factor|scale_attn.*",
     "another scale of attention's scores"),
    (r".*_multiplier|logits?_scal(e|ing)|scale_(emb|depth|embedding).*|dim_model_base|mup_.*|embedd?ing_scale|"
     r"emb_scale|residual_scal.*|depth_scal.*", SCALES),
    (r"m?hc_.*|.*hyper_connection.*|.*residual_streams?|farskip.*|use_farskip.*", "several residual streams"),
    (r"linear_(attn|attention|num|key|value|conv).*|full_attention_interval|layer_group_size|.*mamba.*|ssm_.*|kda_.*|"
     r"attn_type_list|hybrid_.*|gdn_.*|.*gated_delta.*|short_conv.*|conv_kernel.*|.*lightning_attn.*", LINEAR),
    (r"compress_(ratio|rate)s?.*|o_lora_rank|o_groups|num_hash_layers|swiglu_(limit|alpha).*|.*attention_sinks?.*|"
     r"(use_|attn_)?sinks?", "compressed attention, attention sinks or a clipped activation (DeepSeek-V4)"),
    (r"zero_expert.*|.*ngram_(embed|size|vocab|order|num|head|table).*|emb_neighbor.*|emb_split.*|oe_.*|.*engram.*",
     "zero experts or embeddings of n-grams (LongCat)"),
    (r"(attention|attn|qkv|mlp|q|k|v|o|kv|lm_head|output|linear|ffn|router|gate|head)_(out_|proj_|linear_)?bias|"
     r"use_(qkv_|mlp_|attention_|attn_)?bias|add_(bias_linear|qkv_bias|bias).*|bias", "biases of matrices"),
    (r"mlp_only_layers|moe_layers?|moe_layer_(indices|start.*|end.*|interval.*|pattern)|interleave_moe.*|dense_layers",
     "another order of dense layers and mixtures of experts"),
    (r"(no_?rope|nope)_(layer|interval).*|(use|mla_use)_nope|rope_layers?", "layers without rope"),
    (r"(text|vision|audio|thinker|talker|language|llm|projector)_config", INSIDE),
    (r".*kv_shar.*|.*shared_layers.*|share_.*layers?.*|cross_layer.*|num_loops?|loop_.*|num_recurrent.*|"
     r"kv_shared.*", "layers that share or repeat"),
    (r"zero_centered.*|.*norm.*(plus_one|unit_offset|zero_centered).*|add_unit_offset", "norms with shifted weights"),
    (r"(use_)?parallel_(attn|attention|residual|block)|parallel_residual", "parallel branches"),
    (r"alibi.*|use_alibi", "positions by ALiBi"),
    (r"(expert|router|moe)_(choice|capacity|softcap|input_scale|norm_before).*|norm_after_topk|moe_latent.*|"
     r"router_scale.*|expert_scal.*|.*apply_router_weight_on_input.*", "another gate or other experts"),
)  # fmt: skip
PATTERNS = tuple((re.compile(pattern), delta) for pattern, delta in DELTAS)
# words in the name of an unknown key that is likely to change what is computed
SUSPICIOUS = re.compile(
    r"(^|_)(attn|attention|norms?|normali[sz]\w*|layernorm|layerscale|rope|rotary|(re)?scal(e|es|ing)|gates?|gated|"
    r"gating|router|routing|bias|window|cap|multiplier|activation|act|experts?|mla|lora|residual|softmax|sparse|heads?|"
    r"clip|temperature|conv|position(al)?|swa|nope|altup|mup|hybrid|sinks?|m?hc|streams?|ngram|dsa|nsa|kda|gdn|linear|mamba|ssm|ffn)(_|$)"
)
# architectures by name, if the configuration alone does not say what is missing
KINDS: dict[str, str] = {
    "deepseek_v32": DSA, "glm_moe_dsa": DSA, "axk2": f"{DSA}, and gated norms", "mistral4": BY_POSITION, "axk1": NORMS,
    "deepseek_v4": "compressed attention, several residual streams and another gate",
    "kimi_linear": f"{LINEAR} and layers without rope", "bailing_hybrid": LINEAR, "bailing_moe_linear": LINEAR,
    "longcat_flash": "two attentions a layer and zero experts", "youtu": "a dense model, without experts",
    "minicpm3": "scaled embeddings and a dense model", "kimi_k25": INSIDE, "kimi_vl": INSIDE, "deepseek_vl_v2": INSIDE,
    "instella_moe": "a gate on attention's output and two residual streams", "deepseek": "attention without latents",
    "llama": NO_LATENTS, "qwen2": NO_LATENTS, "qwen3": NO_LATENTS,
}  # fmt: skip


# tensors that only other architectures have -> what these would need
TENSORS = (
    (re.compile(r"\.(self_attn\.)?indexer\."), DSA),
    (re.compile(r"\.(post|pre)_(mlp|feedforward|moe)_(layer)?norm|\.mlp\.\w*norm\.|\.attn_out_norm"), NORMS),
    (re.compile(r"\.self_attn\.(q|k)_(layer)?norm\."), "norms of queries and keys"),
    (re.compile(r"\.self_attn\.(g_proj|gate_proj|gate|o_gate|q_gate)\."), "a gate on attention's output"),
    (re.compile(r"\.(attn_)?sinks?(\.|$)"), "attention sinks"),
    (re.compile(r"_proj\.bias$|lm_head\.bias$|_mqa\.bias$"), "biases of matrices"),
    (re.compile(r"\.linear_attn\.|\.A_log$|\.conv1d\."), LINEAR),
    (re.compile(r"^(model\.)?(vision|visual|mm_projector|multi_modal|language_model)"), INSIDE),
)  # fmt: skip


def tensor_needs(left_over: Sequence[str]) -> str | None:
    """Returns what tensors without a place would need, if they are known from another architecture."""
    for name in left_over:
        need = next((need for pattern, need in TENSORS if pattern.search(name)), None)
        if need is not None:
            return f"{name} asks for {need}"
    return None


def refuse_keys(values: Mapping[str, Any], kind: str) -> None:
    """Refuses a description of another architecture.

    Raises:
        CheckpointError: names what this library would need, and the keys that say so.
    """
    named = kind in KINDS
    needs = {f"model_type {kind!r}": KINDS[kind]} if named else {}
    for name, value in values.items():
        delta = _delta(name, value, values)
        if delta is not None and not (named and delta.startswith(VAGUE)):
            needs[f"{name} = {value!r}"] = delta
    for scaling in (values.get("rope_scaling"), values.get("rope_parameters")):
        found = _rope_needs(scaling) if isinstance(scaling, Mapping) else {}
        needs |= {key: delta for key, delta in found.items() if not (named and delta.startswith(VAGUE))}
    if needs:
        listed = "; ".join(f"{what} asks for {need}" for what, need in needs.items())
        raise CheckpointError(
            f"{kind!r} is not supported as it is described: {listed}. Use transformers or another engine. (Such keys "
            "are never left aside silently; one that is known to change nothing can be deleted from config.json)"
        )


def key_notes(values: Mapping[str, Any]) -> list[str]:
    """Returns notes about unknown keys that are ignored."""
    unknown = sorted(name for name, value in values.items() if not _is_off(value) and not _is_known(name))
    if not unknown:
        return []
    return [f"config.json has {', '.join(unknown)}, which this library does not know and leaves aside"]


def _rope_needs(scaling: Mapping[str, Any]) -> dict[str, str]:
    needs: dict[str, str] = {}
    for name, value in scaling.items():
        if name in ROPE_KEYS or name in ROPE_HARMLESS or (_is_off(value) and name not in ONLY):
            continue
        delta = _delta(name, value, scaling) or (None if name in ONLY else OTHER_ROPE)
        if delta is not None:
            needs[f"rope's {name} = {value!r}"] = delta
    return needs


def _delta(name: str, value: Any, values: Mapping[str, Any]) -> str | None:
    """Returns the feature that a key asks for if no model of this family has it."""
    if name in ONLY:
        fits = value is None or _only(value, ONLY[name]) or (name == "moe_layer_freq" and isinstance(value, list))
        return None if fits else f"{OTHER} than {ONLY[name][0]!r} stands for"
    if _is_off(value) or name in FIELDS or name in HARMLESS:
        return None
    if name.startswith("layer_norm_eps") and "rms_norm_eps" in values:
        return None
    if name.startswith("sliding_window") and values.get("use_sliding_window") is False:
        return None
    for pattern, delta in PATTERNS:
        if pattern.fullmatch(name):
            return None if delta == SCALES and value == 1 and value is not True else delta
    if HARMLESS_PATTERNS.fullmatch(name):
        return None
    return UNKNOWN if SUSPICIOUS.search(name) else None


def _only(value: Any, allowed: tuple[Any, ...]) -> bool:
    return all(item in allowed for item in value) if isinstance(value, list) else value in allowed


def _is_off(value: Any) -> bool:
    """Whether a value switches its key off."""
    return value is None or value is False or value in (0, "", [], {})


def _is_known(name: str) -> bool:
    patterns = (HARMLESS_PATTERNS, *(pattern for pattern, _ in PATTERNS))
    return name in FIELDS or name in HARMLESS or name in ONLY or any(pattern.fullmatch(name) for pattern in patterns)
