"""Builds the package with the CPU engine compiled in; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ENGINE = Path(__file__).parent / "kernels" / "cpu"
sys.path.insert(0, str(ENGINE))

import build as engine  # noqa: E402  # kernels/cpu/build.py

# another platform to compile for than this one: a wheel's tag, for example macosx_11_0_arm64
WHEEL_PLATFORM = os.environ.get("MTP_SPEC_WHEEL_PLATFORM")
SYSTEMS = {"linux": "linux", "manylinux": "linux", "macosx": "darwin", "win": "win32"}


def target() -> tuple[str, str]:
    """Returns the machine and the system that are compiled for."""
    if WHEEL_PLATFORM is None:
        return platform.machine(), sys.platform
    system = next(name for tag, name in SYSTEMS.items() if WHEEL_PLATFORM.startswith(tag))
    machine = next(name for name in engine.MACHINES if WHEEL_PLATFORM.lower().endswith(name))
    return machine, system


def compile_engine() -> bool:
    """Compiles the engine beside its sources; returns whether it is there now."""
    machine, system = target()
    built = ENGINE / engine.library_name(system)
    for name in engine.NAMES.values():
        if WHEEL_PLATFORM is not None or name != built.name:  # one wheel holds one platform's
            (ENGINE / name).unlink(missing_ok=True)
    sources = [*ENGINE.glob("*.[ch]"), ENGINE / "build.py"]
    if built.is_file() and built.stat().st_mtime > max(source.stat().st_mtime for source in sources):
        return True
    reason = engine.why_not(machine, system)
    if reason is None:
        try:
            engine.build(ENGINE, machine, system)
            return True
        except (RuntimeError, OSError) as error:
            reason = str(error)
    built.unlink(missing_ok=True)  # of other sources
    print(f"mtp_spec without its CPU engine, models on a CPU run by torch: {reason}", file=sys.stderr)
    return False


class BuildPy(build_py):
    """Compiles before files are gathered."""

    def run(self) -> None:
        self.distribution.has_engine = compile_engine()
        super().run()


class Editable(editable_wheel):
    """The engine is compiled in the source folder."""

    def run(self) -> None:
        compile_engine()
        super().run()


class Wheel(bdist_wheel):
    """One wheel a platform, for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, here = super().get_tag()
        return "py3", "none", WHEEL_PLATFORM or here


class Compiled(Distribution):
    """Has code of one platform."""

    has_engine = False

    def has_ext_modules(self) -> bool:
        return engine.why_not(*target()) is None


setup(cmdclass={"build_py": BuildPy, "editable_wheel": Editable, "bdist_wheel": Wheel}, distclass=Compiled)
