"""Jobs that convert checkpoint files tensor by tensor, with one tensor per worker in memory."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from mtp_spec.model.checkpoint.writer import PART, Assembly, Output
from mtp_spec.model.errors import CheckpointError
from mtp_spec.model.files.tensors import TensorInfo, read_tensor

SMALL_BYTES = 64 * 2**20
NOT_CARRIED = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf", PART)
Report = Callable[[int, int], None]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Task:
    """One step of a job.

    Attributes:
        reads: tensors to read.
        writes: tensors to write.
        work: given the tensors of `reads`, yields those of `writes` in order.
        extra_bytes: memory that `work` needs besides its inputs and outputs.
    """

    reads: tuple[TensorInfo, ...]
    writes: tuple[Output, ...]
    work: Callable[[list[Tensor]], Iterable[Tensor]]
    extra_bytes: int = 0

    @property
    def bytes(self) -> int:
        return sum(output.bytes for output in self.writes)

    @property
    def memory(self) -> int:
        return sum(info.bytes for info in self.reads) + self.extra_bytes


@dataclass(frozen=True, slots=True)
class Job:
    """A folder to write.

    Attributes:
        what: the operation and its options; an interrupted run is resumed only by the same.
        tasks: in the order in which they should run.
        files: small files of the new folder, config.json among them.
        index: whether to write a Hugging Face index.
    """

    what: str
    tasks: Sequence[Task]
    files: Mapping[str, bytes]
    index: bool

    @property
    def bytes(self) -> int:
        return sum(task.bytes for task in self.tasks)

    @property
    def outputs(self) -> list[Output]:
        return [output for task in self.tasks for output in task.writes]

    def memory(self, workers: int) -> int:
        """Returns the most bytes of tensors held at once."""
        return sum(sorted((task.memory for task in self.tasks), reverse=True)[:workers])

    def identity(self) -> str:
        """Returns a digest of the operation and of its input files."""
        sources = {part.file.resolve() for task in self.tasks for info in task.reads for part in info.parts}
        known = sorted((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sources)
        outputs = [(*output.key, output.dtype, output.shape) for output in self.outputs]
        small = {name: sha256(data).hexdigest() for name, data in self.files.items()}
        return sha256(json.dumps([self.what, known, outputs, small]).encode()).hexdigest()


def run_job(job: Job, target: Path, *, workers: int = 2, progress: Report | None = None) -> None:
    """Writes the folder `target`, or resumes writing it; see `mtp_spec.model.checkpoint.writer`.

    Args:
        workers: threads, each with one task's tensors in memory.
        progress: called with (bytes done, bytes in all) after each task.

    Raises:
        CheckpointError: the folder exists, another run is writing it, the disk is full or fails, a source ends early.
    """
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target} exists: give a new folder, nothing is overwritten")
    part = target.with_name(target.name + PART)
    for place in (part, *target.absolute().parents):
        if place.exists() and not place.is_dir():
            raise CheckpointError(f"{place} is a file, so {target} cannot be written: give another folder")
    try:
        with Assembly(target, job.outputs, job.identity()) as folder:
            _run(job, folder, workers, progress)
            folder.finish(job.files, job.index)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cause = f"no space is left on the disk of {target}" if full else f"writing {target} failed ({error})"
        raise CheckpointError(
            f"{cause}. The whole takes {job.bytes / 1e9:.1f} GB; what is written is kept in {target.name}{PART}: run "
            "the same command again when there is room, and it goes on"
        ) from error


def _run(job: Job, folder: Assembly, workers: int, progress: Report | None) -> None:
    total, done = job.bytes, 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    def step(task: Task) -> int:
        with torch.no_grad():
            tensors = [read_tensor(info) for info in task.reads]
            for output, tensor in zip(task.writes, task.work(tensors), strict=True):
                folder.write(output, tensor)
        return task.bytes

    intact = {key for key, same in in_parallel(folder.check, folder.listed(), workers) if same}
    left = []
    for task in job.tasks:
        if all(output.key in intact for output in task.writes):
            advance(task.bytes)
        else:
            left.append(task)
    folder.check_room(sum(task.bytes for task in left))
    for size in in_parallel(step, left, workers):
        advance(size)


def in_parallel(step: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """Yields results as they complete; an error or interrupt stops it after the steps in progress."""
    following = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(step, item) for item in islice(following, workers)}
        while running:
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                yield future.result()
            running |= {pool.submit(step, item) for item in islice(following, len(ended))}


def carried_files(folder: Path) -> dict[str, bytes]:
    """Returns a folder's small files: config, generation config, tokenizer, code, licence; no weights."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith(".")]
    small = [file for file in files if not file.name.endswith(NOT_CARRIED) and file.stat().st_size <= SMALL_BYTES]
    try:
        return {file.name: file.read_bytes() for file in small}
    except OSError as error:
        raise CheckpointError(f"a file to be carried along cannot be read ({error}): make it readable") from error
