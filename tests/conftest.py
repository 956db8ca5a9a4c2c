"""Shared fixtures."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.resources import files
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from mtp_spec import measured
from mtp_spec.model.checkpoint import open_checkpoint
from mtp_spec.model.convert import ranks_job
from mtp_spec.model.jobs import run_job
from mtp_spec.model.parallel import ALONE
from mtp_spec.times import StepTimes

# workers side by side that each spread over every core spend their time waiting for one another
THREADS = os.environ.get("OMP_NUM_THREADS") or ("1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

sys.path.insert(0, str(Path(__file__).parent))

import small  # noqa: E402  # found by the line above


@pytest.fixture(autouse=True, scope="session")
def _threads() -> Iterator[None]:
    """As many as OMP_NUM_THREADS says, here and in processes that tests start; not set for pytest's own workers."""
    torch.set_num_threads(int(THREADS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", THREADS)
        yield


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is kept in the user's own directory, and no test waits for times to be measured: they are typical.

    So they are for the bundled model in processes that tests start, which find them in that directory.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(measured, "measure", lambda *_: StepTimes.typical())
        checkpoint = open_checkpoint(Path(str(files("mtp_spec.configs") / "demo")))
        with safe_open(checkpoint.tensors["model.norm.weight"].parts[0].file, "pt") as file:
            norm = file.get_tensor("model.norm.weight")
        model = SimpleNamespace(config=checkpoint.config, norm=norm, dtype=norm.dtype, device=norm.device, ranks=ALONE)
        for technique, ranks in product(("batched", "single"), (1, 2)):
            subject = measured.times_subject(model, technique)  # type: ignore[arg-type]
            measured.write({**subject, "threads": int(THREADS), "ranks": ranks}, StepTimes.typical().to_json())
        yield


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DeepSeek-V3 in FP8, a Hugging Face folder."""
    return small.make_fp8(tmp_path_factory.mktemp("small") / "fp8")


@pytest.fixture(scope="module")
def two(fp8: Path) -> Path:
    """The same as DeepSeek's files of two ranks."""
    run_job(ranks_job(fp8, 2), fp8.with_name("two"))
    return fp8.with_name("two")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
