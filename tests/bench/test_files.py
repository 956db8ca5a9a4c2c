"""`bench files`: every stage runs on a small checkpoint, and what goes wrong on the way is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import small
from mtp_spec.bench import files
from mtp_spec.bench.disk import read_rate, write_rate
from mtp_spec.cli.main import main
from mtp_spec.kernels import fp8_cpu
from mtp_spec.kernels.fp8 import weight_dequant
from mtp_spec.model.checkpoint import cast

OPTIONS = ["--gigabytes", "0.01", "--model-parallel", "2", "--max-new-tokens", "3"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the benchmark without new processes; returns its document, also where it fails."""
    monkeypatch.setattr(files, "_alone", lambda work, *args: files._watched(work, args))
    shape, report = tmp_path / "shape.json", tmp_path / "report.json"
    shape.write_text(json.dumps(small.CONFIG.to_hf_dict()))

    def call(name: str, *more: str, code: int = 0) -> dict[str, Any]:
        command = ["bench", "files", "--folder", str(tmp_path / name), "--config", str(shape), *OPTIONS, *more,
                   "--json", str(report)]  # fmt: skip
        if code:
            with pytest.raises(SystemExit) as stopped:
                main(command)
            assert stopped.value.code == code
        else:
            main(command)
        document: dict[str, Any] = json.loads(report.read_text())
        return document

    return call


def test_every_stage(run: Any, tmp_path: Path) -> None:
    document = run("work")
    assert [row["stage"].split(",")[0] for row in document["rows"]] == [
        "make", "convert to 2 ranks", "convert back", "cast to bf16", "cast to fp8", "load: read", "load", "two texts",
    ]  # fmt: skip
    assert document["wrong"] == []
    assert document["config"]["n_routed_experts"] == 8
    assert not (tmp_path / "work").exists()


def test_the_checkpoint_has_released_names_and_copies(run: Any, tmp_path: Path) -> None:
    run("kept", "--stages", "cast", "--keep")
    run("kept", code=2)  # nothing that exists is used, or deleted
    tensors = small.tensors(tmp_path / "kept" / "fp8")
    for copy, original in (("shared_head.head", "lm_head"), ("embed_tokens", "model.embed_tokens")):
        name = f"model.layers.2.{copy}.weight"
        assert small.same({"": tensors[name]}, {"": tensors[f"{original}.weight"]})
    name = "model.layers.1.mlp.experts.7.down_proj.weight"
    assert tensors[name].dtype == torch.float8_e4m3fn
    spread = weight_dequant(tensors[name], tensors[f"{name}_scale_inv"]).float().std() * tensors[name].shape[1] ** 0.5
    assert 0.4 < spread < 2.5  # of a size that keeps activations as large as they are


def test_fp8_weights_as_they_are_stored(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    document = run("work", "--stages", "load", "--as-stored")
    assert document["load"]["dtype"] == "float8_e4m3fn"
    assert document["wrong"] == []
    run("work", "--as-stored", "--device", "cuda", code=2)


def test_tensors_that_come_back_changed_are_told(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cast, "quantise", lambda weight, block, powers: fp8_cpu.quantise(weight * 1.5, block, powers))
    document = run("work", "--stages", "cast", code=1)
    assert "came back changed" in document["wrong"][0]
    assert not (tmp_path / "work").exists()


def test_memory_beyond_the_plan_is_told(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PROCESS_BYTES", -(2**40))
    assert run("work", "--stages", "convert", code=1)["wrong"] == [
        "make: memory", "convert to 2 ranks: memory", "convert back: memory",
    ]  # fmt: skip


def test_a_size_too_small_or_a_disk_too_full_is_refused_before_work(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("first", "--stages", "load")
    run("work", "--gigabytes", "0.001", code=2)
    assert "need 0.0" in capsys.readouterr().err
    monkeypatch.setattr(files, "ROOM_BYTES", 10**18)
    run("work", code=2)
    assert "are free" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_the_disk_is_read_and_written_whole(tmp_path: Path) -> None:
    names = [tmp_path / "a", tmp_path / "b"]
    for name in names:
        name.write_bytes(bytes(1000))
    assert read_rate(names, 2) > 0
    assert write_rate(tmp_path, 2**24) > 0
    assert sorted(tmp_path.iterdir()) == names
