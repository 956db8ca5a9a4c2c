"""The frozen model's hidden states, from its own weights, and a cache of them on disk.

On a host they are the very rows of generation; on a GPU whole texts are passed at once, and the states are those of
generation within the rounding of its activations (`model.cuda.widened`).

Legend: `T` tokens of a text, `D` hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.model.cuda.widened import WidenedForward
from mtp_spec.model.host import HostModel
from mtp_spec.training.texts import Corpus, Text

CHUNK = 256  # rows of a pass on a host
PASS_ROWS = 32768  # of a pass on a GPU, padding included


class Backbone:
    """Computes hidden states.

    Args:
        model: any loaded model; its MTP modules are not used.
    """

    def __init__(self, model: HostModel | DeviceModel) -> None:
        self.model = model
        self._whole = WidenedForward(model) if isinstance(model, DeviceModel) else None

    @torch.no_grad()
    def hidden(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Returns the normed hidden states `[T, D]` of each text, on the model's device."""
        if self._whole is not None:
            return self._of_device(self._whole, texts)
        assert isinstance(self.model, HostModel)
        return [self._of_host(self.model, text) for text in texts]

    def bytes(self, rows: int) -> tuple[int, int]:
        """Returns the memory of widened weights, and of passes for a batch of so many rows."""
        return (0, 0) if self._whole is None else (self._whole.bytes, self._whole.pass_bytes(min(rows, PASS_ROWS)))

    def _of_device(self, whole: WidenedForward, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Passes over texts of similar length, as many as fit into a pass."""
        order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
        out: list[Tensor] = [torch.empty(0)] * len(texts)
        while order:
            longest = len(texts[order[0]])
            count = max(1, min(len(order), PASS_ROWS // longest))
            some, order = order[:count], order[count:]
            ids = np.zeros((count, longest), np.int64)
            for row, number in zip(ids, some, strict=True):
                row[: len(texts[number])] = texts[number]
            hidden = whole.hidden(torch.from_numpy(ids).to(whole.model.device))
            for row, number in zip(hidden, some, strict=True):
                out[number] = row[: len(texts[number])]
        return out

    def _of_host(self, model: HostModel, ids: Sequence[int]) -> Tensor:
        cache, parts = model.new_cache(len(ids)), list[Tensor]()
        for first in range(0, len(ids), CHUNK):
            chunk = ids[first : first + CHUNK]
            parts.append(model.rows(chunk, cache, range(-1, len(chunk) - 1)))
            cache.commit(range(len(chunk)))
        return torch.cat(parts)


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

    def padded(self, numbers: Sequence[int], width: int) -> Tensor:
        """Returns the hidden states `[B, width, D]` of the texts with these numbers, zero behind their ends, on the
        model's device."""
        texts, device = [self.corpus.texts[number] for number in numbers], self.backbone.model.device
        wanted = [at for at, number in enumerate(numbers) if number not in self._places]
        # one copy to the device, which nothing waits for
        out = torch.zeros(len(texts), width, self._width, dtype=self._dtype, pin_memory=device.type == "cuda")
        for row, number, text in zip(out, numbers, texts, strict=True):
            place = self._places.get(number)
            if place is not None:
                row[: text.length] = self._memory[place : place + text.length]
        out = out.to(device, non_blocking=True)
        if wanted:
            computed = self.backbone.hidden([self.corpus.ids(texts[at]).tolist() for at in wanted])
            for at, hidden in zip(wanted, computed, strict=True):
                out[at, : len(hidden)] = hidden
            self._keep([(numbers[at], texts[at]) for at in wanted], computed)
        return out

    def _keep(self, texts: Sequence[tuple[int, Text]], computed: Sequence[Tensor]) -> None:
        room, some = min(self._most, self.corpus.tokens) - self._used, list[Tensor]()
        for (number, text), hidden in zip(texts, computed, strict=True):
            if text.length <= room:
                self._places[number] = self._used + sum(map(len, some))
                some.append(hidden)
                room -= text.length
        if some:
            whole = torch.cat(some)
            self._memory[self._used : self._used + len(whole)] = whole.to("cpu", self._dtype)
            self._used += len(whole)
