"""The CPU engine as compiled for ARM64, run by QEMU's emulator: the bits of x86-64. And that all other builds compile.

`sanitized.c` calls it as models do and writes every result to a file, which is compared with the file of this
processor's own build. QEMU computes as the architecture says, one instruction after another: this tests what the
compiler made of the source and what NEON's arithmetic gives. It does not test the order in which an ARM processor's
cores see each other's writes, and is no run on such a processor.
"""

from __future__ import annotations

import os
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mtp_spec.kernels.cpu.build import FLAGS, HERE, LEVELS, MACHINES, build, library_name
from mtp_spec.kernels.cpu.engine import levels
from shared_file import made_once

SOURCE = Path(__file__).with_name("sanitized.c")
EMULATOR = next(filter(None, map(shutil.which, ("qemu-aarch64", "qemu-aarch64-static"))), None)
CROSS = "MTP_SPEC_CROSS"
BUILDS = {
    # linked with a C library of its own: the emulator needs no other files
    "aarch64": ("-target", "aarch64-linux-musl", "-static", *FLAGS, *LEVELS["aarch64"]["neon"]),
    # not optimised: another code altogether, soon compiled
    "here": (*(flag for flag in FLAGS if flag != "-O3"), "-O0", "-mcpu=x86_64_v3"),
}
PARTS = ("codes", "operations", "products", "attention", "pass")
needs_zig = pytest.mark.skipif(find_spec("ziglang") is None, reason="ziglang, which compiles the engine, is not here")


def compiled(factory: pytest.TempPathFactory, name: str) -> Path:
    def compile_it(out: Path) -> None:
        command = [sys.executable, "-m", "ziglang", "cc", *BUILDS[name], "-w", "-DLEVEL=emulated", f"-I{HERE}",
                   str(SOURCE), "-o", str(out), "-lpthread", "-lm"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    return made_once(factory, f"emulated-{name}", compile_it)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What runs the engine here, and emulated."""
    if sys.platform != "linux" or MACHINES.get(platform.machine()) != "x86_64":
        pytest.skip(f"Linux on x86-64 is compared with emulated ARM64, not {sys.platform} on {platform.machine()}")
    if not levels():
        pytest.skip("this processor lacks AVX2 or FMA, for which the code to compare with is compiled")
    if EMULATOR is None:
        pytest.skip("QEMU's emulator of ARM64 is not here: install qemu-user or qemu-user-static")
    with ThreadPoolExecutor() as pool:
        emulated, here = pool.map(lambda name: str(compiled(tmp_path_factory, name)), ("aarch64", "here"))
    return {"aarch64": [EMULATOR, emulated], "here": [here]}


def run(program: Sequence[str], *arguments: str) -> str:
    done = subprocess.run([*program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[:3000]
    return done.stdout


def results(program: Sequence[str], part: str, folder: Path) -> npt.NDArray[np.uint32]:
    file = folder / part
    run(program, f"to={file}", part)
    return np.fromfile(file, np.uint32)


@needs_zig
@pytest.mark.parametrize("part", PARTS)
def test_emulated_arm_gives_the_same_bits(programs: dict[str, list[str]], part: str, tmp_path: Path) -> None:
    ours, emulated = (results(programs[name], part, tmp_path) for name in ("here", "aarch64"))
    assert len(ours) == len(emulated)
    differ = np.flatnonzero(ours != emulated)
    first = ", ".join(f"{i}: {ours[i]:08x} here, {emulated[i]:08x} emulated" for i in differ[:10])
    assert not len(differ), f"{len(differ)} of {len(ours)} results, the first ones {first}"
    # results, not zeros
    assert len(np.unique(ours[np.isfinite(ours.view(np.float32))])) > 1000


@needs_zig
def test_emulated_threads(programs: dict[str, list[str]]) -> None:
    assert run(programs["aarch64"], "threads", "late", "late_for_a_head", "torn") == run(programs["here"], "pass")


MADE = (("aarch64", "linux"), ("arm64", "darwin"), ("x86_64", "darwin"), ("AMD64", "win32"), ("x86_64", "linux"))


def kind_of(file: bytes) -> tuple[str, str]:
    """Returns machine and system that a library is for, by the numbers of its format's header."""
    if file[:4] == b"\x7fELF":
        return {0x3E: "x86_64", 0xB7: "aarch64"}[struct.unpack_from("<H", file, 18)[0]], "linux"
    if file[:4] == b"\xcf\xfa\xed\xfe":
        return {0x01000007: "x86_64", 0x0100000C: "arm64"}[struct.unpack_from("<I", file, 4)[0]], "darwin"
    assert file[:2] == b"MZ"
    place = struct.unpack_from("<I", file, 0x3C)[0]
    assert file[place : place + 4] == b"PE\0\0"
    return {0x8664: "AMD64"}[struct.unpack_from("<H", file, place + 4)[0]], "win32"


@needs_zig
@pytest.mark.skipif(not os.environ.get(CROSS), reason=f"compiles for some minutes: set {CROSS}=1")
@pytest.mark.parametrize(("machine", "system"), MADE)
def test_builds_for_other_systems(machine: str, system: str, tmp_path: Path) -> None:
    made = build(tmp_path, machine, system)
    assert made.name == library_name(system)
    file = made.read_bytes()
    assert kind_of(file) == (machine, system)
    for level in LEVELS[MACHINES[machine.lower()]]:
        assert f"mtp_{level}_pass".encode() in file
    assert [path.name for path in tmp_path.iterdir()] == [made.name]
