"""Captures while Python has garbage to collect."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from mtp_spec.cuda.graphs import Graphs, capturing


@pytest.mark.parametrize("before", [True, False])
def test_no_garbage_is_collected_while_any_capture_lasts(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph", lambda *given, **named: nullcontext())
    graph: Any = None
    own = gc.isenabled()
    (gc.enable if before else gc.disable)()
    try:
        first, second = capturing(graph), capturing(graph)  # of two threads: neither ends within the other
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert not gc.isenabled()
        second.__exit__(None, None, None)
        assert gc.isenabled() == before
        with pytest.raises(ZeroDivisionError), capturing(graph):
            raise ZeroDivisionError
        assert gc.isenabled() == before
    finally:
        (gc.enable if own else gc.disable)()


@pytest.mark.gpu
def test_a_model_that_is_used_no_more_does_not_spoil_a_capture() -> None:
    graphs, x = Graphs(torch.device("cuda")), torch.zeros(4, device="cuda")
    kept: list[Any] = [graphs.capture(lambda: x.add_(1).neg_(), ran=True) for _ in range(3)]

    def work() -> None:
        cycle = [kept.pop()] if kept else []
        cycle.append(cycle)
        del cycle
        assert len([[] for _ in range(100_000)]) == 100_000  # allocations that make Python look for garbage
        x.add_(2)

    replay = graphs.capture(work, ran=True)
    x.zero_()
    replay()
    assert x.tolist() == [2.0] * 4
