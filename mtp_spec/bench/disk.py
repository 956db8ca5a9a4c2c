"""What a disk gives plain programs: reading in order what the system has forgotten, writing until the disk has it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

CHUNK = 2**24


def forget(files: Sequence[Path]) -> None:
    """Makes the system drop what it keeps of files in memory; what a virtual machine's host keeps stays."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_rate(files: Sequence[Path], readers: int) -> float:
    """Returns bytes a second of reading files from the first to the last, by so many threads, from the disk."""
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
    """Returns bytes a second of writing a file of about `size` bytes, until the disk has it."""
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
