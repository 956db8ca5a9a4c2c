"""The CPU engine under the sanitizers of the compilers that are there: memory, undefined behaviour, threads.

`sanitized.c` calls it as models do, with arrays of exactly the size that it is told.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from mtp_spec.kernels.cpu.build import HERE
from shared_file import made_once

SOURCE = Path(__file__).with_name("sanitized.c")
COMMON = ("-std=c11", "-ffp-contract=off", "-w", "-DLEVEL=checked", f"-I{HERE}", str(SOURCE), "-lpthread", "-lm")
# clang's check needs no library: what it finds is a trap. Nothing is optimised, which takes far less time to compile
BUILDS = {
    "undefined": (sys.executable, "-m", "ziglang", "cc", "-O0", "-fsanitize=undefined", "-fsanitize-trap=undefined"),
    "address": ("gcc", "-O0", "-g1", "-Wno-psabi", "-fsanitize=address"),
    # gcc 12's reports a race that is none, in one run of fifty
    "thread": (sys.executable, "-m", "ziglang", "cc", "-O0", "-g1", "-fsanitize=thread"),
}
THREADS = "MTP_SPEC_SANITIZE_THREADS"
WIDE = {"gcc": ("-mavx2", "-mfma", "-mf16c"), sys.executable: ("-mcpu=x86_64_v3",)}

_BITS: dict[str, str] = {}  # that the first of them printed

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux", reason="the flags are those of Linux on x86-64"
)


@pytest.fixture(scope="module", params=BUILDS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler, *flags = BUILDS[request.param]
    if request.param == "thread" and not os.environ.get(THREADS):
        pytest.skip(f"Zig compiles this sanitizer's own library for two minutes: set {THREADS}=1")
    if not (shutil.which(compiler) if compiler == "gcc" else find_spec("ziglang")):
        pytest.skip(f"{compiler} is not here")

    def compile_it(out: Path) -> None:
        command = [compiler, *flags, *WIDE[compiler], *COMMON, "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            assert "error:" not in done.stderr or "cannot find" in done.stderr, done.stderr
            pytest.skip(f"this compiler has no such sanitizer: {done.stderr[-300:]}")

    out = made_once(tmp_path_factory, request.param, compile_it)
    if "FATAL" in subprocess.run([str(out)], capture_output=True, text=True, check=False).stderr:
        pytest.skip("the sanitizer does not run on this system")
    return out


def run(program: Path, *parts: str) -> str:
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([str(program), *parts], capture_output=True, text=True, check=False,
                          env={**os.environ, **options})  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[:3000]
    return done.stdout


def test_operations_and_passes(program: Path) -> None:
    parts = ("attention", "pass") if program.name == "thread" else ("products", "attention", "pass")
    run(program, *parts)


def test_every_compiler_gives_the_same_bits(program: Path) -> None:
    """gcc's code is another than clang's, and neither is optimised here."""
    _BITS.setdefault("first", run(program, "attention", "pass"))
    assert run(program, "attention", "pass") == _BITS["first"]


def test_threads(program: Path) -> None:
    for _ in range(20 if program.name == "thread" else 1):
        run(program, "threads")


def test_a_late_helper(program: Path) -> None:
    run(program, "late")


def test_a_late_helper_of_a_head(program: Path) -> None:
    run(program, "late_for_a_head")


def test_a_helper_that_comes_while_the_next_job_is_written(program: Path) -> None:
    run(program, "torn")
