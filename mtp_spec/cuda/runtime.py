"""Shared by all sequences of a model on a GPU: a lock, and a cache of captured work."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar, cast

from mtp_spec.cuda.graphs import Graphs
from mtp_spec.cuda.lock import FairLock
from mtp_spec.cuda.state import State, prefill_rows
from mtp_spec.cuda.step import Prefill
from mtp_spec.model.cuda.model import DeviceModel

# most captured steps, passes and shape tables; there are some for every batch size
KEPT = 256
T = TypeVar("T")


class DeviceRuntime:
    """The captured work of a loaded model.

    Args:
        max_context: most tokens of prompt and generated text.
    Attributes:
        lock: held during all use of the GPU.
        graphs: None with the kernels' reference versions, which run on a CPU.
    """

    def __init__(self, model: DeviceModel, max_context: int) -> None:
        self.model, self.max_context, self.lock = model, max_context, FairLock()
        self.graphs = Graphs(model.device) if model.device.type == "cuda" else None
        self._kept: dict[Hashable, object] = {}

    def kept(self, key: Hashable, make: Callable[[], T]) -> T:
        """Returns the object cached under a key, or makes it; beyond `KEPT` the least recently used is dropped."""
        found = self._kept.pop(key, None)
        if found is None:
            found = make()
            while len(self._kept) >= KEPT:
                self._kept.pop(next(iter(self._kept)))
        self._kept[key] = found  # the most recent last
        return cast(T, found)

    def forget(self, owner: object) -> None:
        """Drops all objects whose key begins with `owner`."""
        self._kept = {key: kept for key, kept in self._kept.items()
                      if not (isinstance(key, tuple) and key[0] is owner)}  # fmt: skip

    def prefill(self, owner: object, state: State, tokens: int, first: int, draft: bool) -> Prefill:
        """Returns the pass for the next prefill chunk, captured if there is a GPU and room for its padding.

        Args:
            owner: of the state, for `forget`.
        """
        left = tokens - first
        rows = prefill_rows(left)
        if self.graphs is None or first + rows > state.caches[0].capacity:
            return Prefill(self.model, state, min(left, rows), draft)
        graphs = self.graphs
        return self.kept((owner, rows, draft), lambda: Prefill(self.model, state, rows, draft, graphs))
