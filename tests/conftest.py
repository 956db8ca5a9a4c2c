"""Shared fixtures."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from importlib.resources import files
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import quick
import small
from mtp_spec.api import LM
from mtp_spec.cpu import planners
from mtp_spec.kernels.cpu.engine import SWITCH
from mtp_spec.load_checks import load_model
from mtp_spec.model.checkpoint.convert import ranks_job
from mtp_spec.model.checkpoint.jobs import run_job
from mtp_spec.planning import store
from mtp_spec.planning.costs import StepTimes

TESTS = Path(__file__).parent
# workers side by side that each spread over every core spend their time waiting for one another
THREADS = os.environ.get("OMP_NUM_THREADS") or ("1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's job in the background: tests of interrupts need it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> Iterator[None]:
    """As many as OMP_NUM_THREADS says, here and in processes that tests start; not set for pytest's own workers."""
    torch.set_num_threads(int(THREADS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", THREADS)
        yield


@pytest.fixture(autouse=True, scope="session")
def _cache(_threads: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is kept in the user's own directory, and no test waits for times to be measured: they are typical.

    So they are for the bundled model in processes that tests start, which find them in that directory.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    with pytest.MonkeyPatch.context() as patch:
        # the compiler's stays where it is: a new one costs a minute for the C library that it brings along as source
        patch.setenv("ZIG_GLOBAL_CACHE_DIR", os.environ.get("ZIG_GLOBAL_CACHE_DIR") or str(Path(caches) / "zig"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(planners, "measure", lambda *_: StepTimes.typical())
        patch.setattr(planners, "calibrated", lambda times, *_: times)
        folder = Path(str(files("mtp_spec.configs") / "demo"))
        engine: Any = load_model(folder, None, "cpu", 64, None, None)
        norm = getattr(engine.norm, "weight", engine.norm)
        fields = {"config": engine.config, "device": engine.device, "norm": norm, "ranks": engine.ranks}
        models = [engine]
        for dtype in ("bfloat16", "float32"):  # the same by torch
            models.append(SimpleNamespace(**fields, dtype=getattr(torch, dtype), runs_on="torch", stored=dtype))
        for model, technique, ranks in product(models, ("batched", "single"), (1, 2)):
            subject = store.times_subject(model, technique)
            store.write({**subject, "threads": int(THREADS), "ranks": ranks}, StepTimes.typical().to_json())
        yield


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models on a CPU run as they do where the engine cannot."""
    monkeypatch.setenv(SWITCH, "torch")


@pytest.fixture
def auto_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what "auto" drafts: it plans from typical times even where rows run one by one, and none would."""
    monkeypatch.setattr(LM, "drafts_pay", True)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DeepSeek-V3 in FP8, a Hugging Face folder."""
    return small.make_fp8(tmp_path_factory.mktemp("small") / "fp8")


@pytest.fixture(scope="module")
def two(fp8: Path) -> Path:
    """The same as DeepSeek's files of two ranks."""
    run_job(ranks_job(fp8, 2), fp8.with_name("two"))
    return fp8.with_name("two")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each worker goes through files of its own, and takes tests of the other's when it has none left: what a file's
    tests share is made once, and none waits for a slow test of the other worker's."""
    from xdist.scheduler import WorkStealingScheduling  # type: ignore[import-untyped]

    return WorkStealingScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    chosen = quick.names()
    for item in items:
        if (item.path.relative_to(TESTS).with_suffix("").as_posix(), item.name.partition("[")[0]) in chosen:
            item.add_marker("quick")
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
