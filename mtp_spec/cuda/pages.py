"""Cache pages on a GPU for batched sequences, see `cache.pages`: one allocation for all layers.

A sequence's page numbers are in a row of a table on the device (`kernels.mla.Plan`), so that captured steps work for
changing sequences. After the pages every layer has a few idle ones: if a step was captured for more slots than there
are sequences, its unused slots write there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, pairwise

import numpy as np
import torch
from torch import Tensor

from mtp_spec.cache.pages import Lease, Pages
from mtp_spec.cuda.state import PREFILL_ROWS, ROWS, SLACK, WORK_ROWS, Mail
from mtp_spec.kernels import commit
from mtp_spec.kernels.mla import KEYS
from mtp_spec.model.cache import PAGE, pages_for
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.request import Request

# most rows and most sequences of a step's pass; if there are more, they step in several passes
STEP_ROWS, STEP_SEQUENCES = 512, 64
# rows of the table for streams in addition to the sequences that share steps
EXTRA_ROWS = 16
READ_SEQUENCES = 32  # most prompts in one prefill pass
LEASES = 16  # most leases that are prepared at once
IDLE_PAGES = pages_for(WORK_ROWS)  # an unused slot has one token
# most padding rows of the prefill pass over a prompt's end
PADDING = max(rows - smaller for smaller, rows in pairwise(PREFILL_ROWS)) - 1
assert PAGE == KEYS


class DevicePages(Pages["DeviceLease"]):
    """The pages of a loaded model.

    Args:
        tokens: most tokens of prompt and generated text.
        total: number of pages.
        most: most sequences that share steps.

    Attributes:
        caches: of all layers and the MTP modules.
        tables: `[most + EXTRA_ROWS + 1, P]` int32, the pages of each sequence in the form of `mla.Plan`; the last row,
            `idle_row`, is for unused slots.
    """

    def __init__(self, model: DeviceModel, tokens: int, total: int, most: int) -> None:
        super().__init__(total, len(model.mtp), expanded=model.expanded_rows)
        self.most = most
        self.caches = model.new_caches(tokens + SLACK, step_rows(most), total + IDLE_PAGES)
        self.idle_row, columns = most + EXTRA_ROWS, self.caches[0].capacity // KEYS
        self._rows = list(reversed(range(self.idle_row)))
        idle = torch.arange(total, total + columns).clamp_max(total + IDLE_PAGES - 1) * KEYS
        self.tables = idle.int().repeat(self.idle_row + 1, 1).to(model.device)
        self._new = dict[int, tuple[list[int], int]]()  # by row: the pages of a lease, and how many others share
        numbers = LEASES * (2 * columns + 1)
        self._inbox = torch.zeros(numbers, dtype=torch.int64, device=model.device)
        self._mail = Mail(numbers, model.device)

    def lease(self, prompt: Sequence[int], tokens: int, drafted: bool) -> DeviceLease | None:
        return super().lease(prompt, tokens, drafted) if self._rows else None

    def _leased(self, pages: list[int], shared: int, drafted: bool) -> DeviceLease:
        row = self._rows.pop()
        self._new[row] = pages, shared
        return DeviceLease(self, pages, shared, drafted, row)

    def prepare(self) -> None:
        """Zeroes the pages of all new leases and writes their rows of the table; call it before any of them is used."""
        while self._new:
            leases = dict(islice(self._new.items(), LEASES))
            own = [page for pages, shared in leases.values() for page in pages[shared:]]
            table = np.empty((len(leases), self.tables.shape[1]), dtype=np.int64)
            for line, (pages, _) in zip(table, leases.values(), strict=True):
                line[: len(pages)] = pages
                # entries past the end are only read for fully masked blocks; they point to a page of the sequence
                line[len(pages) :] = pages[-1]
            numbers = np.concatenate((own, [*leases], table.ravel() * KEYS))
            sent = self._inbox[: len(numbers)]
            self._mail.send(sent, numbers)
            zeroed, rows, lines = sent.split((len(own), len(leases), table.size))
            commit.clean(self.caches, zeroed)
            self.tables.index_copy_(0, rows, lines.view(table.shape).int())
            for row in leases:  # after an error above, the next call prepares them
                del self._new[row]

    def take_back(self, row: int) -> None:
        """Takes back the row of a sequence that has ended."""
        self._rows.append(row)

    def one(self, table: int) -> Tensor:
        """Returns a copy of a row of `tables`, `[1, P]`."""
        return self.tables[table : table + 1].clone()


class DeviceLease(Lease):
    """Pages of a sequence on a GPU.

    Attributes:
        row: of `DevicePages.tables`.
        slots: number of slots in its pages.
    """

    def __init__(self, store: DevicePages, pages: list[int], shared: int, drafted: bool, row: int) -> None:
        super().__init__(store, pages, shared, drafted)
        self.store, self.row, self.slots = store, row, len(pages) * PAGE

    def end(self) -> None:
        if self._pages:
            self.store.take_back(self.row)
        super().end()


def step_rows(max_batch: int) -> int:
    """Returns the most rows of a step's pass."""
    return min(STEP_ROWS, max_batch * ROWS)


def read_rows(max_batch: int) -> int:
    """Returns the most rows of a prefill pass that reads several prompts, see `prefill.Reader`."""
    return max(rows * min(max_batch, READ_SEQUENCES, STEP_ROWS // rows) for rows in PREFILL_ROWS)


def room_of(request: Request, max_context: int) -> int:
    """Returns the slots that a sequence may write to, by steps past its end and by padded prefill passes too."""
    return min(len(request.ids) + max(request.limit + SLACK, PADDING), max_context + SLACK)


def planned_pages(max_context: int, max_batch: int, cache_tokens: int | None = None) -> int:
    """Returns the number of pages; by default enough for the full context of every sequence."""
    return max_batch * pages_for(max_context + SLACK) if cache_tokens is None else pages_for(cache_tokens)
