"""One clear error for each thing that can be wrong with a checkpoint, a prompt or an option."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mtp_spec
import tiny
from mtp_spec.model.checkpoint.folder import load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("tiny") / "model").folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.fixture(scope="module")
def lm(whole: Path) -> mtp_spec.LM:
    return mtp_spec.load(whole, dtype="float32")


def refuses(folder: Path, message: str) -> None:
    with pytest.raises(mtp_spec.CheckpointError, match=message):
        mtp_spec.load(folder)


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def retensor(folder: Path, change: Any) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)


def test_missing_folder(tmp_path: Path) -> None:
    refuses(tmp_path / "nowhere", "does not exist")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refuses(folder, r"no config\.json")


def test_config_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    refuses(folder, "not readable JSON")


def test_other_architecture(folder: Path) -> None:
    edit(folder, model_type="llama")
    refuses(folder, "'llama' is not supported")


@pytest.mark.parametrize("name", ["hidden_size", "num_experts_per_tok", "topk_group"])
def test_impossible_number(folder: Path, name: str) -> None:
    edit(folder, **{name: 0 if name == "hidden_size" else 99})
    refuses(folder, name)


def test_no_weights(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), *folder.glob("*index.json")]:
        file.unlink()
    refuses(folder, r"no \*\.safetensors")


def test_missing_shard(folder: Path) -> None:
    (folder / "model-2.safetensors").unlink()
    refuses(folder, r"lacks model-2\.safetensors")


def test_truncated_shard(folder: Path) -> None:
    file = folder / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refuses(folder, "truncated")


def test_missing_tensor(folder: Path) -> None:
    retensor(folder, lambda tensors: tensors.pop("model.layers.2.mlp.experts.5.up_proj.weight", None))
    refuses(folder, r"1 missing: model\.layers\.2\.mlp\.experts\.5\.up_proj\.weight")


def test_left_over_tensor(folder: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        if "model.norm.weight" in tensors:
            tensors["model.extra"] = torch.ones(1)

    retensor(folder, add)
    refuses(folder, r"1 left over: model\.extra")


def test_tensor_in_two_files(folder: Path) -> None:
    retensor(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(48)}))
    assert mtp_spec.load(folder, dtype="float32")  # the index names one of them
    (folder / "model.safetensors.index.json").unlink()
    refuses(folder, r"model\.norm\.weight is in model-1\.safetensors and in model-2\.safetensors")


def test_misshaped_tensor(folder: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()

    retensor(folder, cut)
    refuses(folder, r"model\.norm\.weight is \[47\] instead of \[48\]")


def test_no_mtp_module(folder: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.3.")]:
            del tensors[name]

    retensor(folder, drop)
    lm = mtp_spec.load(folder)
    with pytest.raises(mtp_spec.OptionError, match="multi-token-prediction"):
        lm.generate([1, 2], speculation=2)
    assert len(lm.generate([1, 2], max_new_tokens=3, seed=0).token_ids) == 3


@pytest.mark.parametrize("prompt", ["", [], [96], [-1], [1.5], [True], b"ab", bytearray(b"ab"), 5, {}, [b"ab"],
                                    np.array(3), np.array([1.5]), np.array([], dtype=int)])  # fmt: skip
def test_bad_prompts(lm: mtp_spec.LM, prompt: Any) -> None:
    for ask in (lm.generate, lm.stream, lm.submit, lm.score):
        with pytest.raises(mtp_spec.MTPSpecError):
            ask(prompt)


def test_arrays_are_ids(lm: mtp_spec.LM) -> None:
    expected = lm.generate([1, 2, 3], max_new_tokens=4, seed=0).token_ids
    prompts: list[Any] = [np.array([1, 2, 3]), torch.tensor([1, 2, 3]), (1, 2, 3)]
    for prompt in prompts:
        assert lm.generate(prompt, max_new_tokens=4, seed=0).token_ids == expected
        assert lm.generate([prompt], max_new_tokens=4, seed=0)[0].token_ids == expected


@pytest.mark.parametrize("options", [
    {"temperature": 10**400}, {"temperature": 1e39}, {"logit_bias": {5: 10**400}}, {"logit_bias": {5: 1e39}},
    {"presence_penalty": -1e39}, {"frequency_penalty": 1e39}, {"repetition_penalty": 1e-39},
])  # fmt: skip
def test_numbers_that_float32_cannot_hold(lm: mtp_spec.LM, options: dict[str, Any]) -> None:
    with pytest.raises(mtp_spec.OptionError, match=next(iter(options))):
        lm.generate([1, 2], **options)


@pytest.mark.parametrize(("name", "value"), [
    ("norm_topk_prob", "false"), ("rope_interleave", "no"), ("eos_token_id", "</s>"), ("eos_token_id", [[1]]),
    ("rope_theta", "abc"), ("rope_theta", 1e400), ("quantization_config", {"weight_block_size": [0, 0]}),
    ("quantization_config", {"weight_block_size": ["a", "b"]}), ("rope_scaling", {"type": "yarn", "factor": "x"}),
    ("rope_scaling", {"type": "yarn", "factor": 4, "beta_fast": 0}), ("rope_scaling", {"type": "yarn", "factor": 0}),
    ("rope_scaling", {"type": "yarn", "factor": 4, "original_max_position_embeddings": 0}),
    ("rope_scaling", {"type": "yarn", "factor": 4, "mscale": "1"}), ("rope_theta", "10000"), ("rms_norm_eps", True),
    ("rope_scaling", {"type": "yarn", "factor": 4, "mscale_all_dim": [1]}), ("routed_scaling_factor", 10**400),
    ("rope_scaling", {"type": "yarn", "factor": 4, "attention_factor": "x"}), ("routed_scaling_factor", True),
    ("rope_scaling", {"type": "yarn", "factor": 4, "truncate": "false"}), ("hidden_size", 10**30),
    ("rope_scaling", {"type": "yarn", "factor": 10**20}), ("rope_scaling", {"type": "yarn", "factor": 1e300}),
    ("rope_scaling", {"type": "yarn", "factor": 4, "rope_theta": 1}),
])  # fmt: skip
def test_config_values_of_the_wrong_kind(folder: Path, name: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    refuses(folder, r"config\.json: ")


def test_json_nested_beyond_reading(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 100_000)
    refuses(folder, "config.json is not readable JSON")


def test_prompt_longer_than_the_context(lm: mtp_spec.LM) -> None:
    with pytest.raises(mtp_spec.PromptError, match="context is 256"):
        lm.generate([1] * 256)
    cut = lm.generate([1] * 250, max_new_tokens=50, speculation=3, seed=0)
    assert len(cut.token_ids) == 6
    assert cut.finish_reason == "length"


def test_what_does_not_watch_is_no_observer(lm: mtp_spec.LM) -> None:
    for observer in (1, object):
        with pytest.raises(mtp_spec.OptionError, match="observer="):
            lm.stream([1], observer=observer)


def test_unknown_keyword(lm: mtp_spec.LM) -> None:
    with pytest.raises(mtp_spec.OptionError, match="temprature"):
        lm.generate([1], temprature=1.0)


@pytest.mark.parametrize("options", [
    {"device": "tpu"}, {"dtype": "int8"}, {"max_context": 1}, {"max_batch": 0}, {"config": ["a"]}, {"measure": None},
])  # fmt: skip
def test_bad_load_options(whole: Path, options: dict[str, Any]) -> None:
    with pytest.raises(mtp_spec.OptionError, match=next(iter(options))):
        mtp_spec.load(whole, **options)


@pytest.mark.parametrize("device", ["tpu", "", "cpu:x", "cuda:999", "mps", None, 3, torch.device("meta")])
def test_devices_that_are_not_here_are_refused(whole: Path, device: Any) -> None:
    with pytest.raises(mtp_spec.OptionError, match="device="):
        mtp_spec.load(whole, device=device)


@pytest.mark.parametrize("device", ["cpu:0", torch.device("cpu")])
def test_every_name_of_the_cpu_is_the_cpu(whole: Path, device: Any) -> None:
    named, plain = mtp_spec.load(whole, device=device), mtp_spec.load(whole)
    assert type(named.backend) is type(plain.backend)
    texts = [lm.generate([1, 2, 3], max_new_tokens=4, temperature=0.0).token_ids for lm in (named, plain)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("fp8", [False, True], ids=["float32", "fp8"])
def test_saved_checkpoints_load(whole: Path, tmp_path: Path, fp8: bool) -> None:
    model = load_checkpoint(whole, dtype=torch.float32)
    save_checkpoint(model, tmp_path / "saved", fp8=fp8, max_shard_bytes=50_000)
    again = load_checkpoint(tmp_path / "saved", dtype=torch.float32)
    for name, slot in model.checkpoint_slots().items():
        other = again.checkpoint_slots()[name]
        # e4m3 keeps 3 bits after the leading one; bfloat16 7
        assert float((slot - other).abs().max()) <= (0.07 if fp8 else 0.0) * float(slot.abs().max())
