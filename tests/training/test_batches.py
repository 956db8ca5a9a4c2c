"""Batches that are padded to few shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from device_models import DEMO
from mtp_spec.model.checkpoint.folder import open_checkpoint
from mtp_spec.model.rope import rope_table
from mtp_spec.model.training import ModulesForward
from mtp_spec.training.batches import Batch, rounded_up, tensors
from mtp_spec.training.modules import new_modules
from mtp_spec.training.objective import Objective, draft_loss
from mtp_spec.training.texts import Corpus


class Noise:
    """Hidden states of a corpus: noise, and zeros behind a text."""

    def __init__(self, corpus: Corpus, width: int) -> None:
        self._rows = [torch.randn(text.length, width) for text in corpus.texts]

    def padded(self, numbers: Sequence[int], width: int) -> Tensor:
        out = torch.zeros(len(numbers), width, self._rows[0].shape[1])
        for place, number in enumerate(numbers):
            out[place, : len(self._rows[number])] = self._rows[number]
        return out


@pytest.mark.parametrize("bits", [1, 3, 5])
def test_rounding_up(bits: int) -> None:
    for number in range(1, 3000):
        found = rounded_up(number, bits)
        assert number <= found < number + max(1, number / 2 ** (bits - 1)) + 1e-9
        assert rounded_up(found, bits) == found
    assert len({rounded_up(number, bits) for number in range(1024, 2048)}) <= 2**bits


@pytest.mark.parametrize("lengths", [[3], [40, 37, 20], [20] * 33])
def test_padding_changes_neither_loss_nor_gradients(lengths: list[int], tmp_path: Path) -> None:
    corpus, depth, config = Corpus(tmp_path, 0.0), 3, open_checkpoint(DEMO).config
    for line, length in enumerate(lengths):
        corpus.add(
            "texts",
            line,
            [(line + 7 * i) % 90 for i in range(length)],
            [(1, length // 2), (length // 2 + 1, length)],
            "a",
        )
    torch.manual_seed(0)
    modules: Any = new_modules(config, 64, 1, 0, "cpu")
    table = rope_table(config, 64, "cpu")
    shared = [torch.randn(config.vocab_size, config.hidden_size) for _ in range(2)]
    forward = ModulesForward(list(modules), *shared, lambda length: table)
    states: Any = Noise(corpus, config.hidden_size)
    found = list[tuple[Tensor, list[Tensor]]]()
    for pad in (False, True):
        batch = tensors(corpus, states, range(len(lengths)), depth, pad)
        check(batch, len(lengths))
        outcome = draft_loss(forward, Objective.of("kl,tv", depth, 0.8), *batch[:3], chosen=batch.chosen)
        outcome.loss.backward()
        gradients = [parameter.grad for parameter in modules.parameters() if parameter.grad is not None]
        found.append((torch.cat((outcome.loss[None], outcome.rows, outcome.greedy, outcome.overlap)), gradients))
        modules.zero_grad(set_to_none=True)
    torch.testing.assert_close(found[0][0], found[1][0])
    assert len(found[0][1]) > 5
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    corpus.close()


def check(batch: Batch, texts: int) -> None:
    """Rows that count are chosen once; padding has no weight."""
    weights = batch.weights.flatten()
    counted = batch.chosen[weights[batch.chosen] > 0]
    assert counted.tolist() == weights.nonzero().flatten().tolist()
    assert not batch.weights[texts:].any()
    assert weights[-1] == 0
    assert batch.ids.shape == batch.weights.shape == batch.hidden.shape[:2]
