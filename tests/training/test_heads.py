"""`bench heads`: several recipes on one model, kept run by run in one document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import worded
from mtp_spec.bench import heads
from mtp_spec.cli.main import main

FEW = ["--steps", "3", "--depth", "2", "--batch-tokens", "128", "--max-tokens", "80", "--check-tokens", "8", "--batch",
       "3", "--chains", "1,2", "--answer-tokens", "12"]  # fmt: skip


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    entries = [{"prompt": worded.words(6, 900 + number), "category": "ab"[number % 2]} for number in range(4)]
    return worded.lines(tmp_path_factory.mktemp("held") / "held.jsonl", entries)


def test_recipes_are_trained_once_and_kept(
    v3: Path, lines: Path, held: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = worded.lines(tmp_path / "p.jsonl", [{"prompt": worded.words(6, number)} for number in range(6)])
    file, work = tmp_path / "heads.json", tmp_path / "work"
    command = ["bench", "heads", "--model", str(v3), "--json", str(file), "--work", str(work), "--texts", str(lines),
               "--prompts", str(prompts), "--held-out", str(held), *FEW]  # fmt: skip
    some = ["--recipes", "moe-own,warm", "--recipe", "slow", "block=dense", "rate=1e-4", "steps=2", "text=both",
            "answer_passes=2", "--heads", str(tmp_path / "kept")]  # fmt: skip
    main([*command, *some, "--minutes", "0.0001"])
    assert "left for the next call of the same command: moe-own seed 0, warm seed 0" in capsys.readouterr().out
    main([*command, *some])
    out = capsys.readouterr().out
    assert "left for the next call" not in out
    assert "slow seed 0, chain 2: No" in " ".join(out.split())  # not better, or within the noise
    first = json.loads(file.read_text())
    assert list(first["runs"]) == ["moe-own seed 0", "warm seed 0", "slow seed 0"]
    assert first["runs"]["slow seed 0"]["options"] == {
        "block": "dense",
        "rate": 1e-4,
        "steps": 2,
        "text": "both",
        "answer_passes": 2,
    }
    assert f"both: {24 + 6 + 4} texts" in out
    assert first["runs"]["slow seed 0"]["last"]["step"] == 2
    for texts in (first["shipped"], *(run["texts"] for run in first["runs"].values())):
        assert {(one["chain"], one["temperature"], one["domain"]) for one in texts} == {
            (chain, temperature, domain) for chain in (1, 2) for temperature in (0.0, 0.8) for domain in "ab"
        }  # fmt: skip
    assert [row["recipe"] for row in first["rows"]] == ["shipped", "moe-own", "warm", "slow"]
    assert (tmp_path / "kept" / "warm-seed-0" / "mtp.safetensors").is_file()
    # one more seed of one recipe: what is there is not trained again
    main([*command, "--recipes", "warm", "--seeds", "2"])
    second = json.loads(file.read_text())
    assert second["runs"].pop("warm seed 1")["seed"] == 1
    assert (work / "heads" / "warm-seed-1" / "mtp.safetensors").is_file()
    assert second["runs"] == first["runs"]
    assert [(row["recipe"], row["seeds"]) for row in second["rows"]] == [("shipped", 1), ("warm", 2)]
    with pytest.raises(SystemExit):
        main([*command, "--recipes", "warm", "--steps", "4"])
    assert "was made with another steps: give another file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--recipes", "moe,best"], "--recipes 'best': give some of moe, dense"),
        (["--recipes", "moe-own"], "recipe moe-own: its text is 'own'; give --prompts FILE"),
        (["--recipe", "mine", "block=moe", "steps=many"], "--recipe mine 'steps=many': give OPTION=VALUE"),
        (["--recipe", "mine", "sleep=1"], "--recipe mine 'sleep=1': give OPTION=VALUE with one of start, block"),
        (["--recipes", "warm"], "has no MTP module to go on with; leave them out"),
        (["--recipe", "mine", "loss=mse"], "recipe mine: loss='mse': give some of"),
        (["--recipe", "mine", "depth=9"], "recipe mine: depth=9"),
        (["--recipe", "mine", "block=moe", "width=5"], "recipe mine: width=5 is of a dense block"),
        (["--recipe", "mine", "width=1000000000"], "recipe mine: modules of 144,000,016,008 numbers take"),
        (["--recipe", "../mine", "block=moe"], "--recipe '../mine': give a name of letters"),
        (["--recipe", "", "block=moe"], "--recipe '': give a name of letters"),
        (["--recipe", "moe", "block=dense"], "--recipe moe: there is a recipe of that name"),
        (["--chains", "9"], "a chain has at most 8 drafts"),
        (["--chains", "2,2"], "--chains 2,2: give each depth once"),
        (["--temperatures", "0,0"], "check_temperatures=(0.0, 0.0): give each once"),
        (["--temperatures", "nan"], "check_temperatures=(nan,): one or more numbers"),
        (["--cache-gigabytes", "-1"], "cache_gigabytes=-1.0: a number of 0 or more"),
        (["--minutes", "nan"], "--minutes nan: give a number above 0"),
        (["--held-out", "EMPTY"], "EMPTY is empty: give one JSON object a line"),
        (["--heads", "EMPTY"], "--heads: EMPTY cannot be written"),
        (["--work", "EMPTY/x"], "--work: EMPTY/x cannot be written"),
        (["--json", "EMPTY/x.json"], "argument --json: 'EMPTY/x.json' cannot be written"),
    ],
)
def test_impossible_recipes_are_refused(
    arguments: list[str], said: str, plain: Path, lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    file = tmp_path / "heads.json"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").touch()
    monkeypatch.setattr(heads, "load", lambda *_, **__: pytest.fail("it started"))
    moe = [] if "--recipes" in arguments else ["--recipes", "moe"]
    with pytest.raises(SystemExit):
        main(["bench", "heads", "--model", str(plain), "--json", str(file), "--texts", str(lines), *moe, *arguments])
    assert said in " ".join(capsys.readouterr().err.split())
    assert [made.name for made in tmp_path.iterdir()] == ["EMPTY"]


def test_runs_and_texts_of_another_comparison_are_not_mixed_in(
    v3: Path, lines: Path, held: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, other, work = tmp_path / "heads.json", tmp_path / "other.json", tmp_path / "work"
    mine = worded.texts(tmp_path / "texts.jsonl", count=10)
    command = ["bench", "heads", "--model", str(v3), "--texts", str(mine), "--held-out", str(held), "--work", str(work),
               *FEW, "--recipes="]  # fmt: skip

    def refused(*arguments: object) -> str:
        with pytest.raises(SystemExit):
            main([*command, *map(str, arguments)])
        return " ".join(capsys.readouterr().err.split())

    main([*command, "--json", str(file), "--recipe", "mine", "block=dense"])
    made = work / "heads" / "mine-seed-0" / "mtp.safetensors"
    before, capture = made.read_bytes(), capsys.readouterr()
    assert "mine seed 0" in capture.out
    assert "has a recipe mine of other options" in refused("--json", file, "--recipe", "mine", "block=moe")
    again = refused("--json", other, "--recipe", "mine", "block=moe")
    assert "mine-seed-0 is there, and its run is not in --json" in again
    mine.write_text(lines.read_text())  # the same name, and other texts
    assert "was made with another content of files" in refused("--json", file, "--recipe", "mine", "block=dense")
    assert "has texts of other files or settings" in refused("--json", other, "--recipe", "new", "block=dense")
    assert made.read_bytes() == before
    assert not other.exists()
    other.write_text('{"settings": null, "shipped": null, "runs": {}}')
    assert "no document of bench heads" in refused("--json", other, "--recipe", "new", "block=dense")


def test_intervals_are_over_seeds_and_prompts() -> None:
    one = np.array([[20.0] * 9, [10.0] * 9])
    other: Any = one * [[1.5], [1.0]]
    assert heads.interval([one]) == (2.0, 2.0, 2.0)
    mean, low, high = heads.interval([one, other])
    assert (mean, low, high) == (2.5, 2.0, 3.0)
    uneven = np.array([[10.0, 30.0] * 8, [10.0] * 16])
    mean, low, high = heads.interval([uneven])
    assert low < mean == 2.0 < high
