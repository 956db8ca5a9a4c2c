"""Passes over long prompts: many rows of one or several prompts, through the model and its MTP modules.

Rows of all prompts share the products; attention runs for one prompt after another, so a pass has any number of rows of
each. Whole runs of a prompt's rows are attended in the expanded form (`kernels.mla.prompt`), the rest like generated
tokens. Such passes are long enough for the host to launch them kernel by kernel; nothing is captured.

Legend: `M` rows of all prompts, `D` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from mtp_spec.cuda.state import State
from mtp_spec.kernels import mla
from mtp_spec.model.cuda.model import DeviceModel

Send = Callable[[Sequence[object], torch.dtype], Tensor]


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of a prompt that a pass reads.

    Attributes:
        tokens: the prompt.
        first: number of the first token read.
        rows: how many are read.
        begun: slots that were filled by an earlier sequence.
    """

    tokens: Sequence[int]
    first: int
    rows: int
    begun: int = 0

    @property
    def end(self) -> int:
        """Number of the token after the last one read."""
        return self.first + self.rows

    @property
    def known(self) -> int:
        """Number of rows whose next token is in the prompt."""
        return min(self.end, len(self.tokens) - 1) - self.first


class Layout:
    """Where the pieces' rows are: in the pass, in the caches, and which are expanded.

    Args:
        pages: `[B, P]`, see `kernels.mla.Plan`; None for one sequence that has the caches to itself.
        send: copies numbers to the device.
    """

    def __init__(self, model: DeviceModel, pieces: Sequence[Piece], pages: Tensor | None, send: Send) -> None:
        self.pieces, self._pages = pieces, pages
        self.firsts = [0, *accumulate(piece.rows for piece in pieces)]
        self._ends = [model.expanded_rows(len(piece.tokens)) for piece in pieces]
        # a module's slots lag behind by one for each module before it
        self._starts = [[max(piece.first - module, piece.begun) for piece in pieces]
                        for module in range(max(1, len(model.mtp)))]  # fmt: skip
        self._lengths = send(self._starts, torch.int32)
        self._order = torch.arange(max(piece.rows for piece in pieces), dtype=torch.int32, device=model.device)

    def parts(self, rows: Tensor) -> list[Tensor]:
        """Returns each piece's rows of the pass."""
        return list(rows.split([piece.rows for piece in self.pieces]))

    def spans(self, module: int | None = None) -> mla.Spans:
        """Returns the rows' places in the caches of the main model, or of a module."""
        found, row = list[mla.Span](), module or 0
        for number, piece in enumerate(self.pieces):
            start, order = self._starts[row][number], self._order[: piece.rows]
            pages = None if self._pages is None else self._pages[number : number + 1]
            length = self._lengths[row, number : number + 1]
            plan = mla.Plan(length, order, order, None, piece.rows - 1, 0 if module is None else module + 1, pages)
            expanded = min(max(0, self._ends[number] - start), piece.rows)
            found.append(mla.Span(self.firsts[number], start, plan, expanded))
        return tuple(found)

    def lacking(self, number: int, module: int) -> int:
        """Returns how many first rows of a piece have no slot in a module's cache."""
        return self._starts[module][number] - (self.pieces[number].first - module)


def read_pieces(model: DeviceModel, state: State, pieces: Sequence[Piece], drafts: bool) -> Tensor:
    """Reads pieces of prompts, one for each sequence of a state; returns the hidden states `[M, D]`.

    Args:
        drafts: whether the MTP modules run too.
    """
    layout = Layout(model, pieces, state.pages, state.sent)
    # as an array: torch takes more than twice as long for lists
    ids = [np.array(piece.tokens[piece.first : piece.end + 1], np.int64) for piece in pieces]
    given = [own[: piece.rows] for piece, own in zip(pieces, ids, strict=True)]
    # the token after the last is not known: its row is padding, whose slot is overwritten later
    after = [np.append(own[1:], own[-1:])[: piece.rows] for piece, own in zip(pieces, ids, strict=True)]
    tokens = state.sent(np.stack((np.concatenate(given), np.concatenate(after))), torch.int64)
    hidden = model.rows(tokens[0], state.caches, layout.spans())
    if drafts:
        feed_pieces(model, state, layout, tokens[1], hidden)
    return hidden


def feed_pieces(model: DeviceModel, state: State, layout: Layout, ids: Tensor, hidden: Tensor) -> None:
    """Runs the modules over the tokens ids `[M]` that follow rows with hidden states `[M, D]`; see `feed_modules`."""
    count = len(state.mtp_caches)
    for module, cache in enumerate(state.mtp_caches):
        given = list(zip(layout.parts(ids), layout.parts(hidden), strict=True))
        lacking = [layout.lacking(number, module) for number in range(len(given))]
        moved = [(_moved(own, by), _moved(rows, by)) for (own, rows), by in zip(given, lacking, strict=True)]
        own_ids, own_hidden = (torch.cat(parts) for parts in zip(*moved, strict=True))
        out = model.mtp_rows(module, own_ids, own_hidden, cache, layout.spans(module))
        if module + 1 == count:
            return
        following = []
        for number, (rows, by) in enumerate(zip(layout.parts(out), lacking, strict=True)):
            by = min(by, len(rows) - 1)
            back = torch.cat((rows[:1].expand(by, -1), rows[: len(rows) - by])) if by else rows
            shifted = torch.cat((state.carried[number, module : module + 1], back))
            following.append(shifted[:-1])
            state.carried[number, module] = shifted[layout.pieces[number].known]
        hidden = torch.cat(following)


def _moved(rows: Tensor, by: int) -> Tensor:
    """Returns rows without the first `by`, padded with the last one."""
    if not by:
        return rows
    by = min(by, len(rows) - 1)
    return torch.cat((rows[by:], rows[-1:].expand(by, *rows.shape[1:])))
