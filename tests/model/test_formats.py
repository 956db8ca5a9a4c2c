"""Weights in other formats are named, sized and refused; the one that is V3's under another name is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mtp_spec
import small
from mtp_spec.cli.estimate import estimate
from mtp_spec.cli.main import main
from mtp_spec.model.checkpoint.cast import cast_job
from mtp_spec.model.checkpoint.convert import hf_job, ranks_job
from mtp_spec.model.checkpoint.export import export_job
from mtp_spec.model.checkpoint.folder import load_checkpoint
from mtp_spec.model.checkpoint.jobs import run_job
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.files.formats import stored_format

SCALE = "_scale_inv"


def group(**weights: Any) -> dict[str, Any]:
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


BLOCKS = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
    "config_groups": group(num_bits=8, type="float", strategy="block", block_structure=[128, 128]),
}  # fmt: skip
# as published folders say it -> what it is called, and bits a number
FORMATS: dict[str, tuple[dict[str, Any], str, float | None]] = {
    "compressed int4": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head", "re:.*self_attn.*"],
         "config_groups": group(num_bits=4, type="int", strategy="group", group_size=32)},
        "compressed-tensors INT4 in groups of 32", 4.5,
    ),
    "compressed int8": (
        {"quant_method": "compressed-tensors", "format": "int-quantized",
         "config_groups": group(num_bits=8, type="int", strategy="channel")},
        "compressed-tensors INT8", 8,
    ),
    "compressed per channel": (
        {"quant_method": "compressed-tensors", "format": "float-quantized",
         "config_groups": group(num_bits=8, type="float", strategy="channel")},
        "compressed-tensors FP8 per channel", 8,
    ),
    "compressed per tensor": (
        {"quant_method": "compressed-tensors", "config_groups": group(num_bits=8, type="float", strategy="tensor")},
        "compressed-tensors FP8 with one scale a matrix", 8,
    ),
    "compressed nvfp4": (
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
         "config_groups": group(num_bits=4, type="float", strategy="tensor_group", group_size=16)},
        "compressed-tensors NVFP4", 4.5,
    ),
    "compressed mxfp4": (
        {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized",
         "config_groups": group(num_bits=4, type="float", strategy="group", group_size=32)},
        "compressed-tensors MXFP4", 4.25,
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, "AWQ INT4 in groups of 128", 4.15625,
    ),
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False}, "GPTQ INT4 in groups of 64", 4.3125,
    ),
    "modelopt nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "ModelOpt NVFP4", 4.5),
    "modelopt, nested": (
        {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]},
         "quant_method": "modelopt"}, "ModelOpt NVFP4", 4.5,
    ),
    "modelopt fp8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, "ModelOpt FP8", 8),
    "mxfp4": ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, "MXFP4", 4.25),
    "bitsandbytes 4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes 4 bit", 4.5),
    "bitsandbytes 8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8 bit", 8),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, r"FP8 per channel \(fbgemm\)", 8),
    "fp8 without blocks": ({"quant_method": "fp8", "activation_scheme": "static"}, "FP8 with one scale a matrix", 8),
    "hqq": ({"quant_method": "hqq", "bits": 3, "group_size": 64}, "hqq INT3 in groups of 64", 3.25),
    "mlx": ({"bits": 4, "group_size": 64, "mode": "affine"}, "MLX INT4 in groups of 64", 4.5),
    "awq, numbers as text": (
        {"quant_method": "awq", "bits": "4", "group_size": "128"}, "AWQ INT4 in groups of 128", 4.15625,
    ),
    "mxfp8": ({"quant_method": "fp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}, "MXFP8", 8.25),
    "compressed mxfp8": (
        {"quant_method": "compressed-tensors",
         "config_groups": group(num_bits=8, type="float", strategy="group", group_size=32)},
        "compressed-tensors MXFP8", 8.25,
    ),
    "oblong blocks": (
        {"quant_method": "fp8", "weight_block_size": [128, 64]}, "FP8 in blocks of 128x64, which are not square",
        8 + 32 / 8192,
    ),
    "e5m2": (
        {"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]}, "FP8 e5m2 in blocks of 128x128",
        8 + 32 / 16384,
    ),
    "torchao": ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "torchao", 4),
    "hqq, nested": ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 2}}}, "hqq", 2),
    "quanto": ({"quant_method": "quanto", "weights": "int8"}, "quanto", 8),
    "unheard of": ({"quant_method": "quintuple"}, "quintuple", None),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_named_sized_and_refused(kind: str, fp8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, name, bits = FORMATS[kind]
    folder = Path(shutil.copytree(fp8.with_name("fp8-bf16"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": given}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(mtp_spec.CheckpointError, match=rf"stored as {name}, which .*weights=\"fp8\""):
        mtp_spec.load(folder)
    with pytest.raises(mtp_spec.CheckpointError, match=name):
        cast_job(folder, "fp8")
    main(["inspect", str(folder), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["bytes"] == sum(tensor.nbytes for tensor in small.tensors(folder).values())
    assert said["refused"]
    main(["inspect", str(folder)])
    assert "refused" in capsys.readouterr().out
    main(["inspect", str(folder / "config.json"), "--json"])
    said, stored = json.loads(capsys.readouterr().out), stored_format(config)
    assert stored is not None
    assert stored.bits == bits
    plain = estimate(ModelConfig.from_dict({**config, "quantization_config": None})).whole
    if bits is None:
        assert said["whole_bytes"] == plain
    else:
        assert said["whole_bytes"] < plain
    assert said["refused"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.int32, torch.float8_e5m2])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.3.up_proj.weight", "model.norm.weight"])
def test_integers_are_no_weights(fp8: Path, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """They are another format's codes, whose scales are lost."""
    folder = Path(shutil.copytree(fp8.with_name("fp8-bf16"), tmp_path / "model"))
    edit(folder, lambda held: {key: tensor.to(dtype) if key == name else tensor for key, tensor in held.items()})
    with pytest.raises(mtp_spec.CheckpointError, match=rf"{name} is .*, read are F8_E4M3, BF16"):
        mtp_spec.load(folder)
    main(["inspect", str(folder), "--json"])


@pytest.mark.parametrize(("given", "told"), [
    ({"quant_method": "awq", "modules_to_not_convert": 5}, "modules_to_not_convert is 5, it must be a list"),
    ({"quant_method": "awq", "modules_to_not_convert": ["re:(("]}, "is no regular expression"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, "it must be two integers"),
    ({"quant_method": "fp8", "weight_block_size": ["a", "b"]}, "it must be two integers"),
    ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": "x"}}}, "they must be an object"),
])  # fmt: skip
def test_odd_settings_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: dict[str, Any], told: str
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**small.CONFIG.to_hf_dict(), "quantization_config": given}))
    with pytest.raises(SystemExit):
        main(["inspect", str(file)])
    assert told in capsys.readouterr().err


def test_mlx_names_its_format_in_a_key_of_its_own(fp8: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fp8.with_name("fp8-bf16"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text()) | {"quantization": FORMATS["mlx"][0]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(mtp_spec.CheckpointError, match="MLX INT4"):
        mtp_spec.load(folder)


def test_weights_in_other_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(small.CONFIG.to_hf_dict()))
    for file in ("model-Q4_K_M.gguf", "pytorch_model.bin"):
        (tmp_path / file).write_bytes(b"x")
        with pytest.raises(mtp_spec.CheckpointError, match=f"{file}.*does not read: take"):
            mtp_spec.load(tmp_path)


def test_estimates_count_what_is_packed() -> None:
    config = small.CONFIG
    experts = 9 * 3 * 256 * 256 * 3  # of three layers, the module's and the shared ones included
    attention = sum(rows * columns for rows, columns in ((128, 256), (512, 128), (192, 256), (512, 128), (256, 256)))
    plain = estimate(config).whole
    all_of = stored_format({"quantization_config": FORMATS["compressed int8"][0]})
    some = stored_format({"quantization_config": FORMATS["compressed int4"][0]})
    packed = experts + 4 * attention + 3 * 256 * 512
    assert estimate(config, stored=all_of).whole == plain - packed
    # four bits and a scale for 32, attention apart
    assert estimate(config, stored=some).whole == round(plain - (packed - 4 * attention) * (2 - 4.5 / 8))
    only = stored_format({"quantization_config": {
        "quant_method": "compressed-tensors",
        "config_groups": {"a": {"targets": ["re:.*experts.*"], "weights": {"num_bits": 8, "type": "int"}}},
    }})  # fmt: skip
    assert estimate(config, stored=only).whole == plain - experts


@pytest.mark.parametrize(("file", "given", "name"), [
    ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, "ModelOpt NVFP4"),
    ("quantize_config.json", {"bits": 4, "group_size": 128}, "GPTQ INT4"),
    ("quant_config.json", {"w_bit": 4, "q_group_size": 128}, "AWQ INT4"),
])  # fmt: skip
def test_described_in_a_file_beside(fp8: Path, tmp_path: Path, file: str, given: dict[str, Any], name: str) -> None:
    folder = Path(shutil.copytree(fp8.with_name("fp8-bf16"), tmp_path / "model"))
    (folder / file).write_text(json.dumps(given))
    with pytest.raises(mtp_spec.CheckpointError, match=name):
        mtp_spec.load(folder)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    for file in folder.glob("*.safetensors"):
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)


def retype(folder: Path, quantisation: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantisation}
    (folder / "config.json").write_text(json.dumps(config))


PACKED = "model.layers.1.mlp.experts.3.up_proj"
TENSORS: dict[str, tuple[dict[str, Tensor], str]] = {
    "packed": ({f"{PACKED}.weight_packed": torch.zeros(8, 4, dtype=torch.int32)}, "packed integers"),
    "awq": ({f"{PACKED}.qweight": torch.zeros(8, 4, dtype=torch.int32)}, "GPTQ or AWQ"),
    "gptq": ({f"{PACKED}.g_idx": torch.zeros(8, dtype=torch.int32)}, "GPTQ"),
    "nvfp4": ({f"{PACKED}.weight_scale_2": torch.ones(())}, "NVFP4"),
    "bitsandbytes": ({f"{PACKED}.weight.absmax": torch.ones(4)}, "bitsandbytes"),
    "fixed activations": ({f"{PACKED}.input_scale": torch.ones(())}, "FP8 with fixed scales of activations"),
    "codes": ({f"{PACKED}.codes": torch.zeros(8, dtype=torch.uint8)}, "is U8, read are"),
    "unknown numbers": ({f"{PACKED}.odd": torch.zeros(8, dtype=torch.int32)}, "is I32, read are"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_give_a_format_away(fp8: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the configuration says nothing."""
    added, name = TENSORS[kind]
    folder = Path(shutil.copytree(fp8.with_name("fp8-bf16"), tmp_path / "model"))
    edit(folder, lambda held: held)
    save_file(added, folder / "model-more.safetensors")
    with pytest.raises(mtp_spec.CheckpointError, match=name):
        mtp_spec.load(folder)
    main(["inspect", str(folder), "--json"])
    assert json.loads(capsys.readouterr().out)["bytes"] == sum(t.nbytes for t in small.tensors(folder).values())


@pytest.mark.parametrize(("shape", "name"), [((1,), "one scale a matrix"), ((), "one scale a matrix"),
                                             ((-1, 1), "per channel"), ((-1,), "per channel")])  # fmt: skip
@pytest.mark.parametrize("suffix", ["_scale", SCALE])
def test_scales_give_a_format_away(fp8: Path, tmp_path: Path, suffix: str, shape: tuple[int, ...], name: str) -> None:
    """Even where the configuration says blocks."""
    folder = Path(shutil.copytree(fp8, tmp_path / "model"))

    def rescale(held: dict[str, Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for key, tensor in held.items():
            if key.endswith(SCALE):
                rows = len(held[key.removesuffix(SCALE)]) if -1 in shape else 1
                out[key.removesuffix(SCALE) + suffix] = torch.ones(rows).reshape(shape)
            else:
                out[key] = tensor
        return out

    edit(folder, rescale)
    with pytest.raises(mtp_spec.CheckpointError, match=f"FP8 .*{name}"):
        mtp_spec.load(folder)


@pytest.mark.parametrize("structure", [[128, 128], "128x128"])
def test_blocks_of_compressed_tensors_are_read(fp8: Path, tmp_path: Path, structure: Any) -> None:
    folder = Path(shutil.copytree(fp8, tmp_path / "model"))
    edit(folder, lambda held: {(key.replace(SCALE, "_scale")): tensor for key, tensor in held.items()})
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": structure}
    retype(folder, {**BLOCKS, "config_groups": group(**weights)})
    one, two = (load_checkpoint(source, dtype=torch.float32).checkpoint_slots() for source in (folder, fp8))
    assert small.same(one, two)
    prompt = [3, 4, 5]
    loaded = [mtp_spec.load(source, measure=False) for source in (folder, fp8)]
    texts = [lm.generate(prompt, max_new_tokens=9, seed=0) for lm in loaded]
    assert texts[0].token_ids == texts[1].token_ids
    # other programs write the released form, whatever they read
    run_job(export_job(folder), tmp_path / "exported")
    run_job(ranks_job(folder, 2), tmp_path / "ranks")
    run_job(hf_job(tmp_path / "ranks"), tmp_path / "again")
    for made in (tmp_path / "exported", tmp_path / "again"):
        stored = json.loads((made / "config.json").read_text())["quantization_config"]
        assert stored["quant_method"] == "fp8"
        assert stored["weight_block_size"] == [128, 128]
        assert any(key.endswith(SCALE) for key in small.tensors(made))
        assert small.same(load_checkpoint(made, dtype=torch.float32).checkpoint_slots(), two)


def test_blocks_of_another_size_are_named_by_their_config(fp8: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fp8, tmp_path / "model"))
    retype(folder, {**BLOCKS, "config_groups": group(num_bits=8, type="float", strategy="block",
                                                     block_structure=[64, 64])})  # fmt: skip
    with pytest.raises(mtp_spec.CheckpointError, match=r"weight_scale_inv is \[.*instead of"):
        mtp_spec.load(folder)
