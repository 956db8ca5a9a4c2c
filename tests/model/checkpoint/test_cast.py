"""FP8 to bfloat16 and back: the numbers, what stays, what is carried along, and every refusal before work starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mtp_spec
import small
from mtp_spec.cli.main import main
from mtp_spec.kernels.fp8 import weight_dequant
from mtp_spec.model.checkpoint.cast import cast_job
from mtp_spec.model.checkpoint.folder import load_checkpoint
from mtp_spec.model.checkpoint.jobs import run_job
from mtp_spec.model.checkpoint.writer import wrong_checksums

SCALE = "_scale_inv"


@pytest.fixture
def copy(fp8: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fp8, tmp_path / "copy"))


def test_numbers_are_the_stored_ones_times_their_scales(fp8: Path, tmp_path: Path) -> None:
    main(["cast", str(fp8), str(tmp_path / "bf16"), "--to", "bf16"])
    before, after = small.tensors(fp8), small.tensors(tmp_path / "bf16")
    assert after.keys() == {name for name in before if not name.endswith(SCALE)}
    for name, tensor in after.items():
        if before[name].dtype == torch.float8_e4m3fn:
            assert torch.equal(tensor, weight_dequant(before[name], before[name + SCALE]))
        else:
            assert small.same({name: tensor}, {name: before[name]})


def test_what_becomes_fp8_is_what_released_checkpoints_have_in_fp8(fp8: Path) -> None:
    wide = {name for name, tensor in small.tensors(fp8).items() if tensor.dtype == torch.bfloat16}
    kinds = {".".join(part for part in name.split(".") if not part.isdigit()) for name in wide}
    assert kinds == {
        "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.eh_proj.weight",
        "model.layers.enorm.weight", "model.layers.hnorm.weight", "model.layers.shared_head.norm.weight",
        "model.layers.input_layernorm.weight", "model.layers.post_attention_layernorm.weight",
        "model.layers.self_attn.q_a_layernorm.weight", "model.layers.self_attn.kv_a_layernorm.weight",
    }  # fmt: skip
    gates = {name: t.dtype for name, t in small.tensors(fp8).items() if ".mlp.gate." in name}
    assert set(gates.values()) == {torch.float32}


@pytest.fixture(scope="module")
def powers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.make_fp8(tmp_path_factory.mktemp("cast") / "powers", "ue8m0")


def test_there_and_back(fp8: Path, tmp_path: Path) -> None:
    run_job(cast_job(fp8, "bf16"), tmp_path / "bf16")
    run_job(cast_job(tmp_path / "bf16", "fp8"), tmp_path / "again")
    before, after = small.tensors(fp8), small.tensors(tmp_path / "again")
    for name, scale in [(name, before.pop(name)) for name in list(before) if name.endswith(SCALE)]:
        # the largest number of a block was rounded to bfloat16
        torch.testing.assert_close(after.pop(name), scale, rtol=2**-8, atol=0)
    assert small.same(before, after)


def test_powers_of_two_come_back_exactly(powers: Path, tmp_path: Path) -> None:
    assert json.loads((powers / "config.json").read_text())["quantization_config"]["scale_fmt"] == "ue8m0"
    for name in ("one", "two"):
        run_job(cast_job(powers, "bf16"), tmp_path / f"{name}-bf16")
        run_job(cast_job(tmp_path / f"{name}-bf16", "fp8", scale_fmt="ue8m0"), tmp_path / name)
        powers = tmp_path / name
    scales = [t.log2() for name, t in small.tensors(powers).items() if name.endswith(SCALE)]
    assert all(torch.equal(scale, scale.round()) for scale in scales)
    assert small.same(small.tensors(tmp_path / "one-bf16"), small.tensors(tmp_path / "two-bf16"))


def test_scales_stored_as_exponents_are_read(powers: Path, tmp_path: Path) -> None:
    shutil.copytree(powers, tmp_path / "powers")
    shutil.copytree(powers, tmp_path / "bytes")
    kind = getattr(torch, "float8_e8m0fnu", None)
    if kind is None:
        pytest.skip("torch before 2.7 cannot write them")
    for file in (tmp_path / "bytes").glob("*.safetensors"):
        held = load_file(file)
        save_file({n: t.to(kind) if n.endswith(SCALE) else t for n, t in held.items()}, file)
    for name in ("powers", "bytes"):
        run_job(cast_job(tmp_path / name, "bf16"), tmp_path / f"{name}-bf16")
    assert small.same(small.tensors(tmp_path / "powers-bf16"), small.tensors(tmp_path / "bytes-bf16"))
    a, b = (load_checkpoint(tmp_path / name, dtype=torch.bfloat16).checkpoint_slots() for name in ("powers", "bytes"))
    assert small.same(a, b)


def test_config_index_and_small_files(fp8: Path, tmp_path: Path) -> None:
    run_job(cast_job(fp8, "bf16"), tmp_path / "bf16")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (fp8, tmp_path / "bf16"))
    assert before.pop("quantization_config")["weight_block_size"] == [128, 128]
    assert before == after
    for name, text in small.SMALL_FILES.items():
        assert (tmp_path / "bf16" / name).read_text() == text
    index = json.loads((tmp_path / "bf16" / "model.safetensors.index.json").read_text())
    for file in (tmp_path / "bf16").glob("*.safetensors"):
        held = load_file(file)
        assert {name for name, where in index["weight_map"].items() if where == file.name} == held.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in small.tensors(tmp_path / "bf16").values())
    assert wrong_checksums(tmp_path / "bf16") == []


def test_both_load_as_the_same_model(fp8: Path, tmp_path: Path) -> None:
    run_job(cast_job(fp8, "bf16"), tmp_path / "bf16")
    one, two = (load_checkpoint(folder, dtype=torch.bfloat16).checkpoint_slots() for folder in (fp8, tmp_path / "bf16"))
    assert small.same(one, two)


def edit(folder: Path, change: Any) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)


def refuses(folder: Path, to: str, message: str, target: Path) -> None:
    with pytest.raises(mtp_spec.CheckpointError, match=message):
        run_job(cast_job(folder, to), target)
    assert not list(target.parent.glob(f"{target.name}*"))


NAME = "model.layers.1.mlp.experts.5.up_proj.weight"


def test_refusals_come_before_work_starts(copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refuses(copy, "fp8", "FP8 tensors already", out)
    refuses(copy.with_name("nowhere"), "bf16", "does not exist", out)
    edit(copy, lambda held: held.update({NAME + SCALE: torch.ones(1, 2)}) if NAME + SCALE in held else None)
    refuses(copy, "bf16", rf"{NAME}{SCALE} is \[1, 2\] instead of \[2, 2\]", out)
    edit(copy, lambda held: held.pop(NAME + SCALE, None))
    refuses(copy, "bf16", f"1 FP8 without weight_scale_inv: {NAME}", out)
    file = next(copy.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    refuses(copy, "bf16", "truncated", out)


def test_nothing_to_cast(fp8: Path, tmp_path: Path) -> None:
    bf16 = fp8.with_name("fp8-bf16")
    refuses(bf16, "bf16", "holds no FP8", tmp_path / "out")


def test_infinity_has_no_fp8(fp8: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fp8.with_name("fp8-bf16"), tmp_path / "copy"))
    edit(folder, lambda held: held[NAME].fill_(float("inf")) if NAME in held else None)
    with pytest.raises(mtp_spec.CheckpointError, match=f"{NAME} holds NaN or infinity"):
        run_job(cast_job(folder, "fp8"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["A", "B"], "--to"),
        (["A"], "TARGET"),
        (["A", "B", "--to", "bf16", "--scale-fmt", "ue8m0"], "--scale-fmt"),
        (["A", "B", "--to", "bf16", "--workers", "0"], "--workers"),
        (["A", "B", "--to", "bf16", "--device", "tpu"], "tpu"),
        (["--input-fp8-hf-path", "A", "--output-bf16-hf-path", "B", "--to", "fp8"], "--input-fp8-hf-path"),
        (["--input-fp8-hf-path", "A", "--output-bf16-hf-path", "B"], "A does not exist"),
    ],
)
def test_one_line_for_every_mistake(options: list[str], names: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["cast", *options])
    assert stopped.value.code == 2
    assert names in capsys.readouterr().err.strip().splitlines()[-1]
