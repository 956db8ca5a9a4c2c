"""Training steps on a GPU as CUDA graphs: a small module's step launches thousands of kernels that each take less time
than the host needs to launch them.

A graph has the shapes of one batch, so batches are padded to a few shapes (`batches.tensors`). A shape's first batch
runs as it is, the second is captured; a later one is copied to the graph's inputs and replayed. What is computed is the
same. All graphs share one pool of memory, the inputs and the gradients: only one of them runs at a time.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtp_spec.training.batches import Batch

PASSES = 2  # a graph's memory, and a pass beside it whose shape is new
ATTEMPTS = 2  # captures that may fail before steps are launched one kernel at a time

Shape = tuple[int, int, int]  # sequences, tokens, rows that are trained on


@dataclass(slots=True)
class Graph:
    """A captured shape.

    Attributes:
        batch: its inputs.
        found: its result.
    """

    replay: Callable[[], None]
    batch: Batch
    found: Tensor


class CapturedSteps:
    """Computes gradients of batches on a GPU.

    Args:
        work: computes the gradients of a batch, and returns what is told of it; waits for nothing.
        parameters: those that get gradients.
    Attributes:
        off: whether there is no room for graphs or they cannot be captured, of which a warning tells.
    """

    def __init__(
        self, work: Callable[[Batch], Tensor], parameters: Sequence[nn.Parameter], device: torch.device
    ) -> None:
        self._work, self._parameters = work, parameters
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self._graphs: dict[Shape, Graph | None] = {}
        self._gradients: list[Tensor] = []
        self._inputs: Batch | None = None
        self._failed = self._needed = 0
        self.off = False

    def __call__(self, batch: Batch) -> Tensor:
        """Leaves a batch's gradients in the parameters; returns what `work` does."""
        # one stream for all: autograd remembers on which a parameter was first used
        outside = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            found = self._computed(batch)
        outside.wait_stream(self._stream)
        return found

    def _computed(self, batch: Batch) -> Tensor:
        shape = (*batch.ids.shape, len(batch.chosen))
        if self.off or shape not in self._graphs:
            self._graphs[shape] = None
            return self._launched(batch)
        graph = self._graphs[shape] or self._captured(batch, shape)
        if graph is None:
            return self._launched(batch)
        for own, given in zip(graph.batch, batch, strict=True):
            own.copy_(given)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        graph.replay()
        return graph.found.clone()

    def _launched(self, batch: Batch) -> Tensor:
        before = torch.cuda.memory_allocated()
        found = self._work(batch)
        self._needed = max(self._needed, torch.cuda.max_memory_allocated() - before)
        return found

    def _captured(self, batch: Batch, shape: Shape) -> Graph | None:
        """Returns the graph of a batch's shape; None if there is no room, or it cannot be captured."""
        device = batch.ids.device
        if not self._gradients:  # what a cycle of references keeps of earlier passes belongs to another stream
            gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        if free < PASSES * self._needed:
            if not self._gradients:
                self._stop(f"{free / 1e9:.1f} GB of the GPU are free and {PASSES * self._needed / 1e9:.1f} are needed")
            return None
        inputs = self._room(batch)
        if not self._gradients:
            self._gradients = [torch.zeros_like(parameter) for parameter in self._parameters]
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                torch._foreach_zero_(self._gradients)
                found = self._work(inputs)
        except Exception as error:  # of any kind that torch and CUDA have for it
            self._failed, self._pool = self._failed + 1, torch.cuda.graph_pool_handle()
            if self._failed >= ATTEMPTS:
                self._stop(f"{type(error).__name__}: {error}")
            for parameter in self._parameters:
                parameter.grad = None
            return None
        self._graphs[shape] = made = Graph(graph.replay, inputs, found)
        return made

    def _room(self, batch: Batch) -> Batch:
        """Returns a batch of these shapes in the memory that all graphs' inputs share, or, if that is too small, in
        new memory."""
        if self._inputs is None or any(held.numel() < part.numel()
                                       for held, part in zip(self._inputs, batch, strict=True)):  # fmt: skip
            self._inputs = Batch(*(part.new_zeros(part.numel() + part.numel() // 4) for part in batch))
        return Batch(*(held[: part.numel()].view(part.shape)
                       for held, part in zip(self._inputs, batch, strict=True)))  # fmt: skip

    def _stop(self, why: str) -> None:
        self.off = True
        warnings.warn(
            f"training steps are launched kernel by kernel, which takes longer: no CUDA graph ({why})", stacklevel=2
        )
