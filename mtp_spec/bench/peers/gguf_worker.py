"""Writes an FP8 checkpoint as a GGUF file of llama.cpp's architecture deepseek2, in Q8_0, without the MTP modules.

Run by a Python that has numpy and gguf, without this package. Names, fields and the split of kv_b_proj are those of
llama.cpp's converter (conversion/deepseek.py); routers, norms and biases stay float32, as in its Q8_0 files. There is
no tokenizer: the file is for ids. Argument: one JSON object {folder, file}. It prints one line with the file's size and
the bytes that a token reads: everything but the embedding, and only the chosen experts.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 128
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.gate": "ffn_gate_inp",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
WIDE = ("norm", "ffn_gate_inp")  # parts of the names of matrices and vectors that stay float32
Floats = Any  # of numpy, float32
# name in the file, its shape, and the function that creates its values
Part = tuple[str, tuple[int, ...], Callable[[], Floats]]


class Files:
    """The tensors of a folder of safetensors, as float32."""

    def __init__(self, folder: Path) -> None:
        self._places: dict[str, tuple[Any, dict[str, Any]]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            data = np.memmap(file, dtype=np.uint8, mode="r")
            (size,) = struct.unpack("<Q", data[:8].tobytes())
            header = json.loads(data[8 : 8 + size].tobytes())
            header.pop("__metadata__", None)
            self._places |= {name: (data[8 + size :], one) for name, one in header.items()}
        self._e4m3 = np.array([_e4m3(code) for code in range(256)], dtype=np.float32)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._places[name][1]["shape"])

    def read(self, name: str) -> Floats:
        data, one = self._places[name]
        raw = np.asarray(data[slice(*one["data_offsets"])])
        if one["dtype"] == "F32":
            return raw.view(np.float32).reshape(one["shape"])
        if one["dtype"] == "BF16":
            return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(one["shape"])
        if one["dtype"] != "F8_E4M3":
            raise ValueError(f"{name} is {one['dtype']}: F32, BF16 or F8_E4M3 is expected")
        rows, columns = one["shape"]
        scales = self.read(name + "_scale_inv").repeat(BLOCK, 0)[:rows].repeat(BLOCK, 1)[:, :columns]
        return self._e4m3[raw.reshape(rows, columns)] * scales


def _e4m3(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if code & 128 else size


def parts(files: Files, config: dict[str, Any]) -> Iterator[Part]:
    """Yields every tensor of the file."""
    for source, name in WHOLE.items():
        if source + ".weight" in files:
            yield _copied(files, source + ".weight", name + ".weight")
    for layer in range(config["num_hidden_layers"]):
        prefix, block = f"model.layers.{layer}.", f"blk.{layer}."
        for source, name in PARTS.items():
            if prefix + source + ".weight" in files:
                yield _copied(files, prefix + source + ".weight", block + name + ".weight")
        if prefix + "mlp.gate.e_score_correction_bias" in files:
            yield _copied(files, prefix + "mlp.gate.e_score_correction_bias", block + "exp_probs_b.bias")
        both = prefix + "self_attn.kv_b_proj.weight"
        heads, rank = config["num_attention_heads"], files.shape(both)[1]
        nope, values = config["qk_nope_head_dim"], config["v_head_dim"]
        yield block + "attn_k_b.weight", (heads, rank, nope), partial(_keys, files, both, heads, nope)
        yield block + "attn_v_b.weight", (heads, values, rank), partial(_values, files, both, heads, nope)
        for kind in ("gate", "up", "down"):
            names = [f"{prefix}mlp.experts.{e}.{kind}_proj.weight" for e in range(config["n_routed_experts"])]
            if names[0] in files:
                shape = (len(names), *files.shape(names[0]))
                yield f"{block}ffn_{kind}_exps.weight", shape, partial(_stacked, files, names)


def _copied(files: Files, source: str, name: str) -> Part:
    return name, files.shape(source), partial(files.read, source)


def _keys(files: Files, both: str, heads: int, nope: int) -> Floats:
    """Returns a layer's keys' half of kv_b_proj, transposed by head."""
    whole = files.read(both)
    return whole.reshape(heads, -1, whole.shape[1])[:, :nope].swapaxes(1, 2)


def _values(files: Files, both: str, heads: int, nope: int) -> Floats:
    whole = files.read(both)
    return whole.reshape(heads, -1, whole.shape[1])[:, nope:]


def _stacked(files: Files, names: list[str]) -> Floats:
    return np.stack([files.read(name) for name in names])


def described(writer: Any, config: dict[str, Any], scoring: Any) -> None:
    """Adds the fields that llama.cpp reads; queries, keys and values are those over the latents, one head."""
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    if config.get("q_lora_rank"):
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(rope)
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(scoring)


def main() -> None:
    asked = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries must not print between the answers
    import gguf

    folder, kind = Path(asked["folder"]), gguf.GGMLQuantizationType.Q8_0
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(asked["file"], "deepseek2")
    described(writer, config, gguf.ExpertGatingFuncType[config["scoring_func"].upper()])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    made, read = [*parts(Files(folder), config)], 0.0
    for name, shape, _ in made:
        wide = len(shape) == 1 or any(part in name for part in WIDE)
        stored = shape if wide else gguf.quants.quant_shape_to_byte_shape(shape, kind)
        size = int(np.prod(stored)) * (4 if wide else 1)
        writer.add_tensor_info(name, stored, np.dtype(np.float32 if wide else np.uint8), size, None if wide else kind)
        share = config["num_experts_per_tok"] / config["n_routed_experts"] if "_exps." in name else 1.0
        read += 0.0 if name.startswith("token_embd") else share * size
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape, values in made:
        wide = len(shape) == 1 or any(part in name for part in WIDE)
        floats = np.ascontiguousarray(values(), dtype=np.float32)
        writer.write_tensor_data(floats if wide else gguf.quants.quantize(floats, kind))
    writer.close()
    facts = {"bytes": os.path.getsize(asked["file"]), "read a token": read, "numpy": np.__version__}
    print(json.dumps(facts), file=answers, flush=True)


if __name__ == "__main__":
    main()
