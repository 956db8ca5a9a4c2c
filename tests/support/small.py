"""A small DeepSeek-V3 whose matrices are whole blocks of 128 for two ranks, in bfloat16 or FP8, with small files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mtp_spec.model.checkpoint.cast import cast_job
from mtp_spec.model.checkpoint.folder import save_checkpoint
from mtp_spec.model.checkpoint.jobs import run_job
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=256, hidden_size=256, intermediate_size=512, moe_intermediate_size=256, num_hidden_layers=3,
    num_attention_heads=4, n_routed_experts=8, num_experts_per_tok=3, kv_lora_rank=128, qk_nope_head_dim=64,
    qk_rope_head_dim=64, v_head_dim=64, q_lora_rank=128, n_shared_experts=1, n_group=4, topk_group=2,
    first_k_dense_replace=1, num_nextn_predict_layers=1, max_position_embeddings=256,
)  # fmt: skip
SMALL_FILES = {
    "generation_config.json": '{"temperature": 0.6}',
    "tokenizer_config.json": '{"add_bos_token": false}',
    "LICENSE": "MIT",
}


def make(folder: Path, config: ModelConfig = CONFIG) -> Path:
    """Writes a random bfloat16 folder of several files."""
    model = Transformer(config, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, slot in model.checkpoint_slots().items():
            values = torch.randn(slot.shape, generator=generator)
            slot.copy_(1 + 0.1 * values if "norm" in name else values * slot.shape[-1] ** -0.5)
    save_checkpoint(model, folder, max_shard_bytes=3 * 2**20, extra_files=SMALL_FILES)
    return folder


def make_fp8(folder: Path, scale_fmt: str | None = None) -> Path:
    """Writes the same in FP8, as `mtp-spec cast` does."""
    source = make(folder.with_name(folder.name + "-bf16"))
    run_job(cast_job(source, "fp8", scale_fmt=scale_fmt), folder)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    """Returns every tensor of a folder's files."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            found |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 - not a mapping
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether both hold the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a
    )  # fmt: skip
