"""Which texts a step trains on: a function of the seed and the step's number alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtp_spec.training.backbone import States
from mtp_spec.training.texts import Corpus

WINDOW = 64  # texts of so many batches are sorted by length, so that little is padded


class Batches:
    """The batches of each pass over the texts.

    Args:
        corpus: the texts.
        numbers: of the texts to use.
        tokens: most tokens of a batch, padding included; a longer text is a batch by itself.
        seed: of their order.
    """

    def __init__(self, corpus: Corpus, numbers: Sequence[int], tokens: int, seed: int) -> None:
        self._numbers, self._tokens, self._seed = np.asarray(numbers), tokens, seed
        self._lengths = np.array([corpus.texts[number].length for number in numbers])
        self._epoch, self._order, self._counts = -1, list[list[int]](), list[int]()

    def count(self, epoch: int) -> int:
        """Returns the number of batches of a pass; passes differ by a few."""
        while len(self._counts) <= epoch:
            self._pass(len(self._counts))
            self._counts.append(len(self._order))
        return self._counts[epoch]

    def of(self, step: int) -> list[int]:
        """Returns the numbers of a step's texts."""
        epoch, at = 0, step
        while at >= self.count(epoch):
            at -= self.count(epoch)
            epoch += 1
        self._pass(epoch)
        return self._order[at]

    def _pass(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        random = np.random.default_rng((self._seed, epoch))
        order = random.permutation(len(self._numbers))
        window = max(1, round(WINDOW * self._tokens / max(1, self._lengths.mean())))
        batches: list[list[int]] = []
        for first in range(0, len(order), window):
            part = order[first : first + window]
            batch: list[int] = []
            for place in part[np.argsort(self._lengths[part], kind="stable")]:
                if batch and (len(batch) + 1) * self._lengths[place] > self._tokens:
                    batches.append(batch)
                    batch = []
                batch.append(int(self._numbers[place]))
            batches.append(batch)
        self._epoch, self._order = epoch, [batches[place] for place in random.permutation(len(batches))]


class Batch(NamedTuple):
    """A step's texts, as `draft_loss` takes them.

    Attributes:
        ids: `[B, T]`.
        hidden: `[B, T, D]` of the main model.
        weights: `[B, T]`.
        chosen: `[N]` places of the weights that are not 0, known without waiting for the device.
    """

    ids: Tensor
    hidden: Tensor
    weights: Tensor
    chosen: Tensor


def tensors(corpus: Corpus, states: States, numbers: Sequence[int], depth: int) -> Batch:
    """Returns the batch of texts, on the device of the states."""
    texts = [corpus.texts[number] for number in numbers]
    width = max(text.length for text in texts) + depth
    hidden = states.padded(numbers, width)
    pinned = hidden.device.type == "cuda"
    ids = torch.zeros(len(texts), width, dtype=torch.int64, pin_memory=pinned)
    weights = torch.zeros(len(texts), width, dtype=torch.float32, pin_memory=pinned)
    for own, weight, text in zip(ids.numpy(), weights.numpy(), texts, strict=True):
        own[: text.length] = corpus.ids(text)
        for begin, end in text.answers:
            weight[begin - 1 : end - 1] = 1
    chosen = weights.flatten().nonzero().squeeze(1)
    chosen = chosen.pin_memory() if pinned else chosen
    return Batch(*(part.to(hidden.device, non_blocking=True) for part in (ids, hidden, weights, chosen)))
