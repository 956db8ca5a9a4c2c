"""Every benchmark runs, says what it ran on, and finds nothing that it exists to find."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import modeling_layers

import mtp_spec
import tiny
from device_models import checkpoint, device_lm
from mtp_spec.bench import grid, kernels, step, tuning, turns
from mtp_spec.bench.common import bundled_prompts, interval, median_interval
from mtp_spec.bench.exactness import SAMPLING, SHAPES
from mtp_spec.bench.peer import transformers_ways
from mtp_spec.bench.phases import step_phases
from mtp_spec.bench.turns import Written
from mtp_spec.cli.main import main
from mtp_spec.cpu import planners
from mtp_spec.cuda.state import State
from mtp_spec.kernels import gemm
from mtp_spec.planning.costs import Curve, StepTimes
from mtp_spec.speculation import Speculation
from mtp_spec.stats import GenerationStats

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
    document = run(["batch", "--sizes", "2", "--repeats", "1", "--adversarial", "--max-new-tokens", "2"], tmp_path)
    assert document["texts unlike plain"] == 0


def test_host(tmp_path: Path) -> None:
    document = run(["host", "--sizes", "2", "--temperatures", "0", "--acceptance", "1", "--repeats", "1",
                    "--max-new-tokens", "9"], tmp_path)  # fmt: skip
    assert [(row["asked for"], row["way"]) for row in document["rows"]] == [
        (asked, way) for asked in ("nothing", "a stop string", "logprobs") for way in ("plain", "chain of 3", "auto")
    ]
    # of 9 tokens the first comes from the prompt
    assert [row["tokens a step"] for row in document["rows"] if row["way"] != "auto"] == [1, 4] * 3


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtp_spec.bench.rows.COUNTS", (1, 2, 7, 33))
    monkeypatch.setattr("mtp_spec.bench.rows.CONTEXTS", (1, 250))
    document = run(["rows", "--threads", "1"], tmp_path)
    assert all(row["chains equal"] == row["of"] and row["trees equal"] == 3 for row in document["rows"])


@pytest.fixture(scope="module")
def bundled() -> mtp_spec.LM:
    return mtp_spec.load()


@pytest.fixture
def loaded(bundled: mtp_spec.LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtp_spec, "load", lambda *_, **__: bundled)


MEASURED = StepTimes(*(Curve.rising((32, 512), {1: (s, s), 4: (2 * s, 2 * s)}) for s in (0.004, 0.005, 0.001, 0.001)))


@pytest.mark.usefixtures("auto_drafts")
def test_plan_shows_what_auto_plans_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planners, "measure", lambda *_: MEASURED)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    document = run(["plan", *TINY, "--temperatures", "0.8"], tmp_path)
    assert document["rows"][0] == {"pass": "decode", "rows": 1, "ms at 32 tokens": 4.0, "at 512": 4.0,
                                   "in plain steps": 1.0}  # fmt: skip
    assert [row["in plain steps"] for row in document["rows"][1:]] == [2.0, 1.25, 2.5, 0.25, 0.5, 0.25, 0.5]
    (kept,) = (tmp_path / "cache").rglob("*.json")
    assert str(kept) in document["times"]
    assert str(kept) in capsys.readouterr().out
    learned = document["after 2 texts at temperature 0.8"]
    for chances in learned["chances"].values():
        assert list(chances.values()) == sorted(chances.values())
    assert sum(learned["steps by depth drafted"].values()) == pytest.approx(1.0)
    assert learned["ms of a plain step"] > 0


@pytest.mark.usefixtures("auto_drafts")
def test_plan_without_measured_times_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planners, "measure", lambda *_: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    document = run(["plan", *TINY, "--temperatures", "0"], tmp_path)
    assert "typical" in document["times"]
    assert document["rows"][0]["ms at 32 tokens"] == "-"


def test_plan_of_captured_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mtp_spec, "load", lambda *_, **__: device_lm())
    document = run(["plan", *TINY, "--prompts", "1", "--temperatures", "0", "--device", "cuda"], tmp_path)
    assert [row["step"] for row in document["rows"]] == ["plain", *(f"chain {depth}" for depth in range(1, 6))]
    assert document["rows"][0]["times plain"] == 1.0
    tokens = [row["tokens expected"] for row in document["rows"]]
    assert tokens == sorted(tokens)
    assert list(document["after 1 texts at temperature 0"]["chances"]) == ["1", "2", "3", "4", "5"]


GRID = ["plan", "--grid", "--depths", "1,2", "--trees", "2,2x1", "--temperatures", "0.8", "--max-new-tokens", "6"]


class Clock:
    """Seconds that a text takes are those of its plan."""

    seconds: ClassVar[dict[str, float]] = {"plain": 1.0, "auto": 0.5, "chain 1": 0.8, "chain 2": 0.4, "tree 2": 0.9,
                                           "tree 2,1": 0.95}  # fmt: skip

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.written: list[tuple[str, int]] = []
        monkeypatch.setattr(grid, "ours", self._ours)

    def _ours(self, lm: mtp_spec.LM, speculation: Any) -> turns.Generate:
        name = speculation or "plain"
        if isinstance(speculation, Speculation):
            widths = ",".join(map(str, speculation.branching))
            name = f"chain {speculation.depth}" if speculation.is_chain else f"tree {widths}"

        def write(ids: list[int], options: dict[str, Any]) -> Written:
            self.written.append((name, options["max_new_tokens"]))
            return Written(ids[:6], self.seconds[name], GenerationStats())

        return write


@pytest.mark.usefixtures("loaded")
def test_the_best_fixed_plan_is_chosen_on_one_half_and_compared_on_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Clock(monkeypatch)
    document = run([*GRID, "--prompts", "5"], tmp_path)
    (setting,) = document["settings"]
    assert setting["best"] == "chain 2"
    assert setting["auto over the best"]["median"] == pytest.approx(0.8)
    assert setting["auto over plain"]["median"] == pytest.approx(2.0)
    assert setting["auto over plain"]["interval"] == pytest.approx([2.0, 2.0])
    assert setting["goals met"] == {"of the best": False, "of plain": True}
    assert setting["prompts that compare"] == 3
    rows = [(row["to"], row["plan"], row["prompts"]) for row in document["rows"]]
    assert rows == [
        *(("choose", name, 2) for name in ("plain", "auto", "chain 1", "chain 2", "tree 2", "tree 2,1")),
        *(("compare", name, 3) for name in ("plain", "auto", "chain 2")),
    ]
    assert "goal 0.98 missed" in capsys.readouterr().out


@pytest.mark.usefixtures("loaded")
def test_halving_drops_slow_plans_and_plain_may_be_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(Clock, "seconds", {**Clock.seconds, "plain": 0.3})
    document = run([*GRID, "--prompts", "8", "--halving", "--adversarial"], tmp_path)
    ordinary, adversarial = document["settings"]
    for setting in (ordinary, adversarial):
        assert setting["best"] == "plain"
        assert setting["prompts that chose"] == {"plain": 4, "auto": 4, "chain 1": 4, "chain 2": 4, "tree 2": 2,
                                                 "tree 2,1": 2}  # fmt: skip
    assert (adversarial["random prompts"], adversarial["temperature"]) == (True, 2.0)
    texts = [name for name, tokens in clock.written if tokens == 6]
    assert texts.count("tree 2") == 4


@pytest.mark.usefixtures("loaded")
def test_a_plan_that_changes_the_text_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ours(lm: mtp_spec.LM, plan: Any) -> turns.Generate:
        honest, other = turns.ours(lm, plan), {"seed": 7, "temperature": 2.0}
        return lambda ids, options: honest(ids, options if plan is None else {**options, **other})

    monkeypatch.setattr(grid, "ours", ours)
    with pytest.raises(SystemExit):
        run([*GRID, "--prompts", "2"], tmp_path)
    document = json.loads((tmp_path / "deeper" / "report.json").read_text())
    assert {row["plan"] for row in document["unlike plain"]} == {"auto", "chain 1", "chain 2", "tree 2", "tree 2,1"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--halving"], "--halving needs --grid"),
        (["--grid", "--prompts", "1"], "--prompts 2 or more"),
        (["--grid", "--trees", "9x9"], "at most 64 nodes"),
    ],
)
def test_plan_refuses_before_loading(
    options: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mtp_spec, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(SystemExit):
        main(["bench", "plan", *options])
    assert words in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits are a Unix module")
def test_speed_beside_transformers(tmp_path: Path) -> None:
    document = run(["speed", *TINY, "--depths", "2", "--temperatures", "0", "--transformers", "--loads", "1"], tmp_path)
    rows = {row["way"]: row for row in document["rows"]}
    rows.pop("transformers plain, bfloat16", None)  # on processors that have its products
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
    ways.pop("transformers plain, bfloat16", None)  # on processors that have its products
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


def test_accepting_is_timed_and_moves_nothing_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = device_lm(checkpoint(tmp_path, "v3"))
    model: Any = lm.model
    state, context, works = State(model, 100), 40, list[str]()

    def pass_once(name: str, work: Any, rate: float) -> dict[str, Any]:
        work[0]()
        return {"pass": name, "us": 80.0, "floor us": 8.0, "x floor": 10.0, "GB": 1.0, "experts": 3.0,
                "launches": 28}  # fmt: skip

    def graph_time(work: Callable[[], Any]) -> float:
        for _ in range(2):
            work()
            assert int(state.length) == context
        works.append("")
        return (5.0, 100.0, 20.0)[len(works) % 3]

    monkeypatch.setattr(step, "_pass", pass_once)
    monkeypatch.setattr(step, "graph_time", graph_time)
    args = argparse.Namespace(parts=["accepting", "text"], rows=[1, 4], context=context)
    rows, facts, notes = step.measure(model, state, replace(model.config, num_hidden_layers=61), 2.0, args)
    assert [row["pass"] for row in rows] == ["dense layer, 4 rows", "MoE layer, 4 rows", "head, 4 rows"]
    assert list(facts["accepting"]) == list(step.ACCEPTED)
    for micro in facts["accepting"].values():
        assert (micro["draft"], micro["verify"], micro["accept"]) == (100.0, 20.0, 5.0)
        assert micro[step.SLICE] == pytest.approx(5 / 125)
        # one dense layer of 80 us, 60 more in pairs that took as long, the head
        assert micro[step.WHOLE] == pytest.approx(5 / (105 + 80 + 60 * 40 + 80))
    assert len(notes) == len(step.ACCEPTED)
    assert list(facts["seconds of parts"]) == ["accepting"]


def test_prompts_come_again_with_another_seed() -> None:
    prompts = bundled_prompts(400)
    assert len(prompts) == 400
    assert len({(item["prompt"], item["seed"]) for item in prompts}) == 400


def test_interval_covers_the_ratio() -> None:
    low, high = interval([2.0, 3.0, 4.0] * 20, [1.0] * 60)
    assert low < 3.0 < high < 3.5


def test_a_burst_does_not_move_the_interval_of_a_median() -> None:
    low, high = median_interval([1.0, 1.1, 1.2, 1.3] * 5 + [0.01])
    assert 1.0 < low < 1.15 < high < 1.3


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


@pytest.mark.parametrize(
    ("given", "cause"),
    [(["step", "--acceptance", "0.5,2"], "from 0 to 1"), (["cpu", "--acceptance", "nan"], "from 0 to 1"),
     (["kernels", "--experts", "5x"], "DxI:CHOSEN/EXPERTS"), (["step", "--dtype", "int8"], "invalid choice")],
)  # fmt: skip
def test_options_of_no_meaning_are_named(given: list[str], cause: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", *given])
    told = capsys.readouterr().err
    assert given[1] in told
    assert cause in told


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        (["--rows", "1,8,64", "--contexts", "32,8"], "--contexts 8: give more tokens than the 8 rows of a pass"),
        (["--rows", "64", "--what", "attention"], "--rows 64: attention is timed for up to 16 rows"),
    ],
)
def test_passes_that_cannot_be_timed_are_told_before_any_is(
    given: list[str], cause: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "copy_rate", lambda: pytest.fail("timed"))
    with pytest.raises(SystemExit):
        main(["bench", "kernels", *given])
    assert cause in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "what"),
    [("--heads", "16", "products,experts"), ("--contexts", "1024", "prompts"), ("--shapes", "2112x7168", "attention"),
     ("--experts", "7168x2048:8/64", "products")],
)  # fmt: skip
def test_options_of_kernels_that_are_not_timed_are_refused(
    option: str, value: str, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "copy_rate", lambda: pytest.fail("timed"))
    with pytest.raises(SystemExit):
        main(["bench", "kernels", option, value, "--what", what])
    assert f"{option} is of kernels that --what {what} leaves out: add them" in capsys.readouterr().err


def test_a_given_acceptance_is_replayed(tmp_path: Path) -> None:
    options = ["--prompts", "2", "--context", "6", "--max-new-tokens", "12", "--depths", "2", "--acceptance", "1"]
    document = run(["replay", *options], tmp_path)
    plain, chain, auto = document["rows"]
    assert [row["way"] for row in (plain, chain, auto)] == ["plain", "chain 2, replay", "auto, replay"]
    assert (plain["tokens/step"], chain["accepted by depth"]) == (1.0, "1.00 1.00")
    assert chain["tokens/step"] > 2.5
    with pytest.raises(SystemExit):
        main(["bench", "replay", "--acceptance", "1.5"])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            main(["bench", "replay", "--shape", "GLM-4.7-Flash"])
