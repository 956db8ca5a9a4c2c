"""`bench acceptance` and `bench compare` without measuring: what they refuse, and their parts one by one."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import mtp_spec
from mtp_spec.bench import turns
from mtp_spec.bench.acceptance.cells import Group
from mtp_spec.bench.acceptance.running import check_model
from mtp_spec.cli.main import main
from mtp_spec.cuda.pool import SLOTS
from mtp_spec.stats import GenerationStats


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"digest": "0"}}, "model 0 and"),
        ({"details": {}}, "no cell in common"),
        ({"details": {"cell": {}}}, "is not of this version's bench acceptance"),
        ({"benchmark": "speed"}, "is not of this version's bench acceptance"),
        (None, "is not a readable JSON document"),
    ],
)
def test_what_cannot_be_compared(
    change: dict[str, Any] | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = {"benchmark": "acceptance", "model": {"digest": "1"}, "set": {"digest": "2"},
                "details": {"cell": {"same_as": "plain"}}, "options": {"max_new_tokens": 8}}  # fmt: skip
    (tmp_path / "b.json").write_text(json.dumps(document))
    (tmp_path / "a.json").write_text("{" if change is None else json.dumps({**document, **change}))
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume needs"),
        (["--contexts", "2040"], "are more than the model's 2048"),
        (["--transformers", "--temperatures", "0.8"], "needs 0 among --temperatures"),
        (["--auto", "--rules", "block"], "nothing to measure"),
        (["--set-kind", "gsm8k"], "give --set FILE"),
        (["--prompts", "0"], "give 1 or more"),
    ],
)
def test_impossible_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "acceptance", "--max-new-tokens", "16", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "runtime", "message"),
    [(2, None, "without torchrun"), (1, "a GPU's", "not captured.*--device cpu"), (1, None, None)],
)
def test_what_a_model_cannot_do(size: int, runtime: Any, message: str | None) -> None:
    ranks = SimpleNamespace(ranks=SimpleNamespace(size=size))
    backend = SimpleNamespace(captured=runtime is not None)
    model: Any = SimpleNamespace(max_context=64, backend=backend, model=ranks, max_batch=1)
    args = argparse.Namespace(bound=True, max_new_tokens=8)
    with nullcontext() if message is None else pytest.raises(mtp_spec.OptionError, match=message):
        check_model(model, [Group(0.0, 56, None)], args)
    with pytest.raises(mtp_spec.OptionError, match="--contexts 57"):
        check_model(model, [Group(0.0, 57, None)], args)


def test_a_gpu_is_not_asked_for_more_ways_than_it_keeps() -> None:
    ranks = SimpleNamespace(ranks=SimpleNamespace(size=1))
    model: Any = SimpleNamespace(max_context=64, backend=SimpleNamespace(captured=True), model=ranks, max_batch=1)
    args, group = argparse.Namespace(bound=False, max_new_tokens=8), Group(0.0, None, None)
    for number in range(SLOTS):
        group.add(f"shape {number}", number)
    check_model(model, [group], args)
    assert turns.warm_tokens(model, 6) == [32, 24, 16, 16, 8, 8]  # six are left, then four, two, one
    group.batch = model.max_batch = 8
    with pytest.raises(mtp_spec.OptionError, match="of 8 in batches of 8"):
        check_model(model, [group], args)
    group.batch = model.max_batch = 1
    group.add("one more", SLOTS)
    with pytest.raises(mtp_spec.OptionError, match="fewer shapes or rules"):
        check_model(model, [group], args)


def test_prompts_are_known_by_the_passes_they_take() -> None:
    lm: Any = SimpleNamespace(backend=SimpleNamespace(captured=True))
    found = [sorted(turns.prefills(lm, [5] * tokens)) for tokens in (3, 17, 200, 260, 700)]
    assert found == [[16], [64], [256], [16, 256], [256]]
    lm.backend.captured = False
    assert turns.prefills(lm, [5] * 700) == frozenset()


def test_statistics_survive_their_record() -> None:
    stats = GenerationStats()
    stats.record_prefill(5)
    stats.record_step(3, 6, (0, 2), 3)
    stats.record_step(0, 0, (), 1)
    stats.record_step(1, 2, (0,), 2, ["text"], ["text"])
    stats.record_plan(2.5, 0.1, 3, 0.2)
    with stats.phase("verify"):
        pass
    assert GenerationStats.from_record(json.loads(json.dumps(stats.to_record()))) == stats


def test_drafters_are_compared_on_edits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "edits.json"
    main(["bench", "acceptance", "--suite", "edits", "--prompts", "4", "--max-new-tokens", "24", "--json", str(file)])
    cells = json.loads(file.read_text())["details"]
    assert list(cells) == [f"{name} at 0.0" for name in ("plain", "auto mtp", "auto text", "auto mtp+text")]
    assert all(cell["parity"]["same"] == 4 for cell in cells.values())
    assert set(cells["auto text at 0.0"]["accepted_by_source"]) == {"text"}
    assert cells["auto text at 0.0"]["tokens_by_source"]["text"] > 10
    main(
        [
            "bench",
            "acceptance",
            "--prompts",
            "1",
            "--max-new-tokens",
            "8",
            "--depths",
            "2",
            "--drafters",
            "text,mtp+text",
        ]
    )
    assert "chain 2 mtp+text" in " ".join(capsys.readouterr().out.split())
    for wrong in (["--drafters", "retrieval"], ["--suite", "edits", "--set", "mine.jsonl"]):
        with pytest.raises(SystemExit):
            main(["bench", "acceptance", *wrong])
