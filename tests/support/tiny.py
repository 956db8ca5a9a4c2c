"""Random small checkpoints, made from transformers' own modules so that these can serve as the oracle."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
)
from transformers.modeling_layers import MtpModel

V3 = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 24,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "max_position_embeddings": 256,
    "rope_interleave": True,
    "bos_token_id": 0,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "v3": ({}, 1),
    "v3_two_modules": ({"num_nextn_predict_layers": 2}, 2),
    "v3_yarn": ({"rope_parameters": YARN}, 1),
    "v3_no_groups": ({"n_group": 1, "topk_group": 1}, 1),
    "v3_no_query_lora": ({"q_lora_rank": None}, 1),
    "v3_halves": ({"rope_interleave": False}, 1),
    "v2": ({"topk_method": "group_limited_greedy", "model_type": "deepseek_v2"}, 0),
    "v2_lite": (
        {"topk_method": "greedy", "q_lora_rank": None, "model_type": "deepseek_v2", "rope_parameters": YARN},
        0,
    ),
    # the shapes that published models have, made narrow
    "glm_4_7_flash": (
        {
            "model_type": "glm4_moe_lite",
            "num_attention_heads": 20,
            "num_key_value_heads": 20,
            "v_head_dim": 256,
            "qk_nope_head_dim": 192,
            "qk_rope_head_dim": 64,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.8,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        1,
    ),
    "gigachat3": (
        {
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 192,
        },
        1,
    ),
    "moonlight": (
        {
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "rms_norm_eps": 1e-5,
            "routed_scaling_factor": 2.446,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        },
        0,
    ),
    "kanana_2": ({"q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_routed_experts": 16}, 0),
    "kimi_k2": (
        {
            "written": "kimi_k2",
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.827,
            "rope_parameters": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0},
        },
        0,
    ),
    "joyai_llm_flash": (
        {
            "model_type": "glm4_moe_lite",
            "written": "joyai_llm_flash",
            "blocks": ["dense"],
            "n_group": 1,
            "topk_group": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 3.2e7},
        },
        1,
    ),
    "dense_then_experts": (
        {"model_type": "glm4_moe_lite", "n_group": 2, "topk_group": 1, "blocks": ["dense", "sparse"]},
        2,
    ),
    "sarvam_mla": ({"written": "sarvam_mla", "q_lora_rank": None, "n_group": 1, "topk_group": 1}, 0),
}
CLASSES: dict[str, tuple[Any, Any]] = {
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "glm4_moe_lite": (Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM),
}


@dataclass
class Tiny:
    folder: Path
    main: Any
    mtp: Any


def make(folder: Path, kind: str = "v3", seed: int = 0) -> Tiny:
    """Writes a checkpoint folder and returns it with transformers' models of the same weights."""
    changes, modules = KINDS[kind]
    values = {**V3, **changes}
    kind, written = values.pop("model_type", "deepseek_v3"), values.pop("written", None)
    blocks = values.pop("blocks", None)
    described, built = CLASSES[kind]
    if kind == "glm4_moe_lite":
        del values["first_k_dense_replace"]  # transformers 5 says it by mlp_layer_types
    torch.manual_seed(seed)
    main: Any = built(described(**values))
    if kind == "glm4_moe_lite":  # whose class in transformers has no fields for MTP modules
        main.config.num_mtp_layers, main.config.mtp_mlp_layer_types = modules, blocks or ["sparse"] * modules
    mtp = MtpModel(main, modules) if modules else None
    for module in (main, mtp):
        if module is not None:
            _randomise(module)
    tensors = stored_names(main.state_dict(), 0)
    if mtp is not None:
        tensors |= stored_names(mtp.state_dict(), values["num_hidden_layers"])
    folder.mkdir(parents=True, exist_ok=True)
    items = sorted(tensors.items())
    files = ("model-1.safetensors", "model-2.safetensors")
    weight_map: dict[str, str] = {}
    for file, part in zip(files, (items[::2], items[1::2]), strict=True):
        save_file(dict(part), folder / file, metadata={"format": "pt"})
        weight_map |= {name: file for name, _ in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    given = main.config.to_dict() | ({"model_type": written} if written else {})
    given.pop("mtp_mlp_layer_types", None)
    (folder / "config.json").write_text(json.dumps(given, default=str))
    return Tiny(folder, main.eval(), None if mtp is None else mtp.eval())


@torch.no_grad()
def _randomise(module: torch.nn.Module) -> None:
    for name, tensor in module.state_dict().items():
        if "norm" in name:
            tensor.normal_(1.0, 0.2)
        elif name.endswith("e_score_correction_bias"):
            tensor.normal_(0.0, 0.2)
        elif "embed_tokens" not in name or "model." in name:
            tensor.normal_(0.0, tensor.shape[-1] ** -0.5 * (2.0 if "lm_head" in name else 1.0))


def stored_names(state: dict[str, Tensor], first_layer: int) -> dict[str, Tensor]:
    """Renames transformers' module names to the checkpoint's."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if first_layer:
            if not name.startswith("layers."):
                continue  # shared with the main model
            _, number, rest = name.split(".", 2)
            rest = rest.replace("mtp_block.", "").replace("post_norm.", "shared_head.norm.")
            name = f"model.layers.{first_layer + int(number)}.{rest}"
        if name.endswith("mlp.experts.gate_up_proj"):
            for e, both in enumerate(tensor):
                gate, up = both.chunk(2)
                out[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = gate.clone()
                out[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = up.clone()
        elif name.endswith("mlp.experts.down_proj"):
            for e, down in enumerate(tensor):
                out[name.replace("down_proj", f"{e}.down_proj.weight")] = down.clone()
        else:
            out[name] = tensor.clone()
    return out
