"""Shared fixtures."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mtp_spec import measured
from mtp_spec.times import StepTimes

# workers side by side that each spread over every core spend their time waiting for one another
THREADS = os.environ.get("OMP_NUM_THREADS") or ("1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="session")
def _threads() -> Iterator[None]:
    """As many as OMP_NUM_THREADS says, here and in processes that tests start; not set for pytest's own workers."""
    torch.set_num_threads(int(THREADS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", THREADS)
        yield


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is kept in the user's own directory, and no test waits for times to be measured: they are typical."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(measured, "measure", lambda *_: StepTimes.typical())
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
