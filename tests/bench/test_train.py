"""`bench train --shape`, on the kernels' references."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from math import isfinite, prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from device_models import checkpoint
from mtp_spec.bench import train_shape
from mtp_spec.cli.main import main
from mtp_spec.training import plan
from mtp_spec.training.backbone import Backbone, States
from mtp_spec.training.batches import Batches, Shapes, tensors
from mtp_spec.training.texts import Corpus


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


def test_hidden_states_that_are_kept_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, computed, hidden = checkpoint(tmp_path, "v3") / "config.json", Counter[tuple[int, ...]](), Backbone.hidden

    def counted(self: Backbone, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        computed.update(map(tuple, texts))
        return hidden(self, texts)

    monkeypatch.setattr(Backbone, "hidden", counted)
    few = ["--batch", "1", "--context", "16", "--depths", "2", "--repeats", "1"]
    main(["bench", "train", "--shape", str(shape), "--device", "cpu", "--block", "dense", *few])
    assert len(computed) >= 10
    assert set(computed.values()) == {1}


def test_hidden_states_for_which_there_is_no_room_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def small(backbone: Backbone, corpus: Corpus, file: Path | None, room: int, near: int) -> States:
        return States(backbone, corpus, file, room, near // 16)

    shape = checkpoint(tmp_path, "v3") / "config.json"
    monkeypatch.setattr(train_shape, "States", small)
    with pytest.raises(SystemExit):
        main(["bench", "train", "--shape", str(shape), "--device", "cpu", "--block", "dense"])
    assert "give fewer --repeats or a smaller --batch" in capsys.readouterr().err


def test_modules_for_which_there_is_no_room_are_refused_before_they_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = checkpoint(tmp_path, "v3") / "config.json"
    monkeypatch.setattr(plan, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(train_shape, "new_modules", lambda *_: pytest.fail("made"))
    with pytest.raises(SystemExit):
        main(["bench", "train", "--shape", str(shape), "--device", "cpu", "--block", "dense"])
    assert "of memory to train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("batch", "context", "depths", "repeats"),
    [(32, 507, 5, 7), (32, 507, 5, 6), (2, 128, 4, 7), (2, 128, 4, 1), (8, 507, 5, 7), (3, 100, 4, 40), (1, 8, 4, 7)],
)
def test_all_shapes_are_captured_before_steps_are_timed(
    batch: int, context: int, depths: int, repeats: int, tmp_path: Path
) -> None:
    args = argparse.Namespace(batch=batch, context=context, depths=depths, repeats=repeats)
    corpus = train_shape._corpus(tmp_path, args, 1000)
    shapes = Shapes(batch * (context + depths), depths, context)
    batches = Batches(corpus, range(len(corpus.texts)), shapes.tokens, 0, shapes)
    first, whole = train_shape.untimed(batches, corpus), batches.count(0)
    assert whole - first >= repeats // 2
    states, seen = _NoStates(), Counter[tuple[tuple[int, ...], ...]]()
    for step in range(whole + batches.count(1)):
        if step == first:
            assert len(seen) == 2
            assert min(seen.values()) >= 2
        seen[tuple(tuple(part.shape) for part in tensors(corpus, states, batches.of(step), depths, shapes))] += 1
    assert len(seen) == 2


class _NoStates(States):
    """Of one number for each token."""

    def __init__(self) -> None:
        pass

    def padded(self, numbers: Sequence[int], width: int, count: int | None = None) -> Tensor:
        return torch.zeros(len(numbers) if count is None else count, width, 1)


@pytest.mark.parametrize(("before", "after"), [(42e9, 40e9), (40e9, 42e9)])
def test_memory_is_what_came_beside_the_model(before: float, after: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 32e9)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: after)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    facts: dict[str, float] = {}
    train_shape._Memory(torch.device("cuda")).told(int(20e9), int(before), facts)
    assert facts == {"model GB": 32, "peak GB": 10, "peak over plan": 0.5}


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
