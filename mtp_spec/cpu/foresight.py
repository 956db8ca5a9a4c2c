"""Predicts tokens per second on a CPU from the bytes that a step reads and the engine's read rate on this machine.

A plain step of one sequence reads every weight that it uses once, and with a large model that takes nearly all of its
time: `mtp-spec bench cpu` compares the two. The rate is measured with the engine's own products, so that it includes
the conversion of FP8. It does not include a long context, layers too small to split among threads, or sampling. So the
predicted speed is an upper bound, and a model as small as the bundled one reaches 0.6 of it. Weights that do not fit in
memory are read from the disk in every step.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from mtp_spec import host_memory
from mtp_spec.kernels.cpu.engine import HeadStruct, Matrix, library
from mtp_spec.kernels.cpu.team import TEAM
from mtp_spec.memory import check_own
from mtp_spec.model.checkpoint.folder import Checkpoint
from mtp_spec.model.checkpoint.found import EMBEDDING
from mtp_spec.model.cpu.checkpoint import footprint, kept_weights
from mtp_spec.model.cpu.room import zeros
from mtp_spec.model.distributed.group import Ranks
from mtp_spec.model.files.deepseek import layer_of

READ_BYTES = 2**28  # of the matrix that is multiplied repeatedly: larger than processor caches
SECONDS = 0.15  # for measuring a rate, with at least TIMES products
TIMES = 3
PART = 8  # measuring uses at most one PART-th of the free memory
FEW = 0.02  # types of weights with a smaller share are assumed to be read as fast as the others
DISK_BYTES = 2**23  # mapped and read at a time
PAGE_BYTES = 4096
ONE = 0x38  # 1.0 in e4m3
NAMES = {torch.float8_e4m3fn: "FP8", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Bytes of weights that a plain step of one sequence reads.

    Attributes:
        kinds: bytes by dtype, chosen experts included.
        chosen: bytes of the chosen experts.
        kept: bytes by dtype of everything that steps may read, all experts included.
        experts: bytes of all experts.
    """

    kinds: dict[torch.dtype, int]
    chosen: int
    kept: dict[torch.dtype, int]
    experts: int

    @property
    def total(self) -> int:
        return sum(self.kinds.values())

    def missing(self, room: int) -> int:
        """Returns the bytes of a step that are not in memory if `room` bytes of weights fit.

        What every step reads stays in memory; of the experts the most recently read stay, and any may be chosen.
        """
        always = self.total - self.chosen
        if room <= always:
            return self.total  # the least recently read weights are evicted, and exactly those are read next
        return round(self.chosen * max(0.0, 1 - (room - always) / max(1, self.experts)))


@dataclass(frozen=True, slots=True)
class Foreseen:
    """A predicted speed and its inputs.

    Attributes:
        step: bytes of weights that a step reads.
        rates: the engine's read rate in bytes per second, by dtype name.
        threads: number of threads that read.
        missing: bytes of a step that come from the disk.
        disk_rate: bytes per second from the disk; None if it is not needed or cannot be measured.
        tokens_per_second: upper bound for one sequence without speculation; None if the disk's rate is needed but
            unknown.
    """

    step: int
    rates: dict[str, float]
    threads: int
    missing: int
    disk_rate: float | None
    tokens_per_second: float | None

    def __str__(self) -> str:
        listed = ", ".join(f"{name} at {rate / 1e9:.3g} GB/s" for name, rate in self.rates.items())
        parts = f"{_size(self.step)} of weights a token, {listed} by {self.threads} threads, measured now"
        if self.missing:
            rate = "" if self.disk_rate is None else f" at {self.disk_rate / 1e9:.2g} GB/s"
            parts += f"; {_size(self.missing)} of them from the disk{rate}"
        if self.tokens_per_second is None:
            return f"as slow as the disk: {parts}"
        return f"at best {self.tokens_per_second:,.3g} tokens/s of one text without speculation: {parts}"


def step_bytes(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> StepBytes:
    """Returns what a plain step reads of a checkpoint that is loaded with this dtype, from the files' headers."""
    config = checkpoint.config
    share = config.num_experts_per_tok / config.n_routed_experts
    kinds, chosen, kept = Counter[torch.dtype](), Counter[torch.dtype](), Counter[torch.dtype]()
    experts = 0
    for name, (kind, size, _) in kept_weights(checkpoint, dtype).items():
        if layer_of(name) >= config.num_hidden_layers or (name == EMBEDDING and not config.tie_word_embeddings):
            continue  # a step reads one row of the embedding
        kept[kind] += size
        if ".mlp.experts." in name:
            chosen[kind] += size
            experts += size
        else:
            kinds[kind] += size
    read = {kind: kinds[kind] + round(chosen[kind] * share) for kind in kept}
    return StepBytes(read, sum(read.values()) - kinds.total(), dict(kept), experts)


def check_engine(checkpoint: Checkpoint, dtype: torch.dtype | None, ranks: Ranks) -> None:
    """Rejects copied weights that do not fit in memory; warns of memory-mapped weights that do not.

    Mapped weights work, but what does not fit is read from the disk in every step.

    Raises:
        MTPSpecError: the copied weights exceed the free memory.
    """
    found, room = footprint(checkpoint, dtype), host_memory.room_for_files()
    check_own(found.own, bool(checkpoint.narrowed), dtype)
    own_part = found.own + found.mapped // ranks.size  # ranks read their parts of mapped matrices
    if room is None or own_part <= room or not found.mapped:
        return
    expected = f", {foresee(checkpoint, dtype)}" if ranks.size == 1 else ""
    halved = sum(size for kind, size, _ in kept_weights(checkpoint, dtype).values() if kind == torch.bfloat16)
    remedy = ", or mtp-spec cast --to fp8, which halves bfloat16 matrices" if 2 * halved > found.total else ""
    warnings.warn(
        f"{checkpoint.folder}: {_size(own_part)} of weights do not fit in the {_size(room)} of memory that are free "
        f"and are read from the disk again and again{expected}. Use a machine with more memory{remedy}", stacklevel=5,
    )  # fmt: skip


def foresee(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Foreseen:
    """Measures for some tenths of a second and returns the predicted speed."""
    step, threads, room = step_bytes(checkpoint, dtype), torch.get_num_threads(), host_memory.room_for_files()
    whole, most = step.total, READ_BYTES if room is None else min(READ_BYTES, room // PART)
    measured = {
        kind: engine_rate(kind, min(most, step.kept[kind]), checkpoint.config.hidden_size)
        for kind, size in step.kinds.items() if size >= FEW * whole
    }  # fmt: skip
    # the rest is assumed to be read at the average rate of the measured types
    measured_bytes = sum(step.kinds[kind] for kind in measured)
    seconds = sum(step.kinds[kind] / rate for kind, rate in measured.items()) * whole / measured_bytes
    missing, disk = 0, None
    if room is not None and footprint(checkpoint, dtype).total > room:
        missing = step.missing(room)
        disk = disk_rate(max({info.file for info in checkpoint.tensors.values()}, key=lambda file: file.stat().st_size))
    if missing:
        seconds = seconds + missing / disk if disk is not None else float("inf")
    rates = {NAMES[kind]: rate for kind, rate in measured.items()}
    return Foreseen(whole, rates, threads, missing, disk, 1 / seconds if seconds < float("inf") else None)


def engine_rate(kind: torch.dtype, size: int, columns: int) -> float:
    """Returns the bytes per second at which the engine multiplies one row by a matrix of about `size` bytes.

    The fastest of several products counts: on a shared machine the slower ones show the load of others.
    """
    rows, threads = max(1, size // (columns * kind.itemsize)), torch.get_num_threads()
    if kind == torch.float8_e4m3fn:
        data = torch.full((rows, columns), ONE, dtype=torch.uint8).view(kind)
        matrix = Matrix(data, torch.ones(-(-rows // 128), -(-columns // 128)))
    else:
        matrix = Matrix(torch.ones(rows, columns, dtype=kind))
    hidden, out = torch.ones(1, columns), torch.empty(1, rows)
    engine, struct = library(), matrix.struct()
    room = zeros(engine.head_memory(ctypes.byref(struct), threads))
    taken = list[float]()
    begin = perf_counter()
    while len(taken) < TIMES or perf_counter() - begin < SECONDS:
        start = perf_counter()
        with TEAM.called(threads) as able:
            engine.head(ctypes.byref(HeadStruct(
                struct, hidden.data_ptr(), out.data_ptr(), 1, able, 0, rows, room.data_ptr(),
            )))  # fmt: skip
        taken.append(perf_counter() - start)
    TEAM.release(matrix, hidden, out, room)
    return matrix.data.nbytes / min(taken)


def disk_rate(file: Path) -> float | None:
    """Returns the bytes per second at which mapped pages of a file are read from the disk; None if the system offers no
    way to drop a file from its page cache."""
    if not hasattr(os, "posix_fadvise"):
        return None
    size = file.stat().st_size
    count, read, taken = max(1, size // DISK_BYTES), 0, 0.0
    descriptor = os.open(file, os.O_RDONLY)
    try:
        for number in range(count):
            start = number * 7919 % count * DISK_BYTES  # scattered over the file, as experts are
            length = min(DISK_BYTES, size - start)
            os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)
            begin = perf_counter()
            with mmap.mmap(descriptor, length, access=mmap.ACCESS_READ, offset=start) as mapped:
                mapped[::PAGE_BYTES]  # one byte of each page
            taken += perf_counter() - begin
            read += length
            if taken > SECONDS:
                break
    finally:
        os.close(descriptor)
    return read / taken


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"
