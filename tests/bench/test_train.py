"""`bench train --shape`, on the kernels' references."""

from __future__ import annotations

import json
from math import isfinite, prod
from pathlib import Path

import pytest

from device_models import checkpoint
from mtp_spec.cli.main import main


@pytest.mark.parametrize("block", ["dense", "moe"])
def test_steps_beside_random_weights_of_a_shape(tmp_path: Path, block: str) -> None:
    shape = checkpoint(tmp_path, "v3") / "config.json"
    few = ["--batch", "3", "--context", "16", "--depths", "2", "--repeats", "2", "--optimiser", "muon"]
    main(["bench", "train", "--shape", str(shape), "--device", "cpu", "--block", block, *few,
          "--json", str(tmp_path / "shape.json")])  # fmt: skip
    document = json.loads((tmp_path / "shape.json").read_text())
    first, kept = document["rows"]
    assert "main model" in first["part"]
    assert "kept" in kept["part"]
    assert prod(document["batch"]) >= 3 * (16 + 2)
    assert document["planned GB"] > 12 * document["trained parameters"] / 1e9
    assert all(isfinite(document[name]) for name in ("loss first", "loss last"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block", "shipped"], "give --block dense or moe"),
        (["--block", "moe", "--context", "4"], "give more tokens than the 4"),
        (["--block", "moe", "--context", "100000"], "the model's limit is"),
        (["--block", "moe", "--depths", "9"], "--depths 9: give at most 8"),
        (["--block", "moe", "--model", "demo"], "give one of both"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = checkpoint(tmp_path, "v3") / "config.json"
    with pytest.raises(SystemExit):
        main(["bench", "train", "--shape", str(shape), "--device", "cpu", *arguments])
    assert message in capsys.readouterr().err


def test_a_shape_that_the_kernels_cannot_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = checkpoint(tmp_path, "v3") / "config.json"
    values = json.loads(shape.read_text())
    shape.write_text(json.dumps({**values, "moe_intermediate_size": 24, "quantization_config": None}))
    with pytest.raises(SystemExit):
        main(["bench", "train", "--shape", str(shape), "--device", "cpu", "--block", "moe"])
    assert "the kernels cannot run it" in capsys.readouterr().err


def test_a_type_of_weights_is_of_a_shape(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "train", "--dtype", "fp8"])
    assert "--dtype fp8 is of --shape's weights: give it with --shape" in capsys.readouterr().err
