"""The memory that this process can still get: the machine's, or less if a container's limit is lower."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")  # of the system's files; tests replace it
NO_LIMIT = 2**60  # version 1 cgroups without a limit report a number above this


@dataclass(frozen=True, slots=True)
class _Names:
    """File names of a cgroup, which differ between the two versions."""

    limit: str
    used: str
    cached: tuple[str, ...]  # lines of memory.stat for cached file pages, which the system reclaims when needed


FIRST = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
SECOND = _Names("memory.max", "memory.current", ("inactive_file", "active_file"))


def free_memory() -> int | None:
    """Returns the bytes of memory and swap that this process can still get, or None if they are not reported."""
    found = _meminfo()
    if found is None:
        return None
    available, swap = found
    return min([available, *(free for _, free in _limits())]) + swap


def room_for_files() -> int | None:
    """Returns the bytes available to mapped files and this process, without swap, which mapped files do not use."""
    found, machine = _meminfo(), machine_memory()
    if found is not None:
        return min([found[0], *(free for _, free in _limits())])
    return machine


def machine_memory() -> int | None:
    """Returns the bytes of memory of this machine or its container, or None if the system does not report it."""
    try:
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
    return min([whole, *(limit for limit, _ in _limits())])


def _meminfo() -> tuple[int, int] | None:
    """Returns the available bytes of memory, reclaimable ones included, and the bytes of free swap."""
    try:
        lines = (ROOT / "proc/meminfo").read_text(encoding="ascii").splitlines()
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        return found["MemAvailable"], found["SwapFree"]
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _limits() -> Iterator[tuple[int, int]]:
    """Yields limit and free bytes of every cgroup around this process that has a limit."""
    for folder, names in _groups():
        try:
            limit = int((folder / names.limit).read_text())
            used = int((folder / names.used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue  # no limit ("max"), or no such file: the system's own group has none
        if limit < NO_LIMIT:
            cached = sum(int(stat.get(name, 0)) for name in names.cached)
            yield limit, max(0, limit - max(0, used - cached))


def _groups() -> Iterator[tuple[Path, _Names]]:
    """Yields the folders of this process's memory cgroups and of their parents.

    In a container the path may be the host's, of which only the container's own part is visible: the caller skips
    folders that do not exist.
    """
    try:
        lines = (ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, kinds, path = line.split(":", 2)
        second = number == "0" and not kinds
        if not second and "memory" not in kinds.split(","):
            continue
        top = ROOT / "sys/fs/cgroup" if second else ROOT / "sys/fs/cgroup/memory"
        folder = top / path.lstrip("/")
        for each in (folder, *folder.parents):
            yield each, SECOND if second else FIRST
            if each == top:
                break
