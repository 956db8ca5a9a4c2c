"""Which texts a step trains on: a function of the seed and the step's number alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtp_spec.training.backbone import States
from mtp_spec.training.texts import Corpus

# padded sizes of batches: so many leading bits are kept, so that there are few: tokens of a text, texts, trained rows
WIDTHS, COUNTS, ROWS = 5, 4, 3
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
    """A step's texts, as `draft_loss` takes them; padding has no weight.

    Attributes:
        ids: `[B, T]`.
        hidden: `[B, T, D]` of the main model.
        weights: `[B, T]`.
        chosen: `[N]` places of the weights that are not 0, known without waiting for the device; on a GPU followed by
            some of weight 0.
    """

    ids: Tensor
    hidden: Tensor
    weights: Tensor
    chosen: Tensor


def tensors(corpus: Corpus, states: States, numbers: Sequence[int], depth: int, pad: bool = False) -> Batch:
    """Returns the batch of texts, on the device of the states.

    Args:
        pad: up to one of few shapes, with more padding, the last text again, and places of no weight.
    """
    texts = [corpus.texts[number] for number in numbers]
    width, own = max(text.length for text in texts) + depth, len(texts)
    width = rounded_up(width, WIDTHS) if pad else width
    hidden = states.padded(numbers, width)
    if pad:
        more = rounded_up(own, COUNTS) - own
        texts += texts[-1:] * more
        hidden = torch.cat((hidden, hidden[-1:].expand(more, -1, -1))) if more else hidden
    pinned = hidden.device.type == "cuda"
    ids = torch.zeros(len(texts), width, dtype=torch.int64, pin_memory=pinned)
    weights = torch.zeros(len(texts), width, dtype=torch.float32, pin_memory=pinned)
    for row, (line, weight, text) in enumerate(zip(ids.numpy(), weights.numpy(), texts, strict=True)):
        line[: text.length] = corpus.ids(text)
        for begin, end in text.answers if row < own else ():
            weight[begin - 1 : end - 1] = 1
    chosen = weights.flatten().nonzero().squeeze(1)
    if pad:
        last = ids.numel() - 1  # behind the last text
        chosen = torch.nn.functional.pad(chosen, (0, rounded_up(len(chosen), ROWS) - len(chosen)), value=last)
    chosen = chosen.pin_memory() if pinned else chosen
    return Batch(*(part.to(hidden.device, non_blocking=True) for part in (ids, hidden, weights, chosen)))


def rounded_up(number: int, bits: int) -> int:
    """Returns the least number from `number` on that has so many leading bits and then zeros."""
    unit = 1 << max(0, number.bit_length() - bits)
    return -(-number // unit) * unit
