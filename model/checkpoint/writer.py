"""Writes a checkpoint folder atomically: it appears complete or not at all.

Everything goes to `FOLDER.part`: tensor files under temporary names, laid out beforehand, and a journal with the
checksum of every tensor written. At the end the files are renamed, small files, index and config.json are written, and
the folder is renamed. An interrupted run can be resumed: tensors in the journal are read again, and those that do not
match their checksum are written again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from math import prod
from os import pwrite
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from mtp_spec.model.errors import CheckpointError
from mtp_spec.model.files.tensors import DTYPES, INDEX, LENGTH_BYTES, read_header

PART = ".part"
JOURNAL = ".journal.jsonl"
CHECKSUMS = "checksums.json"
ALIGNMENT = 8  # of the data's start, as safetensors asks
CHUNK = 2**24
Key = tuple[str, str]  # file, tensor


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor to write."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def key(self) -> Key:
        return self.file, self.name

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


class Assembly:
    """Context manager that writes the folder `target`. `write` and `check` may be called by any thread.

    Args:
        identity: a digest of the operation and its inputs; a partial folder with another identity is refused.

    Raises:
        CheckpointError: another run is writing the folder, or a partial folder of another operation exists.
        OSError: the disk is full or fails.
    """

    def __init__(self, target: Path, outputs: Sequence[Output], identity: str) -> None:
        self._target, self._path = target, target.with_name(target.name + PART)
        self._outputs = {output.key: output for output in outputs}
        self._identity = identity
        self._streams: dict[str, FileIO] = {}
        self._starts: dict[Key, int] = {}
        self._sums: dict[Key, int] = {}
        self._lock = Lock()

    def __enter__(self) -> Assembly:
        self._path.mkdir(parents=True, exist_ok=True)
        self._journal = FileIO(self._path / JOURNAL, "a+")
        try:
            try:
                fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise CheckpointError(f"another run writes {self._path}: wait for it, or stop it") from error
            self._read_journal()
            files: dict[str, list[Output]] = {}
            for output in self._outputs.values():
                files.setdefault(output.file, []).append(output)
            for name, outputs in files.items():
                self._open(name, outputs)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for stream in (*self._streams.values(), self._journal):
            stream.close()

    def _read_journal(self) -> None:
        self._journal.seek(0)
        first, *lines = self._journal.readall().split(b"\n")
        if not lines:  # no complete line
            self._journal.truncate(0)
            self._note({"identity": self._identity})
            return
        if _parsed(first).get("identity") != self._identity:
            raise CheckpointError(
                f"{self._path} holds parts of another run, or the source changed since: delete it and start again"
            )
        if lines[-1]:
            self._journal.write(b"\n")  # ends a truncated line, so that the next does not join it
        entries = [entry for line in lines if (entry := _parsed(line))]
        self._sums = {key: e["crc32"] for e in entries if (key := (e["file"], e["name"])) in self._outputs}

    def _note(self, entry: dict[str, Any]) -> None:
        _write_all(self._journal.fileno(), json.dumps(entry).encode() + b"\n", None)

    def _open(self, name: str, outputs: list[Output]) -> None:
        header, starts, size = layout(outputs)
        whole = self._path / name  # left by a run that stopped while renaming
        file = whole if whole.exists() else self._path / (name + PART)
        stream = FileIO(os.open(file, os.O_RDWR | os.O_CREAT, 0o644), "r+")
        self._streams[name] = stream
        _write_all(stream.fileno(), header, 0)
        stream.truncate(size)
        self._starts |= {(name, tensor): start for tensor, start in starts.items()}

    def listed(self) -> list[Key]:
        """Returns the tensors that an earlier run wrote."""
        return list(self._sums)

    def check(self, key: Key) -> tuple[Key, bool]:
        """Returns the key, and whether the tensor matches its checksum in the journal."""
        descriptor, start, size = self._streams[key[0]].fileno(), self._starts[key], self._outputs[key].bytes
        checksum = 0
        for offset in range(0, size, CHUNK):
            checksum = zlib.crc32(os.pread(descriptor, min(CHUNK, size - offset), start + offset), checksum)
        return key, checksum == self._sums[key]

    def check_room(self, needed: int) -> None:
        """Raises an error if the disk does not have `needed` bytes free."""
        free = shutil.disk_usage(self._path).free
        if needed > free:
            raise CheckpointError(
                f"{self._target} needs {needed / 1e9:.3f} GB more and {free / 1e9:.3f} GB are free: free some, or give "
                "a folder on another disk"
            )

    def write(self, output: Output, tensor: Tensor) -> None:
        """Writes a tensor, then notes it in the journal."""
        found = (tuple(tensor.shape), tensor.dtype)
        assert found == (output.shape, DTYPES[output.dtype]), f"{output} is written as {found}"
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        _write_all(self._streams[output.file].fileno(), data, self._starts[output.key])
        checksum = zlib.crc32(data)
        with self._lock:
            self._sums[output.key] = checksum
            self._note({"file": output.file, "name": output.name, "crc32": checksum})

    def finish(self, files: Mapping[str, bytes], index: bool) -> None:
        """Renames the tensor files, writes `files`, checksums, index and config.json, and renames the folder."""
        for name, stream in self._streams.items():
            os.fsync(stream.fileno())
            if (self._path / (name + PART)).exists():
                (self._path / (name + PART)).rename(self._path / name)
        for name, data in files.items():
            if name != "config.json":
                write_file(self._path / name, data)
        sums: dict[str, dict[str, str]] = {}
        for file, name in sorted(self._outputs):
            sums.setdefault(file, {})[name] = f"{self._sums[file, name]:08x}"
        write_file(self._path / CHECKSUMS, as_json({"algorithm": "crc32", "files": sums}))
        if index:
            total = sum(output.bytes for output in self._outputs.values())
            names = {name: file for file, name in sorted(self._outputs, key=lambda key: key[1])}
            write_file(self._path / INDEX, as_json({"metadata": {"total_size": total}, "weight_map": names}))
        write_file(self._path / "config.json", files["config.json"])
        _sync_folder(self._path)
        self._path.rename(self._target)
        _sync_folder(self._target.parent)
        (self._target / JOURNAL).unlink()


def layout(outputs: Iterable[Output]) -> tuple[bytes, dict[str, int], int]:
    """Returns a safetensors header, where each tensor's bytes begin, and the size of the file."""
    ordered = sorted(outputs, key=lambda output: -DTYPES[output.dtype].itemsize)  # keeps numbers aligned without gaps
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for output in ordered:
        begin, end = end, end + output.bytes
        entries[output.name] = {"dtype": output.dtype, "shape": output.shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    first = LENGTH_BYTES + len(text)
    starts = {output.name: first + entries[output.name]["data_offsets"][0] for output in ordered}
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, starts, first + end


def wrong_checksums(folder: Path) -> list[str]:
    """Returns the tensors of a folder that differ from its checksums.json.

    Raises:
        CheckpointError: there is no such file, it is unreadable, or a file of tensors is missing or truncated.
    """
    file = folder / CHECKSUMS
    try:
        sums = json.loads(file.read_text(encoding="utf-8"))["files"]
        sums = {name: dict(tensors.items()) for name, tensors in sums.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): only cast and convert write it") from error
    wrong = []
    for name, tensors in sums.items():
        infos = read_header(folder / name)
        with (folder / name).open("rb") as stream:
            for tensor, expected in tensors.items():
                checksum = 0
                if tensor in infos:
                    stream.seek(infos[tensor].parts[0].start)
                    for offset in range(0, infos[tensor].bytes, CHUNK):
                        checksum = zlib.crc32(stream.read(min(CHUNK, infos[tensor].bytes - offset)), checksum)
                if f"{checksum:08x}" != expected:
                    wrong.append(f"{tensor} in {name}")
    return wrong


def as_json(value: Any) -> bytes:
    """Returns the bytes of a JSON file."""
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def _parsed(line: bytes) -> dict[str, Any]:
    """Returns a line of the journal, or an empty dict if the line is truncated."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _write_all(descriptor: int, data: bytes | memoryview, start: int | None) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        rest = view[done:]
        done += os.write(descriptor, rest) if start is None else pwrite(descriptor, rest, start + done)


def write_file(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name and renames it, so that it is there whole or not at all."""
    part = path.with_name(path.name + PART)
    with part.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    part.rename(path)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
