"""The engine compiled for a processor without vectors or fused multiply-add: the same source gives the same bits."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cpu_engine import Kernels, Seen, load, matrix, numbers, same
from cpu_models import KINDS, STORED, all_equal, random_model, scenario, use
from mtp_spec.kernels.cpu.build import FLAGS, HERE, why_not
from mtp_spec.kernels.cpu.engine import Library, levels
from mtp_spec.kernels.cpu.engine import why_not as why_no_engine
from shared_file import made_once

BASELINE = {"x86_64": "x86_64", "AMD64": "x86_64", "aarch64": "generic", "arm64": "generic"}
REASON = why_no_engine() or why_not(platform.machine(), sys.platform)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The library, its fused multiply-add a function of the compiler's own library."""

    def compile_it(file: Path) -> None:
        flags = [flag for flag in FLAGS if flag != "-O3"]
        subprocess.run(
            [sys.executable, "-m", "ziglang", "cc", *flags, "-O1", "-fPIC", "-shared", "-DLEVEL=plain",
             f"-mcpu={BASELINE[platform.machine()]}", str(Path(HERE) / "engine.c"), "-o", str(file)],
            check=True,
        )  # fmt: skip

    return load(made_once(tmp_path_factory, "plain-engine", compile_it), "plain")


@pytest.mark.parametrize("kind", STORED, ids=str)
def test_operations(plain: Library, kind: torch.dtype) -> None:
    engines = [Kernels(plain), *(Kernels(level) for level in levels())]
    for rows, count, columns in ((1, 17, 129), (3, 40, 384), (4, 33, 16), (13, 20, 130), (65, 9, 63)):
        stored, x = matrix(kind, count, columns, rows), numbers(rows, rows, columns)
        across = numbers(7, rows, count)
        first, *others = [(engine.product(stored, 3, count, x), engine.columns(stored, 0, count, across))
                          for engine in engines]  # fmt: skip
        assert all(same(a, b) for other in others for a, b in zip(first, other, strict=True))
    q, latents = numbers(1, 6, 9, 40), numbers(2, 200, 40)
    seen = [Seen(0, 130, (190, 150)), Seen(0, 131), Seen(0, 10), Seen(0, 0, (7,)), Seen(0, 200), Seen(0, 64)]
    first_out, *outs = [engine.attend(q, [latents], seen, 24, 0.4, number) for number, engine in enumerate(engines)]
    assert all(same(first_out, out) for out in outs)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_passes(monkeypatch: pytest.MonkeyPatch, plain: Library, kind: str) -> None:
    stored = STORED[list(KINDS).index(kind) % len(STORED)]
    expected = scenario(random_model(kind, stored))
    use(monkeypatch, plain)
    model = random_model(kind, stored)
    assert model._engine is plain
    assert all_equal(scenario(model), expected)
