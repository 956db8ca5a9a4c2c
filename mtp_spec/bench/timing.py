"""Timing on a GPU: work captured in a graph, the median of its replays."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mtp_spec.cuda.graphs import capturing

CACHE_BYTES = 256 * 2**20  # several times the L2 cache
REPLAYS = 15


def copy_rate() -> float:
    """Returns TB/s of a device-to-device copy of 2 GiB, bytes read and written."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / graph_time(lambda: target.copy_(source)) / 1e6


def read_rate() -> float:
    """Returns the TB/s at which one kernel reads 2 GiB; a copy is up to 1.7 times slower."""
    source = torch.ones(2**29, device="cuda")
    return source.nbytes / graph_time(lambda: source.sum()) / 1e6


def graph_time(
    work: Callable[[], Any], replays: int = REPLAYS, settle: Callable[[], None] = torch.cuda.synchronize
) -> float:
    """Returns the median microseconds of one replay; ranks that share the work must all call this.

    Args:
        settle: waits for the GPU.
    """
    stream = torch.cuda.Stream()
    # earlier work may still run, and communicating work counts its exchanges with other ranks
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    settle()
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        work()
    graph.replay()
    # replays are queued back to back, so that launch gaps are not timed
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    settle()
    times = [start.elapsed_time(end) * 1e3 for start, end in pairwise(events)]
    return sorted(times)[len(times) // 2]


def kernel_times(work: Callable[[], Any]) -> dict[str, tuple[int, float]]:
    """Returns by kernel name the number of launches and their total microseconds, launched one by one."""
    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        work()
        torch.cuda.synchronize()
    found = dict[str, tuple[int, float]]()
    for event in seen.events():
        if event.device_type.name == "CUDA":
            count, micro = found.get(event.name, (0, 0.0))
            found[event.name] = count + 1, micro + event.device_time
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))
