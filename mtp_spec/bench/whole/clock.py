"""Times work that all ranks do together: as CUDA graphs, or on a CPU to check that the program runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from time import perf_counter
from typing import Any

import torch

from mtp_spec.bench.timing import copy_rate, graph_time, kernel_times, read_rate
from mtp_spec.model.distributed.group import Ranks

CPU_REPEATS, CPU_BYTES = 3, 2**26
EMPTY_LAUNCHES = 200


@dataclass
class Clock:
    """Times work on this rank's device; all ranks must call it for the same work."""

    ranks: Ranks
    device: torch.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def micro(self, work: Callable[[], Any]) -> float:
        """Returns the median microseconds of work on this rank."""
        if self.on_gpu:
            return graph_time(work, settle=self.settle)
        taken = []
        for _ in range(CPU_REPEATS):
            start = perf_counter()
            work()
            taken.append(1e6 * (perf_counter() - start))
        return median(taken)

    def slowest(self, work: Callable[[], Any]) -> float:
        """Returns the median microseconds of work on the rank that takes longest."""
        return max(self.each(work))

    def each(self, work: Callable[[], Any]) -> list[float]:
        """Returns the median microseconds of work on every rank."""
        return [float(one) for one in self.ranks.everyone(self.micro(work))]

    def settle(self) -> None:
        """Waits until the device has ended its work, as long as all ranks are alive: a rank that dies in an exchange
        ends the others."""
        if self.on_gpu:
            self.ranks.wait()
            torch.cuda.synchronize()

    def launches(self, work: Callable[[], Any]) -> int | None:
        """Returns the number of kernels that work launches, or None on a CPU."""
        return sum(count for count, _ in kernel_times(work).values()) if self.on_gpu else None

    @cached_property
    def launch(self) -> float:
        """Microseconds of a launch that computes next to nothing, in a graph of launches that follow each other."""
        x = torch.zeros(1, device=self.device)

        def run() -> None:
            for _ in range(EMPTY_LAUNCHES):
                x.add_(1.0)

        return self.micro(run) / EMPTY_LAUNCHES

    def rates(self) -> tuple[float, float]:
        """Returns the TB/s of reading and of copying, the slowest rank's."""
        if self.on_gpu:
            found = self.ranks.everyone([read_rate(), copy_rate()])
            torch.cuda.empty_cache()
        else:
            source = torch.ones(CPU_BYTES // 4)
            found = self.ranks.everyone([CPU_BYTES / self.micro(source.sum) / 1e6,
                                         2 * CPU_BYTES / self.micro(source.clone) / 1e6])  # fmt: skip
        return min(float(read) for read, _ in found), min(float(copy) for _, copy in found)

    def peak(self) -> int | None:
        """Returns the most bytes allocated since `forget_peak`, or None on a CPU."""
        return torch.cuda.max_memory_allocated() if self.on_gpu else None

    def forget_peak(self) -> None:
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
