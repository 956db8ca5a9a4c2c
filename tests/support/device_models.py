"""Models on the kernels or their references: the bundled one, and random ones of every kind that the kernels run."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from lms import lm_of
from mtp_spec.api import LM
from mtp_spec.cuda.graphs import Graphs
from mtp_spec.model.checkpoint.folder import save_checkpoint
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.cuda.checkpoint import load_device_model
from mtp_spec.model.transformer import Transformer
from mtp_spec.speculation import Speculation
from mtp_spec.text import Tokenizer

DEMO = Path(str(files("mtp_spec.configs") / "demo"))
SIZES: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128,
    "num_hidden_layers": 3, "num_attention_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5, "kv_lora_rank": 32,
    "q_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1, "max_position_embeddings": 512, "fp8_block": (128, 128),
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "v3": {},
    "no query LoRA": {"q_lora_rank": None},
    "ragged": {"hidden_size": 208, "intermediate_size": 176, "q_lora_rank": 48, "moe_intermediate_size": 80},
    "two shared experts": {"n_shared_experts": 2},
    "no shared expert, three heads": {"n_shared_experts": 0, "num_attention_heads": 3},
    "halves": {"rope_interleave": False},
    "two modules": {"num_nextn_predict_layers": 2},
    "three modules": {"num_nextn_predict_layers": 3},
    "v2": {"model_type": "deepseek_v2", "topk_method": "group_limited_greedy", "scoring_func": "softmax",
           "num_nextn_predict_layers": 0, "norm_topk_prob": False},
    "v2 greedy": {"model_type": "deepseek_v2", "topk_method": "greedy", "scoring_func": "softmax", "q_lora_rank": None,
                  "num_nextn_predict_layers": 0, "norm_topk_prob": False, "n_group": 1, "topk_group": 1},
}  # fmt: skip
SHAPES = (None, 1, 4, Speculation(branching=(3, 2, 1)), Speculation(branching=(2, 2, 2), budget=9))
SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.9, "top_k": 50},
    {"temperature": 1.1, "min_p": 0.05, "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1,
     "logit_bias": {7: 2.0, 9: -float("inf")}},
)  # fmt: skip
# forbidding most tokens makes random drafts right now and then
FEW = {token: -float("inf") for token in range(6, 160)}


def checkpoint(folder: Path, kind: str, **changes: Any) -> Path:
    """Writes a random FP8 checkpoint."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**SIZES, **KINDS[kind], **changes}), torch.float32)
    with torch.no_grad():
        for name, slot in model.checkpoint_slots().items():
            slot.normal_(1.0, 0.1) if "norm" in name else slot.normal_(0.0, slot.shape[-1] ** -0.5)
    save_checkpoint(model, folder / "model", fp8=True)
    return folder / "model"


def device_lm(folder: Path = DEMO, device: str = "cpu", context: int = 300) -> LM:
    tokenizer = Tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
    return lm_of(load_device_model(folder, device), tokenizer, context)


def batch_lm(folder: Path, most: int, context: int = 120) -> LM:
    return lm_of(load_device_model(folder, "cpu"), None, context, max_batch=most)


class OnceThenAgain(Graphs):
    """Captures nothing: work runs when it would be captured, and when it would be replayed."""

    def __init__(self) -> None:
        pass

    def capture(self, work: Callable[[], None], ran: bool = False) -> Callable[[], None]:
        if not ran:
            work()
        return work
