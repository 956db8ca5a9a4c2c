"""The frozen model's hidden states, from its own weights, and a cache of them on disk.

On a host they are the very rows of generation; on a GPU whole texts are passed at once, and the states are those of
generation within the rounding of its activations (`model.cuda.widened`).

Legend: `T` tokens of a text, `D` hidden size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
NEAR = 0.25  # share of a GPU's free memory that hidden states take
AHEAD = 4  # batches that wait to be written to the disk


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
        """Returns the normed hidden states `[T, D]` of each text, on the model's device, on a host in float32."""
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
            device = whole.model.device
            ids = torch.zeros(count, longest, dtype=torch.int64, pin_memory=device.type == "cuda")
            for row, number in zip(ids.numpy(), some, strict=True):
                row[: len(texts[number])] = texts[number]
            hidden = whole.hidden(ids.to(device, non_blocking=True))
            for row, number in zip(hidden, some, strict=True):
                out[number] = row[: len(texts[number])]
        return out

    def _of_host(self, model: HostModel, ids: Sequence[int]) -> Tensor:
        cache, parts = model.new_cache(len(ids)), list[Tensor]()
        for first in range(0, len(ids), CHUNK):
            chunk = ids[first : first + CHUNK]
            parts.append(model.rows(chunk, cache, range(-1, len(chunk) - 1)))
            cache.commit(range(len(chunk)))
        return torch.cat(parts).float()  # modules and head are, and torch may compute in 16 bits


class States:
    """The hidden states of a corpus, computed when they are first needed and then kept while there is room.

    A GPU's memory is filled first, then the disk. Nothing that is kept outlasts a run: a row's bits do not depend on
    when it is computed. No step waits for a copy: a thread writes to the disk what was computed.

    Args:
        backbone: computes them.
        corpus: the texts.
        file: where they are kept; None keeps none on disk.
        room: most bytes that are kept.
        near: so many of these at most in the memory of the model's device.
    """

    def __init__(self, backbone: Backbone, corpus: Corpus, file: Path | None, room: int, near: int = 0) -> None:
        self.backbone, self.corpus = backbone, corpus
        self._width, model = backbone.model.config.hidden_size, backbone.model
        self._dtype = torch.float32 if isinstance(model, HostModel) else model.activations
        size = self._width * self._dtype.itemsize
        most = min(room // size, corpus.tokens)
        rows = min(near // size, most)
        # one more row, of zeros, stands for padding
        self._near = torch.zeros(rows + 1 if rows else 0, self._width, dtype=self._dtype, device=model.device)
        self._most = {True: rows, False: 0 if file is None else most - rows}
        self._places: dict[int, tuple[bool, int]] = {}  # whether it is near, and its first row there
        self._used = {True: 0, False: 0}
        self._writer, self._written = ThreadPoolExecutor(1), deque[Future[None]]()
        if file is not None and (far := self._most[False]):
            with file.open("wb") as stream:
                stream.truncate(far * size)
            self._far = torch.from_file(str(file), shared=True, size=far * self._width, dtype=self._dtype)
            self._far = self._far.view(far, self._width)

    @property
    def bytes(self) -> int:
        """Bytes of the file."""
        return self._most[False] * self._width * self._dtype.itemsize

    @property
    def near_tokens(self) -> int:
        """Tokens whose states fit into the device's memory."""
        return self._most[True]

    @property
    def near_bytes(self) -> int:
        """Bytes in the device's memory."""
        return self._near.nbytes

    def padded(self, numbers: Sequence[int], width: int, count: int | None = None) -> Tensor:
        """Returns the hidden states `[B, width, D]` of the texts with these numbers, zero behind their ends, on the
        model's device; with `count`, zeros follow up to so many texts."""
        texts = [self.corpus.texts[number] for number in numbers]
        wanted = [at for at, number in enumerate(numbers) if number not in self._places]
        computed: list[Tensor] = []
        if wanted:
            computed = self.backbone.hidden([self.corpus.ids(texts[at]).tolist() for at in wanted])
            self._keep([(numbers[at], texts[at]) for at in wanted], computed)
        places = [self._places.get(number) for number in numbers]
        out = self._of_near(texts, places, width, len(texts) if count is None else count)
        for at, hidden in zip(wanted, computed, strict=True):
            place = places[at]
            if place is None or not place[0]:
                out[at, : len(hidden)] = hidden
        known = set(wanted)
        far = [(at, place[1]) for at, place in enumerate(places)
               if place is not None and not place[0] and at not in known]  # fmt: skip
        if far:
            self._settle(0)
            for at, first in far:
                own = self._far[first : first + texts[at].length]
                out[at, : len(own)] = _pinned(own) if out.is_cuda else own
        return out

    def _of_near(
        self, texts: Sequence[Text], places: Sequence[tuple[bool, int] | None], width: int, count: int
    ) -> Tensor:
        """Returns `[count, width, D]`: the rows that are near, and zeros elsewhere."""
        device = self._near.device
        if not any(place is not None and place[0] for place in places):
            return torch.zeros(count, width, self._width, dtype=self._dtype, device=device)
        rows = torch.full((count, width), len(self._near) - 1, pin_memory=device.type == "cuda")
        for own, text, place in zip(rows.numpy(), texts, places, strict=False):
            if place is not None and place[0]:
                own[: text.length] = np.arange(place[1], place[1] + text.length)
        found = self._near.index_select(0, rows.flatten().to(device, non_blocking=True))
        return found.view(count, width, self._width)

    def _keep(self, texts: Sequence[tuple[int, Text]], computed: Sequence[Tensor]) -> None:
        some: dict[bool, list[Tensor]] = {True: [], False: []}
        first = dict(self._used)
        for (number, text), hidden in zip(texts, computed, strict=True):
            fits = [near for near in (True, False) if self._used[near] + text.length <= self._most[near]]
            if fits:
                self._places[number] = fits[0], self._used[fits[0]]
                some[fits[0]].append(hidden)
                self._used[fits[0]] += text.length
        if some[True]:
            self._near[first[True] : self._used[True]] = torch.cat(some[True])
        if some[False]:
            whole, event = torch.cat(some[False]).to(self._dtype), None
            if whole.is_cuda:
                whole, event = _pinned(whole), torch.cuda.Event()
                event.record()
            self._settle(AHEAD)
            self._written.append(self._writer.submit(self._write, first[False], whole, event))

    def _write(self, first: int, whole: Tensor, event: torch.cuda.Event | None) -> None:
        if event is not None:
            event.synchronize()
        self._far[first : first + len(whole)] = whole

    def _settle(self, most: int) -> None:
        """Waits until no more than so many batches are still to be written."""
        while len(self._written) > most:
            self._written.popleft().result()


def near_bytes(device: torch.device) -> int:
    """Returns how many bytes of hidden states a device's memory should hold."""
    return int(NEAR * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0


def _pinned(x: Tensor) -> Tensor:
    """Returns a copy that a GPU's copies from and to a host need not wait for."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
