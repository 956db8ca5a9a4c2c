"""Which training steps are captured, and what is said when they cannot be; without a GPU, on which nothing is replayed.

What graphs compute is tested on a GPU (`test_gpu`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_spec.cuda import graphs
from mtp_spec.training import captured
from mtp_spec.training.captured import CapturedSteps


class Device:
    """Stands for `torch.cuda`: captured work runs at once, and a replay only counts.

    Attributes:
        free: bytes.
        peak: bytes that are held at most; 5 are held before a step.
        fails: of the next captures, so many.
        ran: how work ran, in order.
        pool: of the last capture.
    """

    def __init__(self) -> None:
        self.free, self.peak, self.fails, self.ran, self.capturing = 100, 15, 0, list[str](), False
        self.pool: Any = None
        nothing = SimpleNamespace(wait_stream=lambda other: None)
        self.Stream = self.current_stream = lambda device: nothing
        self.stream = lambda stream: nullcontext()
        self.graph_pool_handle = object
        self.CUDAGraph = lambda: SimpleNamespace(replay=lambda: self.ran.append("replayed"))
        self.synchronize = self.empty_cache = lambda *_: None
        self.memory_allocated, self.max_memory_allocated = lambda device: 5, lambda device: self.peak
        self.max_memory_reserved, self.reset_peak_memory_stats = lambda device: 20, lambda device: None
        self.mem_get_info = lambda device: (self.free, 100)

    @contextmanager
    def graph(self, graph: Any, pool: Any = None, **_: Any) -> Iterator[None]:
        self.capturing, self.pool = True, pool
        try:
            yield
            if self.fails and self.ran[-1:] == ["captured"]:
                self.fails -= 1
                raise RuntimeError("operation not permitted\nmore")
        finally:
            self.capturing = False

    def work(self, x: Tensor, scale: Tensor) -> Tensor:
        self.ran.append("captured" if self.capturing else "launched")
        return x.sum() * scale


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    for module in (captured, graphs):
        some = SimpleNamespace(cuda=made, Tensor=Tensor, uint8=torch.uint8, empty=torch.empty)
        monkeypatch.setattr(module, "torch", some)
    return made


def steps_of(device: Device) -> CapturedSteps:
    return CapturedSteps(device.work, torch.device("cpu"))


def run(steps: CapturedSteps, *sizes: int) -> None:
    for size in sizes:
        steps(torch.ones(size), torch.tensor(2.0))


def test_a_shape_is_captured_when_it_comes_again(device: Device) -> None:
    steps = steps_of(device)
    run(steps, 3, 5, 3, 3, 3, 5)
    assert device.ran == [
        "launched", "launched", "captured", "replayed", "replayed", "replayed", "captured", "replayed"
    ]  # fmt: skip
    assert steps.graphs == 2
    pool = device.pool
    steps.forget()
    device.ran.clear()
    run(steps, 3, 3)
    assert device.ran == ["launched", "captured", "replayed"]
    assert device.pool is not pool


@pytest.mark.parametrize("free", [19, 20])
def test_without_room_steps_are_launched_and_a_warning_says_so_once(device: Device, free: int) -> None:
    """A step takes 10 bytes: twice that is wanted, for the graphs and for a step of a new shape beside them."""
    steps, device.free = steps_of(device), free
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run(steps, 3, 3, 3, 5, 5)
    assert len(said) == (free < 20)
    assert steps.off == (free < 20)
    if free < 20:
        assert device.ran == ["launched"] * 5
        assert "no more CUDA graphs of training steps are made (0.00 GB of the GPU's memory are free" in str(said[0])


def test_a_capture_that_fails_is_tried_once_more(device: Device) -> None:
    steps, device.fails = steps_of(device), 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(steps, 3, 3, 3)
    assert device.ran == ["launched", "captured", "launched", "captured", "replayed"]
    assert not steps.off


def test_captures_that_fail_end_with_a_warning_and_graphs_are_kept(device: Device) -> None:
    steps = steps_of(device)
    run(steps, 3, 3, 5)
    device.fails = 9
    with pytest.warns(UserWarning, match=r"\(RuntimeError: operation not permitted\): others are launched") as said:
        run(steps, 5, 5, 5)
    assert len(said) == 1
    device.ran.clear()
    run(steps, 3, 5)
    assert device.ran == ["replayed", "launched"]


def test_a_larger_step_begins_a_larger_pool(device: Device) -> None:
    """Whose graphs are captured again when they come again, without being launched before."""
    steps = steps_of(device)
    run(steps, 3, 3, 5, 5)
    assert steps.graphs == 2
    device.peak = 16
    run(steps, 7, 3)
    assert steps.graphs == 2
    device.ran.clear()
    run(steps, 7)
    assert steps.graphs == 1
    run(steps, 3, 5, 3)
    assert device.ran == ["captured", "replayed"] * 3 + ["replayed"]
    assert steps.graphs == 3
