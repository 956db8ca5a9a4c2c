"""Compiles the CPU engine with Zig's C compiler, which is on the package index for every platform.

Run by setup.py; by hand, `python kernels/cpu/build.py` compiles into this folder. An installed wheel needs no compiler,
and the system's compiler is never used: the flags that fix the order of sums are clang's.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
# the order of operations is the source's: nothing is contracted, reassociated or replaced
FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-sanitize=all", "-fvisibility=hidden", "-g0")
LEVELS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {"avx2": ("-mcpu=x86_64_v3",), "avx512": ("-mcpu=x86_64_v4", "-mprefer-vector-width=512")},
    "aarch64": {"neon": ()},
}
# Python's name of a machine -> Zig's
MACHINES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
TARGETS = {"linux": "{}-linux-gnu.2.17", "darwin": "{}-macos", "win32": "{}-windows-gnu"}
NAMES = {"linux": "libengine.so", "darwin": "libengine.dylib", "win32": "engine.dll"}


def library_name(system: str = sys.platform) -> str:
    """Returns the library's file name on a system, named as in `sys.platform`."""
    return NAMES.get(system, NAMES["linux"])


def why_not(machine: str, system: str) -> str | None:
    """Returns why the engine cannot be compiled for a machine, or None."""
    if machine.lower() not in MACHINES or system not in TARGETS:
        return f"the CPU engine is not made for {system} on {machine}"
    if find_spec("ziglang") is None:
        return "ziglang, which compiles the CPU engine, is not installed"
    return None


def digest() -> int | None:
    """Returns a number that differs for other C sources, so that a library of earlier ones is not called; None if there
    are no sources."""
    sources = sorted(HERE.glob("*.[ch]"))
    if not sources:
        return None
    found = hashlib.sha256(b"".join(source.name.encode() + b"\0" + source.read_bytes() for source in sources))
    return int.from_bytes(found.digest()[:7], "big")


def build(folder: Path = HERE, machine: str = platform.machine(), system: str = sys.platform) -> Path:
    """Compiles the engine; returns the library's file.

    Raises:
        RuntimeError: the compiler failed; includes its output.
    """
    name, out = MACHINES[machine.lower()], folder / library_name(system)
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", TARGETS[system].format(name)]
    common = [*FLAGS, *(() if system == "win32" else ("-fPIC",))]
    with tempfile.TemporaryDirectory() as room, ThreadPoolExecutor() as pool:
        jobs: list[tuple[Path, Path, tuple[str, ...]]] = [
            (HERE / "level.c", Path(room) / "level.o", (f"-DSOURCES={digest()}LL",))
        ]
        for level, flags in LEVELS[name].items():
            jobs.append((HERE / "engine.c", Path(room) / f"{level}.o", (*flags, f"-DLEVEL={level}")))
        commands = [[*compiler, *common, *flags, "-c", str(source), "-o", str(made)] for source, made, flags in jobs]
        list(pool.map(_run, commands))
        part = Path(room) / out.name
        _run([*compiler, "-shared", "-s", "-o", str(part), *(str(made) for _, made, _ in jobs)])
        temporary = out.with_name(f".{out.name}.part")
        temporary.write_bytes(part.read_bytes())
        temporary.replace(out)
    return out


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    reason = why_not(platform.machine(), sys.platform)
    print(reason or build())
