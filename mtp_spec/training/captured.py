"""Training steps on a GPU as CUDA graphs: a small module's step launches thousands of kernels that each take less time
than the host needs to launch them.

A graph has the shapes of one batch, so batches are padded to a few shapes (`batches.Shapes`). A shape's first batch is
launched as it is, at the second it is captured; from then on a batch is copied to the graph's inputs and replayed. What
is computed is the same. All graphs share the inputs and one pool of memory: only one of them runs at a time.

A step's memory is one piece, as large as the largest step so far: the pool's, and that of a step that is launched
beside it. Tensors are cut from it and it is joined again; pieces that had grown one by one would fit the tensors that
they were allocated for, and each larger shape would add a whole step's. For a step that does not fit, a larger pool is
begun, and what was captured is captured again.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from mtp_spec.cuda.graphs import capturing

ATTEMPTS = 2  # captures that may fail before no more are tried
SPARE = 1.02  # of the pool over the largest step: pieces are rounded up and leave gaps

Shape = tuple[tuple[int, ...], ...]  # of each input


@dataclass(slots=True)
class Graph:
    """A captured shape.

    Attributes:
        inputs: where its inputs are read.
        found: where its result is written.
    """

    replay: Callable[[], None]
    inputs: list[Tensor]
    found: Tensor


class CapturedSteps:
    """Runs steps on a GPU.

    Args:
        work: a step of some tensors on the GPU, which waits for nothing and keeps what it computes in tensors that stay
            where they are; returns what is told of it.
    Attributes:
        off: whether no more graphs are made, for want of memory or because capturing failed, of which a warning tells.
        most: bytes that torch held at most before its peaks were last reset, which a shape's first step does.
    """

    def __init__(self, work: Callable[..., Tensor], device: torch.device) -> None:
        self._work, self._device = work, device
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self._graphs: dict[Shape, Graph | None] = {}
        self._reserved: torch.cuda.CUDAGraph | None = None  # the pool lasts as long as a graph of it
        self._inputs: list[Tensor] = []
        self._failed = self._needed = self._held = self._size = 0
        self.off, self.most = False, 0

    @property
    def graphs(self) -> int:
        """How many shapes are captured."""
        return sum(graph is not None for graph in self._graphs.values())

    def __call__(self, *given: Tensor) -> Tensor:
        """Runs the step of these tensors; returns what `work` does."""
        # one stream for all: autograd remembers on which a parameter was first used
        outside = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            found = self._run(given)
        outside.wait_stream(self._stream)
        return found

    def forget(self) -> None:
        """Drops all graphs: the tensors that steps keep are no longer where they were."""
        torch.cuda.synchronize(self._device)
        self._graphs.clear()
        self._begin()  # torch may still hold the pool without graphs, in which it captures no more

    def _run(self, given: Sequence[Tensor]) -> Tensor:
        shape = tuple(tuple(part.shape) for part in given)
        if shape not in self._graphs:
            self._graphs[shape] = None
            return self._first(given)
        graph = self._graphs[shape] or self._captured(given, shape)
        if graph is None:
            return self._work(*given)
        for own, part in zip(graph.inputs, given, strict=True):
            own.copy_(part)
        graph.replay()
        return graph.found.clone()

    def _first(self, given: Sequence[Tensor]) -> Tensor:
        """Launches a shape's first step, and notes the memory that it needs."""
        # what the main model's passes have left is of no use to this stream, nor the other way round
        if self._free() > SPARE * self._needed:
            self._piece()
        self.most = max(self.most, torch.cuda.max_memory_reserved(self._device))
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        found = self._work(*given)
        self._needed = max(self._needed, torch.cuda.max_memory_allocated(self._device) - before)
        self._free()
        return found

    def _captured(self, given: Sequence[Tensor], shape: Shape) -> Graph | None:
        """Returns the graph of a shape, which has not run; None if there is none."""
        if self.off:
            return None
        if not self.graphs:  # what a cycle of references keeps of earlier passes belongs to another stream
            gc.collect()
        free = self._free()
        # beside the graphs' memory, which is as large as their largest step, the next new shape is launched
        wanted = self._needed + max(0, self._needed - self._held)
        if free < wanted:
            self._stop(f"{free / 1e9:.2f} GB of the GPU's memory are free and they need {wanted / 1e9:.2f}")
            return None
        if self._size < self._needed:
            self._begin()
        before = self._free()
        graph, inputs = torch.cuda.CUDAGraph(), self._room(given)
        try:
            if self._reserved is None:
                self._reserve()
            with capturing(graph, self._pool, self._stream):
                found = self._work(*inputs)
        except Exception as error:  # of any kind that torch and CUDA have for it
            self._failed, self._pool, self._reserved = self._failed + 1, torch.cuda.graph_pool_handle(), None
            if self._failed >= ATTEMPTS:
                self._stop(_line(error))
            return None
        self._held += max(0, before - self._free())
        self._graphs[shape] = made = Graph(graph.replay, inputs, found)
        return made

    def _begin(self) -> None:
        """Begins a pool that is large enough: what was captured before is captured again."""
        self._graphs = dict.fromkeys(self._graphs)
        self._pool, self._reserved = torch.cuda.graph_pool_handle(), None
        self._size, self._held = int(SPARE * self._needed), 0

    def _reserve(self) -> None:
        """Leaves the pool's memory to it as one piece, which a graph of nothing holds."""
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, self._pool, self._stream):
            self._piece()
        self._reserved = graph

    def _piece(self) -> None:
        """Leaves memory for a step to torch as one piece."""
        torch.empty(int(SPARE * self._needed) + 1, dtype=torch.uint8, device=self._device)[:1].zero_()

    def _free(self) -> int:
        """Returns the bytes of the GPU's memory that neither tensors nor graphs hold."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        free: int = torch.cuda.mem_get_info(self._device)[0]
        return free

    def _room(self, given: Sequence[Tensor]) -> list[Tensor]:
        """Returns inputs of these shapes in the memory that graphs share, or, if that is too small, in new memory."""
        if len(self._inputs) < len(given) or any(
            held.numel() < part.numel() for held, part in zip(self._inputs, given, strict=True)
        ):
            self._inputs = [part.new_zeros(part.numel() + part.numel() // 4) for part in given]
        return [held[: prod(part.shape)].view(part.shape) for held, part in zip(self._inputs, given, strict=True)]

    def _stop(self, why: str) -> None:
        self.off = True
        warnings.warn(
            f"no more CUDA graphs of training steps are made ({why}): others are launched kernel by kernel, which "
            "takes longer",
            stacklevel=2,
        )


def _line(error: BaseException) -> str:
    """Returns an error's first line, of the error that the capture ended for."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
