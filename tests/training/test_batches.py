"""Batches that are padded to few shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from device_models import DEMO
from mtp_spec.errors import OptionError
from mtp_spec.model.checkpoint.folder import open_checkpoint
from mtp_spec.model.rope import rope_table
from mtp_spec.model.training import ModulesForward
from mtp_spec.training.batches import Batch, Batches, Shapes, tensors
from mtp_spec.training.loop import Trainer
from mtp_spec.training.modules import new_modules
from mtp_spec.training.objective import Objective, draft_loss
from mtp_spec.training.options import TrainOptions
from mtp_spec.training.team import Team
from mtp_spec.training.texts import Corpus


class Noise:
    """Hidden states of a corpus: noise, and zeros behind a text."""

    def __init__(self, corpus: Corpus, width: int) -> None:
        self._rows = [torch.randn(text.length, width) for text in corpus.texts]

    def padded(self, numbers: Sequence[int], width: int, count: int) -> Tensor:
        out = torch.zeros(count, width, self._rows[0].shape[1])
        for place, number in enumerate(numbers):
            out[place, : len(self._rows[number])] = self._rows[number]
        return out


@pytest.mark.parametrize("tokens", [300, 16384])
def test_shapes_are_few_and_within_a_batch(tokens: int, tmp_path: Path) -> None:
    """Batches of texts of all lengths fill few shapes, none of them larger than a batch but for a single long text."""
    corpus, depth = Corpus(tmp_path, 0.0), 5
    for line in range(3000):
        length = 2 + (line * line) % 510
        corpus.add("texts", line, [line] * length, [(1 + length // 3, length)], "a")
    assert len(corpus.texts) == 3000
    longest = max(text.length for text in corpus.texts)
    shapes = Shapes(tokens, depth, longest)
    batches = Batches(corpus, range(len(corpus.texts)), tokens, 0, shapes)
    found, places, own = set(), 0, 0
    for step in range(batches.count(0)):
        texts = [corpus.texts[number] for number in batches.of(step)]
        width = shapes.width(max(text.length for text in texts))
        count = shapes.texts(len(texts), width)
        assert max(text.length for text in texts) + depth <= width <= longest + depth  # as angles of positions reach
        assert len(texts) <= count
        assert count * width <= tokens or count == 1
        found.add((count, width))
        places, own = places + count * width, own + sum(text.length + depth for text in texts)
    assert len(found) <= 60
    assert len({width for _, width in found}) <= 50
    assert places < 1.25 * own
    assert sorted(n for step in range(batches.count(0)) for n in batches.of(step)) == list(range(len(corpus.texts)))
    corpus.close()


def test_rows_are_few_and_never_more_than_places() -> None:
    shapes = Shapes(16384, 5, 512)
    for places in (1, 7, 16, 300, 16000):
        found = {shapes.rows(own, places) for own in range(places + 1)}
        assert len(found) <= 16
        assert max(found) == places
        assert all(own <= shapes.rows(own, places) for own in range(places + 1))


@pytest.mark.parametrize("block", ["dense", "moe"])
@pytest.mark.parametrize("lengths", [[13], [40, 37, 20], [20] * 17])
def test_padding_changes_neither_loss_nor_gradients(lengths: list[int], block: str, tmp_path: Path) -> None:
    """Nor the loads of experts, which are those of the texts alone."""
    corpus, depth, config = Corpus(tmp_path, 0.0), 3, open_checkpoint(DEMO).config
    for line, length in enumerate(lengths):
        ids = [(line + 7 * i) % 90 for i in range(length)]
        corpus.add("texts", line, ids, [(1, length // 2), (length // 2 + 1, length)], "a")
    torch.manual_seed(0)
    modules: Any = new_modules(config, 64 if block == "dense" else None, 1, 0, "cpu")
    table = rope_table(config, 64, "cpu")
    shared = [torch.randn(300, config.hidden_size) for _ in range(2)]
    states: Any = Noise(corpus, config.hidden_size)
    found = list[tuple[Tensor, list[Tensor]]]()
    for shapes in (None, Shapes(1000, depth, 55)):
        forward = ModulesForward(list(modules), *shared, lambda length: table)
        batch = tensors(corpus, states, range(len(lengths)), depth, shapes)
        check(batch, len(lengths))
        outcome = draft_loss(forward, Objective.of("kl,tv", depth, 0.8), batch.ids, batch.hidden, batch.weights,
                             chosen=batch.chosen, lengths=batch.lengths)  # fmt: skip
        outcome.loss.backward()
        gradients = [parameter.grad for parameter in modules.parameters() if parameter.grad is not None]
        loads = [load for load in forward.load if load is not None]
        found.append(
            (torch.cat((outcome.loss[None], outcome.rows, outcome.greedy, outcome.overlap, *loads)), gradients)
        )
        modules.zero_grad(set_to_none=True)
        rows = sum(max(0, length - deep) for length in lengths for deep in range(1, depth + 1))
        assert all(float(load.sum()) == rows * config.num_experts_per_tok for load in loads)
    torch.testing.assert_close(found[0][0], found[1][0])
    assert len(found[0][1]) > 5
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    corpus.close()


def check(batch: Batch, texts: int) -> None:
    """Rows that count are chosen once, as others are; padding has no weight, hidden state or length."""
    weights, own = batch.weights.flatten(), int(batch.weights.count_nonzero())
    assert batch.chosen[:own].tolist() == weights.nonzero().flatten().tolist()
    assert not weights[batch.chosen[own:]].any()
    assert len(batch.chosen.unique()) == len(batch.chosen)
    assert not any(part[texts:].any() for part in (batch.ids, batch.weights, batch.hidden, batch.lengths))
    assert batch.ids.shape == batch.weights.shape == batch.hidden.shape[:2]
    assert batch.lengths.shape == batch.ids.shape[:1]


@pytest.mark.parametrize(("block", "optimiser"), [("dense", "adamw"), ("moe", "muon")])
def test_padded_steps_train_as_others_do(block: str, optimiser: str, tmp_path: Path) -> None:
    """With the learning rate's share as a tensor, as captured steps take it, and from a saved state on."""
    corpus, config = Corpus(tmp_path, 0.0), open_checkpoint(DEMO).config
    for line, length in enumerate([13, 40, 37, 20, 21, 5, 33]):
        corpus.add("texts", line, [(line + 7 * i) % 90 for i in range(length)], [(2, length)], "a")
    states: Any = Noise(corpus, config.hidden_size)
    table, shared = rope_table(config, 64, "cpu"), [torch.randn(300, config.hidden_size) for _ in range(2)]
    options = TrainOptions(
        texts=DEMO / "config.json", block=block, optimiser=optimiser, steps=20, batch_tokens=100, depth=2
    )
    losses = []
    for shapes in (None, Shapes(200, 2, 40)):
        modules: Any = new_modules(config, 64 if block == "dense" else None, 1, 0, "cpu")
        forward = ModulesForward(list(modules), *shared, lambda length: table)
        trainer = Trainer.of(options, forward, modules, corpus, states, Team("cpu"))
        trainer.shapes = shapes
        for step in range(6):
            if step == 3:
                trainer.settle()
                trainer.save(tmp_path / "state")
                trainer.restore(tmp_path / "state")
            trainer.one()
        losses.append(torch.tensor([line["loss"] for line in trainer.log]))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    assert len(losses[0]) == 6
    corpus.close()


def test_a_pass_has_own_answers_as_often_as_asked(tmp_path: Path) -> None:
    corpus, config = Corpus(tmp_path, 0.0), open_checkpoint(DEMO).config
    for line, source in enumerate(("held_out", "texts", "prompts", "texts", "prompts")):
        corpus.add(source, line, [line + 3 * i for i in range(9 + line)], [(2, 9)], "a")
    file, shared = DEMO / "config.json", [torch.randn(300, config.hidden_size) for _ in range(2)]
    table, states = rope_table(config, 64, "cpu"), cast(Any, Noise(corpus, config.hidden_size))
    modules: Any = new_modules(config, 64, 1, 0, "cpu")
    forward = ModulesForward(list(modules), *shared, lambda length: table)
    for passes in (1, 3):
        options = TrainOptions(texts=file, prompts=file, answer_passes=passes, batch_tokens=40, epochs=2.0)
        trainer = Trainer.of(options, forward, modules, corpus, states, Team("cpu"))
        taken = [number for step in range(trainer.batches.count(0)) for number in trainer.batches.of(step)]
        assert sorted(taken) == sorted([1, 3] + [2, 4] * passes)
    with pytest.raises(OptionError, match="answer_passes=2 weighs answers to prompts against texts: give both"):
        TrainOptions(prompts=file, answer_passes=2)
