"""What tests of kernels have in common."""

from __future__ import annotations

import pytest

from unwritten import spoil


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch)
