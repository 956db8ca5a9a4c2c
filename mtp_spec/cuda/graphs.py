"""CUDA graphs: work that is captured once and then replayed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch

_lock, _captures = Lock(), 0
_collects = True  # whether Python collected garbage before the first of the captures underway


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any = None, stream: torch.cuda.Stream | None = None) -> Iterator[None]:
    """Captures what this thread launches within into a graph.

    Other threads may use the GPU meanwhile: the user's, that of another model, the communication library's. Python
    collects no garbage: that could be a model that is used no more, and to free its graphs is forbidden to a thread
    that captures, and would spoil the capture.
    """
    global _captures, _collects
    with _lock:
        if not _captures:
            _collects = gc.isenabled()
        _captures += 1
        gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield
    finally:
        with _lock:
            _captures -= 1
            if not _captures and _collects:
                gc.enable()


class Graphs:
    """Captures work into CUDA graphs that share one memory pool.

    This is safe because they run one after another on one stream, and results in a graph's memory are read before the
    next graph is launched: whatever has to last longer is in a `State`.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], None], ran: bool = False) -> Callable[[], None]:
        """Returns the replay of work from a CUDA graph.

        Args:
            ran: whether the work has run before; else it first runs once, to compile kernels.
        """
        if not ran:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                work()
            torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, self._pool, self._stream):
            work()
        return graph.replay

    def later(self, work: Callable[[], None]) -> Callable[[], None]:
        """Returns a function that runs work at the first call, captures it at the second, and then replays it."""
        replay: Callable[[], None] | None = None
        ran = False

        def run() -> None:
            nonlocal replay, ran
            if not ran:
                work()
                ran = True
                return
            if replay is None:
                replay = self.capture(work, ran=True)
            replay()

        return run
