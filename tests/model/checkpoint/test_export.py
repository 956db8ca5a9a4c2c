"""A folder for other engines: what their loaders look up is there, of the kind they hold, and the model is the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import mtp_spec
import small
import tiny
from mtp_spec.cli.main import main
from mtp_spec.kernels.fp8 import weight_dequant
from mtp_spec.model.checkpoint.convert import ranks_job
from mtp_spec.model.checkpoint.export import export_job
from mtp_spec.model.checkpoint.folder import load_checkpoint, save_checkpoint
from mtp_spec.model.checkpoint.jobs import run_job
from mtp_spec.model.checkpoint.writer import wrong_checksums
from mtp_spec.model.transformer import Transformer
from mtp_spec.text import Tokenizer

SCALE = "_scale_inv"
BUNDLED = Path(str(files("mtp_spec.configs") / "demo"))
# fields that the model code of vLLM 0.33.0, SGLang 0.5.23 and LMDeploy 0.18.0 reads without a default of its own
FIELDS = (
    "architectures", "attention_bias", "eos_token_id", "first_k_dense_replace", "hidden_act", "hidden_size",
    "intermediate_size", "kv_lora_rank", "max_position_embeddings", "model_type", "moe_intermediate_size",
    "moe_layer_freq", "n_group", "n_routed_experts", "n_shared_experts", "norm_topk_prob", "num_attention_heads",
    "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads", "num_nextn_predict_layers", "pad_token_id",
    "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "rms_norm_eps", "rope_parameters", "routed_scaling_factor",
    "scoring_func", "tie_word_embeddings", "topk_group", "topk_method", "v_head_dim", "vocab_size",
)  # fmt: skip


def released(experts: int) -> Iterator[tuple[str, bool]]:
    """Yields the names in layer 61 of DeepSeek-V3's files, and whether they are FP8 with scales."""
    for name in ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head", "mlp.gate",
                 "input_layernorm", "post_attention_layernorm", "self_attn.q_a_layernorm",
                 "self_attn.kv_a_layernorm"):  # fmt: skip
        yield f"{name}.weight", False
    yield "mlp.gate.e_score_correction_bias", False
    for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
        yield f"self_attn.{name}.weight", True
    for owner in ("shared_experts", *(f"experts.{e}" for e in range(experts))):
        for name in ("gate_proj", "up_proj", "down_proj"):
            yield f"mlp.{owner}.{name}.weight", True


def exported(folder: Path, target: Path, **options: Any) -> Path:
    run_job(export_job(folder, **options), target)
    return target


def check_layout(folder: Path, modules: int = 1) -> None:
    """Every MTP module has exactly the released names and kinds of numbers, every other layer the same kinds."""
    config, tensors = json.loads((folder / "config.json").read_text()), small.tensors(folder)
    first, experts = config["num_hidden_layers"], config["n_routed_experts"]
    for layer in range(first, first + modules):
        prefix = f"model.layers.{layer}."
        names = {prefix + name for name, _ in released(experts)}
        names |= {prefix + name + SCALE for name, packed in released(experts) if packed}
        assert {name for name in tensors if name.startswith(prefix)} == names
        for copy, original in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
            assert torch.equal(tensors[f"{prefix}{copy}.weight"], tensors[f"{original}.weight"])
    kinds = dict(released(experts))
    for name, tensor in tensors.items():
        rest = name.split(".", 3)[-1]
        if rest in kinds:
            assert (tensor.dtype == torch.float8_e4m3fn) == kinds[rest], name
        elif name.endswith(SCALE):
            assert tensor.dtype == torch.float32


def check_index(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    held = {file.name: set(load_file(file)) for file in folder.glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, names in held.items() for name in names}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in small.tensors(folder).values())
    assert wrong_checksums(folder) == []


def test_a_hugging_face_folder(fp8: Path, tmp_path: Path) -> None:
    folder = exported(fp8, tmp_path / "out", shard_bytes=2**20)
    check_layout(folder)
    check_index(folder)
    before, after = small.tensors(fp8), small.tensors(folder)
    assert small.same(before, {name: after[name] for name in before})
    assert len(after) == len(before) + 2
    for name, text in small.SMALL_FILES.items():
        assert (folder / name).read_text() == text


def test_per_rank_files(fp8: Path, tmp_path: Path) -> None:
    run_job(ranks_job(fp8, 2), tmp_path / "ranks")
    main(["export", str(tmp_path / "ranks"), str(tmp_path / "out")])
    check_layout(tmp_path / "out")
    assert small.same(small.tensors(tmp_path / "out"), small.tensors(exported(fp8, tmp_path / "direct")))


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(BUNDLED, tmp_path_factory.mktemp("bundled") / "out")


def test_the_bundled_model(bundled: Path) -> None:
    folder = bundled
    check_layout(folder)
    check_index(folder)
    before, after = small.tensors(BUNDLED), small.tensors(folder)
    name = "model.layers.10.eh_proj.weight"  # trained in FP8; engines hold it in bfloat16
    assert torch.equal(after[name], weight_dequant(before[name], before[name + SCALE]))
    one, two = (load_checkpoint(path, dtype=torch.bfloat16).checkpoint_slots() for path in (BUNDLED, folder))
    assert small.same(one, two)


def test_tokenizer_template_and_generation_config_are_carried(bundled: Path) -> None:
    messages = [{"role": "user", "content": "Name three birds"}]
    ids: Any = AutoTokenizer.from_pretrained(bundled).apply_chat_template(messages, add_generation_prompt=True)
    ids = ids["input_ids"] if not isinstance(ids, list) else ids
    assert ids == Tokenizer(BUNDLED).chat_ids(messages)
    assert GenerationConfig.from_pretrained(bundled).eos_token_id == 1


@pytest.mark.parametrize("source", ["bundled", "small", "transformers", "deepseek"])
def test_config_names_every_field_that_engines_read(source: str, fp8: Path, bundled: Path, tmp_path: Path) -> None:
    if source == "transformers":
        folder = exported(tiny.make(tmp_path / "model", "v3_yarn").folder, tmp_path / "out")
    elif source == "deepseek":  # per-rank files with DeepSeek's own JSON
        run_job(ranks_job(fp8, 2), tmp_path / "ranks")
        args = tmp_path / "ranks" / "model_args.json"
        folder = exported(tmp_path / "ranks", tmp_path / "out", config_file=args)
    else:
        folder = bundled if source == "bundled" else exported(fp8, tmp_path / "out")
    given, config = json.loads((folder / "config.json").read_text()), AutoConfig.from_pretrained(folder)
    assert [name for name in FIELDS if not hasattr(config, name)] == []
    assert given["architectures"] == ["DeepseekV3ForCausalLM"]
    assert given["num_nextn_predict_layers"] == 1
    assert {"moe_layer_freq", "num_key_value_heads", "attention_bias"} <= given.keys()
    assert ("quantization_config" in given) == (source != "transformers")
    if source != "transformers":
        assert given["quantization_config"]["quant_method"] == "fp8"
        assert given["quantization_config"]["weight_block_size"] == [128, 128]


def test_two_modules_each_have_copies(tmp_path: Path) -> None:
    config = replace(small.CONFIG, num_nextn_predict_layers=2)
    folder = small.make(tmp_path / "model", config)
    out = small.tensors(exported(folder, tmp_path / "out"))
    for layer in (3, 4):
        assert torch.equal(out[f"model.layers.{layer}.shared_head.head.weight"], out["lm_head.weight"])


def test_transformers_finds_the_same_model(tmp_path: Path) -> None:
    made = tiny.make(tmp_path / "model", "v3", seed=5)
    folder = exported(made.folder, tmp_path / "out")
    ids = torch.tensor([[(37 * i + 11) % 96 for i in range(40)]])
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, made.main(ids).logits)
    logits = mtp_spec.load(folder, dtype="float32").score(ids[0].tolist()).logits
    assert float((logits - theirs(ids).logits[0]).detach().abs().max()) < 1e-4 * float(logits.abs().max())


def test_a_head_trained_in_bfloat16_beside_an_fp8_model(fp8: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fp8, tmp_path / "mixed"))
    for file in folder.glob("*.safetensors"):
        held = load_file(file)
        for name in [name for name in held if name.startswith("model.layers.3.") and name + SCALE in held]:
            held[name] = weight_dequant(held[name], held.pop(name + SCALE))
        save_file(held, file)
    (folder / "model.safetensors.index.json").unlink()
    out = exported(folder, tmp_path / "out")
    check_layout(out)
    one, two = (load_checkpoint(path, dtype=torch.float32).checkpoint_slots() for path in (folder, out))
    for name, slot in one.items():
        # e4m3 keeps three bits after the leading one, and these were e4m3 before
        assert (slot - two[name]).abs().amax() <= 0.01 * slot.abs().amax(), name


def test_refusals(tmp_path: Path) -> None:
    folder = small.make(tmp_path / "none", replace(small.CONFIG, num_nextn_predict_layers=0))
    with pytest.raises(mtp_spec.CheckpointError, match="no MTP modules"):
        export_job(folder)
    odd = small.make_fp8(tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [64, 64]
    (odd / "config.json").write_text(json.dumps(config))
    with pytest.raises(mtp_spec.CheckpointError, match=r"instead of|128x128 only"):
        export_job(odd)
    with pytest.raises(SystemExit):
        main(["export", str(odd)])


def test_a_model_saved_by_this_library_can_be_exported(tmp_path: Path) -> None:
    model = Transformer(small.CONFIG, torch.float32)
    with torch.no_grad():
        for slot in model.checkpoint_slots().values():
            slot.normal_(0.0, slot.shape[-1] ** -0.5)
    save_checkpoint(model, tmp_path / "saved", fp8=True)
    check_layout(exported(tmp_path / "saved", tmp_path / "out"))
