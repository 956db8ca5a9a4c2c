"""Every benchmark runs, says what it ran on, and finds nothing that it exists to find."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_device import device_lm
from transformers import modeling_layers

import mtp_spec
import tiny
from mtp_spec.bench import tuning
from mtp_spec.bench.common import bundled_prompts, interval
from mtp_spec.bench.exactness import SAMPLING, SHAPES
from mtp_spec.bench.peer import transformers_ways
from mtp_spec.bench.phases import step_phases
from mtp_spec.cli import main
from mtp_spec.kernels import gemm

TINY = ["--prompts", "2", "--max-new-tokens", "6"]


def run(arguments: list[str], folder: Path) -> dict[str, Any]:
    file = folder / "deeper" / "report.json"
    main(["bench", *arguments, "--json", str(file)])
    assert [f.name for f in file.parent.iterdir()] == ["report.json"]
    document: dict[str, Any] = json.loads(file.read_text())
    assert {"command", "date", "torch", "python", "processor", "threads", "model", "rows", "options"} <= set(document)
    return document


def test_same_text(tmp_path: Path) -> None:
    document = run(["same-text", *TINY, "--all"], tmp_path)
    assert document["rows"][-1] == {"shape": "all", "equal": 2 * len(SHAPES), "texts": 2 * len(SHAPES)}
    assert set(document["by_sampling"]) == set(SAMPLING)


def test_a_wrong_text_is_counted_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # speculation that draws with another seed
    from mtp_spec.api import LM

    honest = LM.generate

    def careless(self: LM, prompt: Any, **options: Any) -> Any:
        return honest(self, prompt, **{**options, "seed": 1 if options["speculation"] else 0, "temperature": 2.0})

    monkeypatch.setattr(LM, "generate", careless)
    with pytest.raises(SystemExit) as stopped:
        run(["same-text", *TINY], tmp_path)
    assert stopped.value.code == 1
    assert json.loads((tmp_path / "deeper" / "report.json").read_text())["wrong"]


def test_cache(tmp_path: Path) -> None:
    cache, scale = run(["cache", "--prompts", "1", "--max-new-tokens", "6"], tmp_path)["rows"]
    assert cache["tokens"] == scale["tokens"] == 6
    for row in (cache, scale):
        assert 0 < row["relative error"] < 0.05
        assert row["same greedy token"] > 0.7
        assert 0 < row["KL, nats"] < 0.05


def test_batch(tmp_path: Path) -> None:
    document = run(["batch", "--sizes", "1,3", "--repeats", "2", "--depths", "2", "--max-new-tokens", "6"], tmp_path)
    assert [(row["batch"], row["way"]) for row in document["rows"]] == [
        (size, way) for size in (1, 3) for way in ("plain", "auto", "chain 2")
    ]
    assert document["texts unlike plain"] == 0
    assert len(document["tokens per second"]["3 auto"]) == 2
    assert all(row["times plain"] == 1 and row["tokens a step"] == 1 for row in document["rows"][::3])


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtp_spec.bench.rows.COUNTS", (1, 2, 7, 33))
    monkeypatch.setattr("mtp_spec.bench.rows.CONTEXTS", (1, 250))
    document = run(["rows", "--threads", "1"], tmp_path)
    assert all(row["chains equal"] == row["of"] and row["trees equal"] == 3 for row in document["rows"])


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits are a Unix module")
def test_speed_beside_transformers(tmp_path: Path) -> None:
    document = run(["speed", *TINY, "--depths", "2", "--temperatures", "0", "--transformers", "--loads", "1"], tmp_path)
    rows = {row["way"]: row for row in document["rows"]}
    assert list(rows) == ["plain", "chain 2", "auto", "transformers plain", "transformers use_mtp"]
    assert rows["plain"]["times plain"] == 1.0
    assert rows["chain 2"]["first tokens as plain"] == 6
    # in bfloat16 the two libraries round differently
    assert rows["transformers use_mtp"]["first tokens as plain"] > 3
    assert document["load"]["peak_mb"] > 50


def test_speed_says_why_use_mtp_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(modeling_layers, "MtpModel")
    lm = mtp_spec.load(tiny.make(tmp_path / "model").folder, dtype="float32")
    ways, absent = transformers_ways(lm, tmp_path, argparse.Namespace(model=None))
    assert list(ways) == ["transformers plain"]
    assert "MtpModel" in absent["transformers use_mtp"]


def test_parts_of_a_captured_step_are_timed_beside_the_text() -> None:
    lm = device_lm()
    options: dict[str, Any] = {"temperature": 0.8, "seed": 2, "max_new_tokens": 12}
    before = lm.generate("One day a fox", speculation=2, **options)
    works: list[str] = []

    def measure(work: Callable[[], None]) -> float:
        for _ in range(2):
            work()
        works.append("")
        return float(len(works))

    parts = step_phases(lm, lm.encode("One day a fox"), {**options, "speculation": 2}, measure)
    assert parts == {"draft": 1.0, "verify": 2.0, "accept": 3.0}
    assert lm.generate("One day a fox", speculation=2, **options).token_ids == before.token_ids


def test_prompts_come_again_with_another_seed() -> None:
    prompts = bundled_prompts(400)
    assert len(prompts) == 400
    assert len({(item["prompt"], item["seed"]) for item in prompts}) == 400


def test_interval_covers_the_ratio() -> None:
    low, high = interval([2.0, 3.0, 4.0] * 20, [1.0] * 60)
    assert low < 3.0 < high < 3.5


def test_a_search_keeps_the_fastest_launch_and_what_failed(tmp_path: Path) -> None:
    tried: dict[str, Any] = {}

    def time(launch: gemm.Launch) -> float:
        if launch.stages == 20:
            raise ValueError("out of shared memory")
        return 100.0 / launch.tile + abs(launch.splits - 2) + abs(launch.ahead - 16) + abs(launch.call - 4)

    found = tuning.search(gemm.Launch(), tuning.product_rounds(7168, 2048), time, time, tried)
    assert (found.tile, found.splits, found.ahead, found.call) == (128, 2, 16, 4)
    assert any("shared memory" in str(result) for result in tried.values())
    (tmp_path / "gemm.json").write_text(json.dumps({"1x1": {"tile": 64}}))
    tuning.write(tmp_path, {"gemm.json": {"7168x2048": found}})
    written = json.loads((tmp_path / "gemm.json").read_text())
    assert gemm.Launch(**written["7168x2048"]) == found
    assert written["1x1"] == {"tile": 64}
