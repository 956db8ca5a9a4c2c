"""A disk's plain rates: of reading uncached files in order, and of writing with a final sync."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

CHUNK = 2**24


def forget(files: Sequence[Path]) -> None:
    """Drops files from the system's page cache; the cache of a virtual machine's host is not affected."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_rate(files: Sequence[Path], readers: int) -> float:
    """Returns the bytes per second of reading files in order from the disk, by `readers` threads."""
    forget(files)
    descriptors = {file: os.open(file, os.O_RDONLY) for file in files}
    pieces = [(file, offset) for file in files for offset in range(0, file.stat().st_size, CHUNK)]

    def read(mine: Sequence[tuple[Path, int]]) -> int:
        room = bytearray(CHUNK)
        return sum(os.preadv(descriptors[file], [room], offset) for file, offset in mine)

    try:
        begin = perf_counter()
        with ThreadPoolExecutor(readers) as pool:
            total = sum(pool.map(read, [pieces[i::readers] for i in range(readers)]))
        return total / (perf_counter() - begin)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def write_rate(folder: Path, size: int) -> float:
    """Returns the bytes per second of writing and syncing a file of about `size` bytes."""
    file, data = folder / "disk.part", os.urandom(CHUNK)
    with file.open("xb", buffering=0) as stream:
        try:
            begin = perf_counter()
            for _ in range(max(1, size // CHUNK)):
                stream.write(data)
            os.fsync(stream.fileno())
            return stream.tell() / (perf_counter() - begin)
        finally:
            file.unlink()
