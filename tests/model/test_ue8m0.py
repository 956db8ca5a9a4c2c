"""Scales that are powers of two, as DeepSeek-V3.1 was trained with: every product follows, as plain torch computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mtp_spec
import small
from mtp_spec.analysis.scoring import score_ids
from mtp_spec.kernels import gemm
from mtp_spec.kernels.fp8 import act_quant, fp8_gemm, weight_dequant
from mtp_spec.kernels.moe import reference as moe_reference
from mtp_spec.model.checkpoint.folder import load_checkpoint, open_checkpoint
from mtp_spec.model.config import load_config
from mtp_spec.model.cuda.checkpoint import load_device_model
from mtp_spec.model.cuda.layers import Dense, Store
from places import CONFIGS

IDS = [(29 * i + 3) % 256 for i in range(20)]


@pytest.fixture(scope="module")
def powers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.make_fp8(tmp_path_factory.mktemp("ue8m0") / "fp8", "ue8m0")


def test_read_from_every_dialect(powers: Path, tmp_path: Path) -> None:
    assert open_checkpoint(powers).config.powers_of_two
    assert load_config(CONFIGS / "config_v3.1.json").powers_of_two
    assert not load_config(CONFIGS / "config_671B.json").powers_of_two
    assert not load_config(CONFIGS / "demo").powers_of_two
    given = json.loads((powers / "config.json").read_text())
    given["quantization_config"]["scale_fmt"] = "e5m2"
    (tmp_path / "config.json").write_text(json.dumps(given))
    with pytest.raises(mtp_spec.CheckpointError, match="scale_fmt is 'e5m2'"):
        load_config(tmp_path)


def scales_of_products(folder: Path, patch: pytest.MonkeyPatch) -> list[Tensor]:
    """Returns the activations' scales of every FP8 product of a pass, of the model and of its module."""
    seen: list[Tensor] = []

    def watched(product: Any) -> Any:
        def call(a: Tensor, a_scale: Tensor, *rest: Any, **options: Any) -> Tensor:
            seen.append(a_scale)
            return product(a, a_scale, *rest, **options)

        return call

    with patch.context() as inside:
        inside.setattr(gemm, "fp8_gemm", watched(gemm.fp8_gemm))
        inside.setattr(moe_reference, "fp8_gemm", watched(fp8_gemm))
        score_ids(load_device_model(folder, "cpu"), IDS)
    return seen


def test_every_product_follows(powers: Path, fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, plain = (scales_of_products(folder, monkeypatch) for folder in (powers, fp8))
    assert len(found) > 4 * 6  # four layers' projections, and experts'
    assert all((scales.frexp().mantissa == 0.5).all() for scales in found)
    assert not any((scales.frexp().mantissa == 0.5).all() for scales in plain)


def test_a_layer_against_plain_torch() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 256).bfloat16()
    dense = Dense(256, 384, Store(torch.device("cpu"), lambda name: True, power_of_two=True), "mlp")
    for part in (*dense.parts, dense.down):
        part.weight.copy_(torch.randn(part.weight.shape))
        assert part.scale is not None
        part.scale.copy_(torch.randint(-8, -4, part.scale.shape).float().exp2())

    def quantised(values: Tensor) -> Tensor:
        blocks = values.float().unflatten(-1, (-1, 128))
        scale = (blocks.abs().amax(-1, keepdim=True) / 448).log2().ceil().exp2()
        return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)

    both = weight_dequant(dense.parts[0].weight, dense.parts[0].scale, 128, torch.float32)
    gate, up = quantised(x).mm(both.T).chunk(2, 1)
    gate, up = gate.bfloat16().float(), up.bfloat16().float()
    down = weight_dequant(dense.down.weight, dense.down.scale, 128, torch.float32)
    expected = quantised(gate * gate.sigmoid() * up).mm(down.T)
    got = dense(act_quant(x, power_of_two=True)).float()
    assert (got - expected).norm() / expected.norm() < 0.004  # the output's bfloat16


def test_engine_and_torch_read_the_same_weights(powers: Path, tmp_path: Path) -> None:
    wide = score_ids(load_checkpoint(powers, dtype=torch.float32), IDS)
    lm = mtp_spec.load(powers, measure=False)
    torch.testing.assert_close(lm.score(IDS).logits, wide.logits, rtol=1e-3, atol=1e-3)
    got = score_ids(load_device_model(powers, "cpu"), IDS)
    assert (got.logits - wide.logits).norm() / wide.logits.norm() < 0.3
    again = shutil.copytree(powers, tmp_path / "plain")
    given = json.loads((again / "config.json").read_text())
    del given["quantization_config"]["scale_fmt"]
    (again / "config.json").write_text(json.dumps(given))
    assert not torch.equal(score_ids(load_device_model(again, "cpu"), IDS).logits, got.logits)
