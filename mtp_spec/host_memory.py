"""How much memory this process can still have: the machine's, or less where a container's limit is nearer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")  # where the system's files are; tests have their own
NO_LIMIT = 2**60  # cgroups of the first version write a number like this for none


@dataclass(frozen=True, slots=True)
class _Names:
    """Files of a cgroup, which its two versions name differently."""

    limit: str
    used: str
    cached: tuple[str, ...]  # lines of memory.stat: files' pages, which the system takes back when it needs them


FIRST = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
SECOND = _Names("memory.max", "memory.current", ("inactive_file", "active_file"))


def free_memory() -> int | None:
    """Returns the bytes of memory and swap that this process can still get, where the system tells."""
    found = _meminfo()
    if found is None:
        return None
    available, swap = found
    return min([available, *(free for _, free in _limits())]) + swap


def room_for_files() -> int | None:
    """Returns the bytes of memory that mapped files and this process can have: swap is no place for files."""
    found, machine = _meminfo(), machine_memory()
    if found is not None:
        return min([found[0], *(free for _, free in _limits())])
    return machine


def machine_memory() -> int | None:
    """Returns the bytes of memory in this machine, or that its container may have, where the system tells."""
    try:
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
    return min([whole, *(limit for limit, _ in _limits())])


def _meminfo() -> tuple[int, int] | None:
    """Returns the bytes of memory that are free or hold what can be dropped, and those of free swap."""
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
    """Yields the folders of this process's cgroups with memory, and of those around them.

    In a container the path may be that of the machine, of which the container sees its own part as the whole: folders
    that are not there are passed over.
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
