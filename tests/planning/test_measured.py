"""Step times: measured once, kept, and measured again whenever what was kept is not about this."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mtp_spec
import tiny
from mtp_spec.api import LM
from mtp_spec.cpu import planners
from mtp_spec.cpu.planners import calibrated
from mtp_spec.planning import costs as times
from mtp_spec.planning import store
from mtp_spec.planning.costs import StepTimes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("tiny") / "model", seed=3).folder


class Counter:
    """Stands for measuring and counts it."""

    def __init__(self, found: StepTimes | None) -> None:
        self.found, self.calls = found, 0

    def __call__(self, *_: Any) -> StepTimes | None:
        self.calls += 1
        return self.found


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, auto_drafts: None) -> Counter:
    counter = Counter(StepTimes.typical())
    monkeypatch.setattr(planners, "measure", counter)
    monkeypatch.setattr(planners, "crowded", lambda: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return counter


def write_a_text(folder: Path, **options: Any) -> LM:
    lm = mtp_spec.load(folder, dtype="bfloat16", **options)
    lm.generate([1, 2, 3], max_new_tokens=3, seed=0)
    lm.generate([1, 2, 3], max_new_tokens=3, seed=0)
    return lm


def kept(tmp_path: Path) -> list[Path]:
    return sorted(file for file in (tmp_path / "cache").rglob("*") if file.is_file())


def test_measured_once_and_kept(folder: Path, tmp_path: Path, counter: Counter) -> None:
    write_a_text(folder)
    write_a_text(folder)
    assert counter.calls == 1
    (file,) = kept(tmp_path)
    document = json.loads(file.read_text())
    assert document["of"]["torch"] == torch.__version__
    assert StepTimes.from_json(document["values"]) == StepTimes.typical()


def test_times_of_a_busy_machine_are_measured_again_once_it_is_not(
    folder: Path, counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planners, "crowded", lambda: True)
    write_a_text(folder)
    write_a_text(folder)
    assert counter.calls == 1
    monkeypatch.setattr(planners, "crowded", lambda: False)
    write_a_text(folder)
    write_a_text(folder)
    assert counter.calls == 2
    monkeypatch.setattr(planners, "crowded", lambda: True)
    write_a_text(folder)
    assert counter.calls == 2


def test_another_version_dtype_or_number_of_threads_is_measured(
    folder: Path, tmp_path: Path, counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    write_a_text(folder)
    monkeypatch.setattr(store, "__version__", "999")
    write_a_text(folder)
    assert (counter.calls, len(kept(tmp_path))) == (2, 1)  # the old file was replaced
    try:
        torch.set_num_threads(before + 1)
        lm = mtp_spec.load(folder, dtype="bfloat16")
        lm.generate([1], max_new_tokens=2, speculation=mtp_spec.Speculation(2, adaptive=True), seed=0)
    finally:
        torch.set_num_threads(before)
    assert counter.calls == 3
    lm = mtp_spec.load(folder, dtype="float16")
    lm.generate([1], max_new_tokens=2, speculation=mtp_spec.Speculation(2, adaptive=True), seed=0)
    assert counter.calls == 4


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"of": 3}', "\0\1"], ids=repr)
def test_a_broken_file_is_replaced(folder: Path, tmp_path: Path, counter: Counter, content: str) -> None:
    write_a_text(folder)
    (file,) = kept(tmp_path)
    whole = file.read_text()
    file.write_text(content)
    write_a_text(folder)
    assert (counter.calls, file.read_text()) == (2, whole)


@pytest.mark.parametrize("change", [{"rows": [1]}, {"seconds": [[1, 1], [0, 0]]}, {"contexts": [5, 5]}, {"rows": "x"}])
def test_times_that_make_no_sense_are_refused(folder: Path, tmp_path: Path, counter: Counter, change: Any) -> None:
    write_a_text(folder)
    (file,) = kept(tmp_path)
    document = json.loads(file.read_text())
    document["values"]["tree"] |= change
    file.write_text(json.dumps(document))
    with pytest.raises((ValueError, TypeError)):
        StepTimes.from_json(document["values"])
    write_a_text(folder)
    assert counter.calls == 2


def test_a_directory_that_cannot_be_written_is_said(folder: Path, tmp_path: Path, counter: Counter) -> None:
    (tmp_path / "cache").write_text("a file stands in the way")
    with pytest.warns(UserWarning, match="cannot be kept.*measure=False"):
        write_a_text(folder)
    assert counter.calls == 1


def test_measuring_can_be_turned_off(folder: Path, tmp_path: Path, counter: Counter) -> None:
    lm = write_a_text(folder, measure=False)
    assert lm.generate([5], max_new_tokens=4, seed=0).stats.planned.steps > 0
    assert (counter.calls, kept(tmp_path)) == (0, [])


def test_plain_texts_and_fixed_trees_measure_nothing(folder: Path, tmp_path: Path, counter: Counter) -> None:
    lm = mtp_spec.load(folder, dtype="bfloat16")
    for speculation in (None, 2, mtp_spec.Speculation(branching=(2, 1))):
        lm.generate([1, 2, 3], max_new_tokens=3, speculation=speculation, seed=0)
    assert (counter.calls, kept(tmp_path)) == (0, [])


def test_a_busy_machine_is_measured_another_time(folder: Path, tmp_path: Path, counter: Counter) -> None:
    counter.found = None
    for calls in (1, 2):
        write_a_text(folder)
        assert (counter.calls, kept(tmp_path)) == (calls, [])


def test_measuring_measures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = mtp_spec.load(folder, dtype="bfloat16")
    reports: list[tuple[int, int]] = []
    monkeypatch.setattr(times, "STEADY", 1e9)
    monkeypatch.setattr(times, "ROUNDS", 2)  # further ones only as long as time is left
    found = times.measure(lm.model, lm.technique, None, 200, lambda *both: reports.append(both))
    assert found is not None
    assert StepTimes.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert found.verify.contexts == (times.NEAR, 200)
    assert found.verify(1, 50) > 0 < found.extend(1, 50)  # on a busy machine either may seem longer
    assert reports[-1][0] == reports[-1][1] == len(reports)
    monkeypatch.setattr(times, "STEADY", 0.0)
    assert times.measure(lm.model, lm.technique, None, 200) is None


def test_a_model_without_modules_is_measured_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = mtp_spec.load(tiny.make(tmp_path / "model", "v2").folder, dtype="bfloat16", measure=False)
    monkeypatch.setattr(times, "_steady", lambda _: True)  # however busy this machine is
    found = times.measure(lm.model, lm.technique, None, 200)
    assert found is not None
    assert found.level == found.extend == found.verify
    assert calibrated(found, lm.model, lm.technique, None).verify(1, 32) > 0
