"""`bench prefill` on a CPU: every way runs, beside transformers where asked for, and what means nothing is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import mtp_spec
import tiny
from mtp_spec.bench import prompts_cpu
from mtp_spec.cli.main import main

HERE = ["bench", "prefill", "--device", "cpu", "--threads", "1"]


def run(options: list[str], folder: Path) -> dict[str, Any]:
    main([*HERE, *options, "--json", str(folder / "report.json")])
    document: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return document


def refusal(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*HERE, *options])
    assert ended.value.code
    return " ".join((str(ended.value.code) + capsys.readouterr().err).split())


def test_prompts_plain_and_with_the_module(tmp_path: Path) -> None:
    document = run(["--tokens", "5,300", "--repeats", "2"], tmp_path)
    assert [(row["tokens"], row["way"]) for row in document["rows"]] == [
        (tokens, way) for tokens in (5, 300) for way in ("plain", "with the MTP module")
    ]
    assert document["model"]["runs on"]
    assert all(len(taken) == 2 for taken in document["seconds, 1 threads, 300 tokens"].values())


def test_beside_transformers(tmp_path: Path) -> None:
    document = run(["--tokens", "24", "--repeats", "1", "--transformers"], tmp_path)
    rows = {row["way"]: row for row in document["rows"]}
    assert list(rows) == ["plain", "with the MTP module", "transformers, float32", "transformers, bfloat16"]
    # the faster of its types is the measure
    assert max(row["times transformers"] for name, row in rows.items() if name.startswith("transformers")) == 1.0


def test_each_way_reads_the_whole_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, rows = mtp_spec.load(tiny.make(tmp_path / "model", "v3").folder, device="cpu"), list[int]()
    main, module = lm.model.scored_rows, lm.model.scored_mtp_rows

    def of_main(ids: Sequence[int], *rest: Any) -> Any:
        rows.append(len(ids))
        return main(ids, *rest)

    def of_module(number: int, ids: Sequence[int], *rest: Any) -> Any:
        rows.append(len(ids))
        return module(number, ids, *rest)

    monkeypatch.setattr(lm.model, "scored_rows", of_main)
    monkeypatch.setattr(lm.model, "scored_mtp_rows", of_module)
    ids = [(7 * i) % 96 for i in range(200)]
    for _ in range(2):
        drafted = prompts_cpu._ours(lm, 1)(ids)
        assert rows[:2] == [200, 200]
        assert drafted.seconds > 0
        rows.clear()
        prompts_cpu._ours(lm, None)(ids)
        assert rows == [200]
        rows.clear()
        ids = [5, *ids[1:]]


def test_another_model_is_no_peer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(prompts_cpu, "_theirs", lambda model: lambda ids: prompts_cpu.Taken(-1, 1.0, 1.0))
    told = refusal(capsys, "--tokens", "5", "--repeats", "1", "--transformers")
    assert "another model" in told


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--shape", "671B"], "--shape belongs to the other device: --device is cpu"),
        (["--prefill-tokens", "512"], "--prefill-tokens belongs to the other device"),
        (["--tokens", "2048"], "--tokens 2048: the model takes 2048 tokens with the new ones: give 2045 at most"),
    ],
)
def test_refused(options: list[str], cause: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cause in refusal(capsys, *options)
