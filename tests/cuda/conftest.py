"""Fixtures of tests of captured steps."""

from __future__ import annotations

from typing import Any

import pytest

from mtp_spec.cuda import group as device_group
from mtp_spec.cuda import sequence as device_sequence
from mtp_spec.cuda import shapes as device_planned
from mtp_spec.cuda import state as device_state
from scripted import RING, SMALL, Script
from unwritten import spoil


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch)


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
