"""What becomes of published checkpoints: their shapes, their sizes, and the table in the documentation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import published
from mtp_spec.cli.main import main
from mtp_spec.model.config import load_config
from mtp_spec.model.cuda.model import DeviceModel, why_not
from mtp_spec.model.transformer import Transformer
from mtp_spec.shapes import named_shape
from places import CONFIGS

# billions of parameters in all and active, as their cards say
SIZES = {
    "GLM-4.7-Flash": (30, 3.9, 0.64), "GigaChat3-10B-A1.8B": (10.7, 1.8, 0.41), "JoyAI-LLM-Flash": (48.9, 3.3, 0.08),
    "Moonlight-16B-A3B": (16, 2.9, 0), "Kanana-2-30B-A3B": (30.7, 3.6, 0), "Kimi-K2": (1026, 32.9, 0),
    "sarvam-105b": (106, 12.4, 0),
}  # fmt: skip


def test_the_table_is_what_the_code_decides() -> None:
    page = published.page()
    assert published.PAGE.read_text(encoding="utf-8") == page, "run python tests/support/published.py"
    assert page.count("| accepted |") >= 10
    assert page.count("| refused |") >= 10


@pytest.mark.parametrize("name", SIZES)
def test_shapes_have_the_published_sizes(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.json")
    sizes = {n: slot.numel() for n, slot in Transformer(config, torch.bfloat16, "meta").checkpoint_slots().items()}
    module = sum(size for n, size in sizes.items() if f".layers.{config.num_hidden_layers}." in n)
    used = config.num_experts_per_tok / config.n_routed_experts
    active = sum(size * (used if ".mlp.experts." in n else 1) for n, size in sizes.items()
                 if f".layers.{config.num_hidden_layers}." not in n)  # fmt: skip
    whole, running, drafting = SIZES[name]
    assert (sum(sizes.values()) - module) / 1e9 == pytest.approx(whole, rel=0.01)
    assert active / 1e9 == pytest.approx(running, rel=0.03)
    assert module / 1e9 == pytest.approx(drafting, rel=0.1)


@pytest.mark.parametrize("name", SIZES)
def test_the_kernels_take_their_shapes(name: str) -> None:
    config = replace(load_config(CONFIGS / f"{name}.json"), fp8_block=(128, 128))
    assert why_not(config) is None
    model = DeviceModel(config, "meta")
    assert len(model.mtp) == config.num_nextn_predict_layers


@pytest.mark.parametrize("given", ["GLM-4.7-Flash", "glm-4.7-flash", "671B", "config_v3.1", "Kimi-K2.json"])
def test_inspect_by_name(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["inspect", given, "--json"])
    assert json.loads(capsys.readouterr().out)["whole_bytes"] > 1e10


def test_unknown_names_are_answered_with_the_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["inspect", "GLM-9"])
    said = capsys.readouterr().err
    assert "GLM-9 does not exist here" in said
    assert "GLM-4.7-Flash" in said
    (tmp_path / "671B").mkdir()  # a folder of that name comes first
    with pytest.raises(SystemExit):
        main(["inspect", "671B"])
    assert "no config.json" in capsys.readouterr().err


def test_a_shape_keeps_its_former_name() -> None:
    assert named_shape(Path("gigachat3.1-10b")) == named_shape(Path("GigaChat3-10B-A1.8B"))


def test_a_shape_too_large_to_be_written_is_refused_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mtp_spec.bench.cpu.why_not", lambda: None)
    monkeypatch.setattr("mtp_spec.bench.cpu.free_memory", lambda: 12 * 10**9)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**15))
    with pytest.raises(SystemExit):
        main(["bench", "cpu", "--shape", "gigachat3.1-10b", "--folder", str(tmp_path)])
    assert "--shape: the model needs 14.3 GB, memory has 12.0 left; give another --folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
