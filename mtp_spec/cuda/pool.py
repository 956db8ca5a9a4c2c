"""A pool of cache pages, and the work that is captured on them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from mtp_spec.cuda.group import Group
from mtp_spec.cuda.kinds import Kind
from mtp_spec.cuda.memory import check_room, group_bytes, has_room, logits_bytes, pages_bytes
from mtp_spec.cuda.pages import DevicePages, step_rows
from mtp_spec.cuda.prefill import Reader
from mtp_spec.cuda.runtime import DeviceRuntime

# idle groups are kept, with the steps that were captured for them, while there are no more than GROUPS of them or they
# have no more than SLOTS slots together: capturing a kind again takes as long as writing a text
GROUPS, SLOTS = 8, 64


class Pool:
    """Cache pages and the work captured on them; a reader or group is taken out of the pool while in use."""

    def __init__(self, runtime: DeviceRuntime, total: int, most: int) -> None:
        model, tokens = runtime.model, runtime.max_context
        if model.device.type == "cuda":
            what = f"A batch of {most} sequences" if most > 1 else "A sequence beside others"
            check_room(pages_bytes(model, tokens, most, total), model.device, what)
        self.runtime, self.most, self.pages = runtime, most, DevicePages(model, tokens, total, most)
        self._logits: Tensor | None = None  # of the steps of all groups, which run one after another
        self._readers, self._groups = deque[Reader](), deque[Group]()
        self.known = list[Group]()  # all groups, in use or not
        self._whole = set[Kind]()  # kinds that have a group of the full batch size

    def reader(self) -> Reader:
        """Takes out a reader."""
        return self._readers.pop() if self._readers else Reader(self.runtime, self.pages)

    def group(self, kind: Kind, shared: bool) -> Group:
        """Takes out a group without sequences.

        Args:
            shared: it must have slots for the full batch; else one slot is enough.
        """
        least = self.most if shared and kind.shared else 1
        group = next((one for one in self._groups if one.kind == kind and one.most >= least), None)
        if group is not None:
            self._groups.remove(group)
            group.clear()
            return group
        if kind.shared and kind not in self._whole:  # later sequences will share it
            least = self.most
        logits = self._room(least)
        if kind.shared and least == self.most:
            self._whole.add(kind)
        self.known.append(Group(self.runtime, self.pages, kind, least, logits))
        return self.known[-1]

    def give_back(self, reader: Reader | None, groups: Seq[Group]) -> None:
        """Takes back what is no longer used; the garbage collector may call this at any point."""
        if reader is not None:
            self._readers.append(reader)
        self._groups.extend(groups)

    def _room(self, slots: int) -> Tensor:
        """Returns the buffer of steps' logits, after dropping idle groups that a new one of so many slots takes the
        place of: those that have been idle longest.

        Raises:
            MTPSpecError: there is no memory for a group beside those that are in use.
        """
        model = self.runtime.model
        needed = group_bytes(model, slots) + (logits_bytes(model, self.most) if self._logits is None else 0)
        cuda = model.device.type == "cuda"
        while len(self._groups) >= GROUPS and sum(one.most for one in self._groups) + slots > SLOTS:
            self._drop()
        while cuda and self._groups and not has_room(needed, model.device):
            self._drop()
        if cuda:
            check_room(needed, model.device, f"A step of {slots} sequences")
        if self._logits is None:
            size = step_rows(self.most), model.config.vocab_size
            self._logits = torch.empty(size, dtype=torch.float32, device=model.device)
        return self._logits

    def _drop(self) -> None:
        oldest = self._groups.popleft()
        self._whole.discard(oldest.kind)
        self.known.remove(oldest)
        self.runtime.forget(oldest)
