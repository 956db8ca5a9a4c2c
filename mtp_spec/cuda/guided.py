"""Guided sequences: a grammar, logits processor or `min_new_tokens` on the host decides which tokens are allowed.

A step is captured as three graphs: draft, verify, accept. The drafts ignore the guidance, because they are drawn before
the host has seen the token that they follow. While the GPU verifies them, they are copied to the host, which works out
for every node, along its own path, which tokens may follow, and sends that before the target's rows are sampled. So the
text is the same as in plain decoding, whatever the rule: a forbidden draft has probability 0 under the target, and the
rule is given the distribution that the draft was really drawn from. The host waits once in a step, and by then has the
tokens of the previous one.

A grammar and `min_new_tokens` only remove tokens: one bit for each token is sent to the GPU. A logits processor is
Python code that works on rows: after verification they are copied to the host and sent back changed.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtp_spec.cuda.constants import Constants
from mtp_spec.cuda.kinds import Guided
from mtp_spec.cuda.sequence import DeviceSequence
from mtp_spec.kernels.sampler import Stages
from mtp_spec.tree import ROOT
from mtp_spec.tree_shape import TreeShape

if TYPE_CHECKING:
    from mtp_spec.cuda.state import State
    from mtp_spec.cuda.step import Step


class Guide:
    """Guides the steps of a range of slots.

    Args:
        rows: most rows of a step.
        guided: what is sent, see `kinds.Kind`.
    Attributes:
        masks: `[rows, ceil(V / 8)]` uint8 on the device, bits of the allowed tokens; None if rows are sent instead.
    """

    def __init__(self, device: torch.device, rows: int, vocabulary: int, guided: Guided) -> None:
        pinned, self.masks = device.type == "cuda", None
        if guided == "masks":
            self._room = torch.empty(rows, -(-vocabulary // 8), dtype=torch.uint8, pin_memory=pinned)
            self.masks = torch.full(self._room.shape, 255, dtype=torch.uint8, device=device)
        else:
            self._room = torch.empty(rows, vocabulary, dtype=torch.float32, pin_memory=pinned)
        self._ids = torch.empty(rows, dtype=torch.int64, pin_memory=pinned)
        self._arrived: torch.cuda.Event | None = None

    def begin(self, step: Step) -> None:
        """Launches draft and verify; the host does not wait."""
        step.run("draft")
        self._ids[: len(step.ids)].copy_(step.ids, non_blocking=True)
        if self.masks is not None:
            self._mark()
        step.run("verify")
        if self.masks is None:
            self._room[: len(step.ids)].copy_(step.logits, non_blocking=True)
            self._mark()

    def end(
        self, step: Step, sequences: Seq[DeviceSequence], wait: Callable[[torch.cuda.Event | None], None]
    ) -> list[tuple[DeviceSequence, Exception]]:
        """Computes the guidance and launches accept; returns the sequences that failed, with unguided rows.

        Args:
            sequences: of the first slots; all their tokens before this step have been committed.
        """
        wait(self._arrived)
        shape, failed = step.shape, list[tuple[DeviceSequence, Exception]]()
        count = len(step.ids)
        room, ids = self._room[:count], self._ids[:count].view(-1, shape.rows).tolist()
        if self.masks is not None:
            room.fill_(255)
        for slot, sequence in enumerate(sequences):
            if sequence.core.state is not sequence or not sequence.core.alive:  # its tokens are not read any more
                continue
            own = room[slot * shape.rows : (slot + 1) * shape.rows].numpy()
            try:
                with sequence.core.stats.phase("sample"):
                    guide_rows(sequence, shape, ids[slot], own)
            except Exception as error:
                failed.append((sequence, error))
        target = step.logits if self.masks is None else self.masks[:count]
        target.copy_(room, non_blocking=True)
        step.run("accept")
        return failed

    def _mark(self) -> None:
        if self._ids.is_pinned():
            self._arrived = torch.cuda.Event()
            self._arrived.record()


def guide_rows(sequence: DeviceSequence, shape: TreeShape, ids: Seq[int], rows: npt.NDArray[Any]) -> None:
    """Writes the guidance of each node of a verified tree; forbidden nodes keep their rows.

    If the guidance of a draft fails, no token is allowed after it and the error is kept, because the draft may not be
    reached. An error at the root is raised.

    Args:
        ids: of the rows, root first.
        rows: `[E, ceil(V / 8)]` uint8 masks, or `[E, V]` float32 rows of the model.
    """
    assert sequence.history is not None
    sampler, paths, masks = sequence.sampler, {ROOT: sequence.history}, rows.dtype == np.uint8
    sequence.errors.clear()
    for row, token in enumerate(ids):
        node = row - 1
        if node != ROOT:
            parent = shape.parents[node]
            if parent not in paths or not _may_follow(rows[parent + 1], token):
                continue
            paths[node] = paths[parent].child(token)
        try:
            if masks:
                rows[row] = sampler.mask(paths[node])[: rows.shape[1]]
            else:
                rows[row] = sampler.guided(torch.from_numpy(rows[row]), paths[node]).numpy()
        except Exception as error:
            if node == ROOT:
                raise
            rows[row], sequence.errors[row] = (0 if masks else -np.inf), error


def guide_first(sequence: DeviceSequence, logits: Tensor, state: State, constants: Constants) -> Tensor:
    """Returns a prompt's last row `[1, V]`, guided; to be sampled with the `remaining` stages."""
    assert sequence.history is not None
    if sequence.kind.guided == "masks":
        mask = state.sent(sequence.sampler.mask(sequence.history)[None], torch.uint8)
        return masked(logits.clone(), mask, constants)
    return state.sent(sequence.sampler.guided(logits[0].cpu(), sequence.history).numpy()[None], torch.float32)


def remaining(stages: Stages, guided: Guided | None) -> Stages:
    """Returns the sampling stages that still apply to the target's rows."""
    return replace(stages, bias=False, penalty=False) if guided == "rows" else stages


def masked(logits: Tensor, masks: Tensor, constants: Constants) -> Tensor:
    """Removes tokens that masks `[M, >= V / 8]` forbid from logits `[M, V]`, in place; NaN and infinity stay."""
    bits = (masks[:, :, None] >> constants.bytes(range(8))) & 1
    lacking = (bits == 0).flatten(1)[:, : logits.shape[1]]
    return logits.masked_fill_(lacking & (logits < torch.inf), -torch.inf)


def _may_follow(row: npt.NDArray[Any], token: int) -> bool:
    if row.dtype == np.uint8:
        return bool(row[token // 8] >> (token % 8) & 1)
    return bool(row[token] > -np.inf)
