"""Hidden states for training are those of generation, on a host and on the kernels' references, cached or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from device_models import checkpoint
from mtp_spec.analysis.scoring import score_ids
from mtp_spec.load_checks import load_model
from mtp_spec.model.cuda.checkpoint import load_device_model
from mtp_spec.training import backbone
from mtp_spec.training.backbone import Backbone, States
from mtp_spec.training.batches import tensors
from mtp_spec.training.texts import Corpus

LENGTHS = (5, 70, 64, 130, 3)
TEXTS = [[(37 * i + 11 * length) % 90 for i in range(length)] for length in LENGTHS]


@pytest.fixture(params=["host", "kernels"])
def model(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "host":
        return load_model(tiny.make(tmp_path / "model", "v3").folder, None, "cpu", 256, None, None)
    monkeypatch.setattr(backbone, "PASS_ROWS", 128)  # several texts a pass, and a text of several passes
    return load_device_model(checkpoint(tmp_path / "model", "v3"), "cpu")


def test_texts_side_by_side_give_what_they_give_alone(model: Any) -> None:
    together = Backbone(model, 200).hidden(TEXTS)
    assert [len(hidden) for hidden in together] == list(LENGTHS)
    for text, hidden in zip(TEXTS, together, strict=True):
        (alone,) = Backbone(model, 130).hidden([text])
        assert torch.equal(hidden, alone)
        half = len(text) // 2 + 1
        (begin,) = Backbone(model, 130).hidden([text[:half]])
        assert torch.equal(hidden[:half], begin)  # no text sees what follows
    ids = TEXTS[1]
    scores = torch.nn.functional.linear(together[1].float(), model.checkpoint_slots()["lm_head.weight"].float())
    expected = mtp_logits_of(model, ids)
    assert torch.equal(scores.argmax(-1), expected.argmax(-1))


def mtp_logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    return score_ids(model, ids).logits


@pytest.mark.parametrize("rows", [0, 100, 10_000])
def test_states_are_kept_within_their_room(model: Any, tmp_path: Path, rows: int) -> None:
    corpus = Corpus(tmp_path / "texts", 0.0)
    for line, ids in enumerate(TEXTS):
        corpus.add("texts", line, ids, [(1, len(ids))], "a")
    width = model.config.hidden_size
    own = Backbone(model, 200)
    expected = own.hidden(TEXTS)
    computed: list[int] = []
    whole = own.hidden
    own.hidden = lambda texts: computed.append(len(texts)) or whole(texts)  # type: ignore[method-assign]
    size = expected[0].element_size()
    states = States(own, corpus, tmp_path / "states.bin", rows * width * size)
    numbers = [3, 0, 4, 1, 2]
    for _ in range(2):
        for number, hidden in zip(numbers, states.of(numbers), strict=True):
            assert torch.equal(hidden, expected[number])
    kept = {0: 0, 100: 3, 10_000: 5}[rows]  # the first that fit: of 5, 3 and 70 tokens
    assert computed == [5, *([5 - kept] if kept < 5 else [])]
    assert (tmp_path / "states.bin").exists() == bool(rows)
    if rows:
        assert (tmp_path / "states.bin").stat().st_size == states.bytes <= rows * width * size


def test_batches_say_which_rows_predict_an_answer(tmp_path: Path) -> None:
    """Row t predicts token t + 1, so the row before an answer is trained on and its last token's is not."""
    model = load_model(tiny.make(tmp_path / "model", "v3").folder, None, "cpu", 256, None, None)
    corpus = Corpus(tmp_path / "texts", 0.0)
    corpus.add("texts", 0, [5, 6, 7, 8, 9, 10, 11], [(2, 4), (6, 7)], "a")
    corpus.add("texts", 1, [12, 13, 14], [(1, 3)], "a")
    own = Backbone(model, 200)
    ids, hidden, weights = tensors(corpus, States(own, corpus, None, 0), [1, 0], 2)
    assert ids.tolist() == [[12, 13, 14] + 6 * [0], [5, 6, 7, 8, 9, 10, 11, 0, 0]]
    assert weights.tolist() == [[1, 1] + 7 * [0], [0, 1, 1, 0, 0, 1, 0, 0, 0]]
    for row, text in enumerate(([12, 13, 14], [5, 6, 7, 8, 9, 10, 11])):
        assert torch.equal(hidden[row, : len(text)], own.hidden([text])[0])
        assert not hidden[row, len(text) :].any()
