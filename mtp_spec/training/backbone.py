"""The frozen model's hidden states, from the library's own passes over its own weights, and a cache of them on disk.

Legend: `T` tokens of a text, `D` hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtp_spec.kernels import mla
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.model.host import HostModel
from mtp_spec.training.texts import Corpus, Text

CHUNK = 256  # rows of a pass on a host
PASS_ROWS = 2048  # of a pass on a GPU


class Backbone:
    """Computes hidden states.

    Args:
        model: any loaded model; its MTP modules are not used.
        most: most tokens of a text.
    """

    def __init__(self, model: HostModel | DeviceModel, most: int) -> None:
        self.model, self.most = model, most
        self._device = _DeviceRows(model, most) if isinstance(model, DeviceModel) else None

    @torch.no_grad()
    def hidden(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Returns the normed hidden states `[T, D]` of each text, on the model's device."""
        if self._device is not None:
            return self._device.hidden(texts)
        assert isinstance(self.model, HostModel)
        return [self._of_host(self.model, text) for text in texts]

    def _of_host(self, model: HostModel, ids: Sequence[int]) -> Tensor:
        cache, parts = model.new_cache(len(ids)), list[Tensor]()
        for first in range(0, len(ids), CHUNK):
            chunk = ids[first : first + CHUNK]
            parts.append(model.rows(chunk, cache, range(-1, len(chunk) - 1)))
            cache.commit(range(len(chunk)))
        return torch.cat(parts)


class _DeviceRows:
    """Passes over several texts at once, or over a part of a long one."""

    def __init__(self, model: DeviceModel, most: int) -> None:
        self.model = model
        self.capacity = mla.whole_blocks(most)
        self.pages = max(PASS_ROWS, self.capacity) // mla.KEYS
        self.caches = mla.new_caches(len(model.layers), self.capacity, 0, model.layout, model.device, self.pages)

    def hidden(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
        out: list[Tensor] = [torch.empty(0)] * len(texts)
        while order:
            rows = mla.whole_blocks(len(texts[order[0]]))
            count = max(1, min(len(order), PASS_ROWS // rows))
            some, order = order[:count], order[count:]
            for number, hidden in zip(some, self._passes([texts[number] for number in some], rows), strict=True):
                out[number] = hidden
        return out

    def _passes(self, texts: Sequence[Sequence[int]], rows: int) -> list[Tensor]:
        """Returns the hidden states of texts of up to `rows` tokens, a whole number of blocks."""
        device, count = self.model.device, len(texts)
        ids = torch.zeros(count, rows, dtype=torch.int64)
        for number, text in enumerate(texts):
            ids[number, : len(text)] = torch.as_tensor(np.asarray(text, np.int64))
        blocks = rows // mla.KEYS
        pages = torch.zeros(count, self.capacity // mla.KEYS, dtype=torch.int32)
        pages[:, :blocks] = mla.KEYS * torch.arange(count * blocks, dtype=torch.int32).view(count, blocks)
        tokens, table, parts = ids.to(device), pages.to(device), list[Tensor]()
        for first in range(0, rows, PASS_ROWS):
            end = min(first + PASS_ROWS, rows)
            order = torch.arange(end - first, dtype=torch.int32, device=device)
            length = torch.full((count,), first, dtype=torch.int32, device=device)
            plan = mla.Plan(length, order, order, None, end - first - 1, 0, table)
            part = self.model.rows(tokens[:, first:end].flatten().contiguous(), self.caches, plan)
            parts.append(part.clone().unflatten(0, (count, end - first)))
        hidden = torch.cat(parts, 1)
        return [hidden[number, : len(text)] for number, text in enumerate(texts)]


class States:
    """The hidden states of a corpus, computed when they are first needed and then kept on disk while there is room.

    Nothing in the file outlasts a run: a row's bits do not depend on when it is computed.

    Args:
        backbone: computes them.
        corpus: the texts.
        file: where they are kept; None keeps none.
        room: most bytes of the file.
    """

    def __init__(self, backbone: Backbone, corpus: Corpus, file: Path | None, room: int) -> None:
        self.backbone, self.corpus = backbone, corpus
        self._width = backbone.model.config.hidden_size
        model = backbone.model
        self._dtype = model.dtype if isinstance(model, HostModel) else model.activations
        self._most = 0 if file is None else room // (self._width * self._dtype.itemsize)
        self._places: dict[int, int] = {}
        self._used, self._file = 0, file
        if file is not None and self._most:
            rows = min(self._most, corpus.tokens)
            with file.open("wb") as stream:
                stream.truncate(rows * self._width * self._dtype.itemsize)
            self._memory = torch.from_file(str(file), shared=True, size=rows * self._width, dtype=self._dtype)
            self._memory = self._memory.view(rows, self._width)

    @property
    def bytes(self) -> int:
        """Bytes of the file."""
        return min(self._most, self.corpus.tokens) * self._width * self._dtype.itemsize

    def of(self, numbers: Sequence[int]) -> list[Tensor]:
        """Returns the hidden states `[T, D]` of the texts with these numbers, on the model's device."""
        texts = [self.corpus.texts[number] for number in numbers]
        wanted = [at for at, number in enumerate(numbers) if number not in self._places]
        out: list[Tensor | None] = [self._kept(number, text) for number, text in zip(numbers, texts, strict=True)]
        computed = self.backbone.hidden([self.corpus.ids(texts[at]).tolist() for at in wanted]) if wanted else []
        for at, hidden in zip(wanted, computed, strict=True):
            out[at] = hidden
            self._keep(numbers[at], texts[at], hidden)
        return [hidden for hidden in out if hidden is not None]

    def _kept(self, number: int, text: Text) -> Tensor | None:
        place = self._places.get(number)
        if place is None:
            return None
        return self._memory[place : place + text.length].to(self.backbone.model.device)

    def _keep(self, number: int, text: Text, hidden: Tensor) -> None:
        if self._used + text.length > min(self._most, self.corpus.tokens):
            return
        self._memory[self._used : self._used + text.length] = hidden.to("cpu", self._dtype)
        self._places[number] = self._used
        self._used += text.length
