"""Hidden states for training are those of generation, on a host and on the kernels' references, cached or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from device_models import KINDS, checkpoint
from mtp_spec.analysis.scoring import score_ids
from mtp_spec.kernels import mla
from mtp_spec.load_checks import load_model
from mtp_spec.model.checkpoint.folder import load_checkpoint
from mtp_spec.model.cuda import widened
from mtp_spec.model.cuda.checkpoint import load_device_model
from mtp_spec.model.host import HostModel
from mtp_spec.model.training import TrainingForward
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
    monkeypatch.setattr(backbone, "PASS_ROWS", 140)  # several texts a pass, and several passes
    return load_device_model(checkpoint(tmp_path / "model", "v3"), "cpu")


def test_texts_side_by_side_give_what_they_give_alone(model: Any) -> None:
    own = Backbone(model)
    together = own.hidden(TEXTS)
    assert [len(hidden) for hidden in together] == list(LENGTHS)
    exact = isinstance(model, HostModel)
    for text, hidden in zip(TEXTS, together, strict=True):
        (alone,) = own.hidden([text])
        half = len(text) // 2 + 1
        (begin,) = own.hidden([text[:half]])
        for one, other in ((hidden, alone), (hidden[:half], begin)):  # no text sees what follows
            assert torch.equal(one, other) if exact else near(one, other) < 0.03
    ids = TEXTS[1]
    scores = torch.nn.functional.linear(together[1].float(), model.checkpoint_slots()["lm_head.weight"].float())
    expected = mtp_logits_of(model, ids)
    assert (scores.argmax(-1) == expected.argmax(-1)).float().mean() >= (1 if exact else 0.7)


def near(one: torch.Tensor, other: torch.Tensor) -> float:
    """Returns the median distance of hidden states, relative to their size: where two experts score alike the wrong
    one may be chosen, so some rows of a random model are farther apart."""
    return float(((one.float() - other.float()).norm(dim=-1) / other.float().norm(dim=-1)).median())


@pytest.mark.parametrize(
    ("kind", "stored", "kept"),
    [*((kind, "fp8", True) for kind in KINDS), *((kind, "bfloat16", False) for kind in ("v3", "ragged")),
     *((kind, "fp8", False) for kind in ("ragged", "two shared experts"))],
)  # fmt: skip
def test_whole_texts_have_the_hidden_states_of_inference(
    kind: str, stored: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least as near to float32 as those are, for every kind of model that the kernels run; layers are widened once
    or one after another."""
    monkeypatch.setattr(widened, "KEPT", 10**12 if kept else 0)
    folder = checkpoint(tmp_path, kind)
    model = load_device_model(folder, "cpu", dtype=None if stored == "fp8" else torch.bfloat16)
    exact = TrainingForward(load_checkpoint(folder, dtype=torch.float32))
    own = Backbone(model)
    for ids, hidden in zip(TEXTS[1:4], own.hidden(TEXTS[1:4]), strict=True):
        caches = mla.new_caches(len(model.layers), 192, 0, model.layout, model.device)
        order = torch.arange(len(ids), dtype=torch.int32)
        plan = mla.Plan(torch.zeros(1, dtype=torch.int32), order, order, None, len(ids) - 1)
        inference = model.rows(torch.tensor(ids), caches, plan)
        with torch.no_grad():
            expected = exact.hidden(torch.tensor([ids]))[0]
        assert near(hidden, expected) < 1.2 * near(inference, expected)
    assert own.bytes(100)[0] > 0


def mtp_logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    return score_ids(model, ids).logits


@pytest.mark.parametrize(("rows", "near"), [(0, 0), (100, 0), (100, 10), (100, 100), (10_000, 150), (10_000, 10_000)])
def test_states_are_kept_within_their_room(model: Any, tmp_path: Path, rows: int, near: int) -> None:
    """In the device's memory first, and then on disk."""
    corpus = Corpus(tmp_path / "texts", 0.0)
    for line, ids in enumerate(TEXTS):
        corpus.add("texts", line, ids, [(1, len(ids))], "a")
    width = model.config.hidden_size
    own = Backbone(model)
    expected = own.hidden(TEXTS)
    computed: list[int] = []
    whole = own.hidden
    own.hidden = lambda texts: computed.append(len(texts)) or whole(texts)  # type: ignore[method-assign]
    size = expected[0].element_size()
    states = States(own, corpus, tmp_path / "states.bin", rows * width * size, near * width * size)
    numbers = [3, 0, 4, 1, 2]
    for _ in range(2):
        for number, hidden in zip(numbers, states.padded(numbers, 140), strict=True):
            assert torch.equal(hidden[: LENGTHS[number]], expected[number])
            assert not hidden[LENGTHS[number] :].any()
    # the first that fit: of 5, 3 and 70 tokens; between memory and disk no text is divided
    kept = {0: 0, 100: 3, 10_000: 5 if near > 150 else 4}[rows]
    assert computed == [5, *([5 - kept] if kept < 5 else [])]
    far = min(rows, corpus.tokens) > near
    assert (tmp_path / "states.bin").exists() == far
    assert states.near_bytes <= (near + 1) * width * size
    if far:
        assert (tmp_path / "states.bin").stat().st_size == states.bytes <= rows * width * size


def test_batches_say_which_rows_predict_an_answer(tmp_path: Path) -> None:
    """Row t predicts token t + 1, so the row before an answer is trained on and its last token's is not."""
    model = load_model(tiny.make(tmp_path / "model", "v3").folder, None, "cpu", 256, None, None)
    corpus = Corpus(tmp_path / "texts", 0.0)
    corpus.add("texts", 0, [5, 6, 7, 8, 9, 10, 11], [(2, 4), (6, 7)], "a")
    corpus.add("texts", 1, [12, 13, 14], [(1, 3)], "a")
    own = Backbone(model)
    ids, hidden, weights, chosen, lengths = tensors(corpus, States(own, corpus, None, 0), [1, 0], 2)
    assert ids.tolist() == [[12, 13, 14] + 6 * [0], [5, 6, 7, 8, 9, 10, 11, 0, 0]]
    assert weights.tolist() == [[1, 1] + 7 * [0], [0, 1, 1, 0, 0, 1, 0, 0, 0]]
    assert chosen.tolist() == [0, 1, 10, 11, 14]
    assert lengths.tolist() == [3, 7]
    for row, text in enumerate(([12, 13, 14], [5, 6, 7, 8, 9, 10, 11])):
        assert torch.equal(hidden[row, : len(text)], own.hidden([text])[0])
        assert not hidden[row, len(text) :].any()
