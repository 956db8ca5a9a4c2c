"""Fixtures of tests of captured steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mtp_spec.cuda import group as device_group
from mtp_spec.cuda import sequence as device_sequence
from mtp_spec.cuda import shapes as device_planned
from mtp_spec.cuda import state as device_state
from mtp_spec.cuda.state import State
from mtp_spec.cuda.step import Step
from scripted import RING, SMALL, Script
from unwritten import spoil


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch)


@pytest.fixture(autouse=True)
def _steps_take_what_their_rows_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are the same on a busy machine: what the reference kernels take is no measure. On a GPU steps are timed."""
    measured = device_planned._time

    def seconds(state: State, work: Callable[[], object]) -> float:
        if state.length.is_cuda:
            return measured(state, work)
        work()
        return 1e-3 + 5e-5 * work.shape.rows if isinstance(work, Step) else 1e-4

    monkeypatch.setattr(device_planned, "_time", seconds)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Shapes from a list in place of learned ones, and a small ring."""
    for module in (device_state, device_planned, device_group, device_sequence):
        monkeypatch.setattr(module, "WAITING", RING)
    for module in (device_planned, device_group):
        monkeypatch.setattr(module, "CATCH_UP_ROWS", (SMALL, RING))
    monkeypatch.setattr(device_planned.Switching, "seconds", lambda _, state, shapes: [1.0] * (shapes + 3))

    def use(shapes: list[int]) -> None:
        monkeypatch.setattr(device_group, "ShapePlanner", lambda _: Script(shapes))

    return use
