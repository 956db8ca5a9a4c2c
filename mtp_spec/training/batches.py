"""Which texts a step trains on: a function of the seed and the step's number alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtp_spec.training.backbone import States
from mtp_spec.training.texts import Corpus

WINDOW = 64  # texts of so many batches are sorted by length, so that little is padded
WIDTH_BITS = 4  # leading bits of a padded width: 8 widths from a power of two to the next, about 3 % of padding
ROW_SHARES = 16  # numbers of trained rows, of all that a shape has


@dataclass(frozen=True, slots=True)
class Shapes:
    """The few shapes that batches are padded to where each is captured as a CUDA graph.

    Attributes:
        tokens: most of a batch, padding included, but for one long text.
        depth: places behind a text.
        longest: tokens of the longest text: no width needs more angles of positions than it does.
    """

    tokens: int
    depth: int
    longest: int

    def width(self, length: int) -> int:
        """Returns the places of each text of a batch whose longest one has so many tokens."""
        wanted = length + self.depth
        unit = 1 << max(0, wanted.bit_length() - WIDTH_BITS)
        return min(_multiple(wanted, unit), self.longest + self.depth)

    def full(self, width: int) -> int:
        """Returns the texts of a full batch."""
        return max(1, self.tokens // width)

    def texts(self, own: int, width: int) -> int:
        """Returns the texts that a batch of `own` is padded to: a full one's, or, at a window's end, a power of 2."""
        return min(self.full(width), 1 << (own - 1).bit_length())

    def rows(self, own: int, places: int) -> int:
        """Returns the rows that `own` trained ones are padded to, of so many places."""
        return min(places, _multiple(max(1, own), -(-places // ROW_SHARES)))


class Batches:
    """The batches of each pass over the texts.

    Args:
        corpus: the texts.
        numbers: of the texts to use.
        tokens: most tokens of a batch, padding included; a longer text is a batch by itself.
        seed: of their order.
        shapes: those that batches will be padded to, if they will.
    """

    def __init__(
        self, corpus: Corpus, numbers: Sequence[int], tokens: int, seed: int, shapes: Shapes | None = None
    ) -> None:
        self._numbers, self._tokens, self._seed, self._shapes = np.asarray(numbers), tokens, seed, shapes
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

    def _most(self, length: int) -> int:
        """Returns how many texts of up to so many tokens a batch has."""
        shapes = self._shapes
        return max(1, self._tokens // length) if shapes is None else shapes.full(shapes.width(length))

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
                if batch and len(batch) >= self._most(int(self._lengths[place])):
                    batches.append(batch)
                    batch = []
                batch.append(int(self._numbers[place]))
            batches.append(batch)
        self._epoch, self._order = epoch, [batches[place] for place in random.permutation(len(batches))]


class Batch(NamedTuple):
    """A step's texts, as `draft_loss` takes them; padding has no weight.

    Attributes:
        ids: `[B, T]`.
        hidden: `[B, T, D]` of the main model, zero behind a text.
        weights: `[B, T]`.
        chosen: `[N]` places of the weights that are not 0, known without waiting for the device; of a padded batch
            followed by other places.
        lengths: `[B]` tokens of the texts; 0 for padding.
    """

    ids: Tensor
    hidden: Tensor
    weights: Tensor
    chosen: Tensor
    lengths: Tensor


def tensors(
    corpus: Corpus, states: States, numbers: Sequence[int], depth: int, shapes: Shapes | None = None
) -> Batch:  # fmt: skip
    """Returns the batch of texts, on the device of the states, padded to one of the shapes if they are given."""
    texts = [corpus.texts[number] for number in numbers]
    longest = max(text.length for text in texts)
    width = longest + depth if shapes is None else shapes.width(longest)
    count = len(texts) if shapes is None else shapes.texts(len(texts), width)
    hidden = states.padded(numbers, width, count)
    pinned = hidden.device.type == "cuda"
    ids = torch.zeros(count, width, dtype=torch.int64, pin_memory=pinned)
    weights = torch.zeros(count, width, dtype=torch.float32, pin_memory=pinned)
    for own, weight, text in zip(ids.numpy(), weights.numpy(), texts, strict=False):
        own[: text.length] = corpus.ids(text)
        for begin, end in text.answers:
            weight[begin - 1 : end - 1] = 1
    chosen = weights.flatten().nonzero().squeeze(1)
    if shapes is not None:
        # places of their own: gradients of rows that were chosen twice would be sorted and summed one by one
        rest = shapes.rows(len(chosen), weights.numel()) - len(chosen)
        chosen = torch.cat((chosen, (weights.flatten() == 0).nonzero().squeeze(1)[:rest]))
    lengths = torch.tensor([text.length for text in texts] + [0] * (count - len(texts)))
    given = (chosen.pin_memory(), lengths.pin_memory()) if pinned else (chosen, lengths)
    return Batch(*(part.to(hidden.device, non_blocking=True) for part in (ids, hidden, weights, *given)))


def _multiple(number: int, unit: int) -> int:
    """Returns the least multiple of a unit from `number` on."""
    return -(-number // unit) * unit
