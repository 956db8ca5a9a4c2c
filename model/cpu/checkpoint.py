"""Loads a checkpoint onto the CPU engine, weights as they are stored.

Small models are read. The files of large ones are mapped into memory: they load at once, share memory with other
processes and take only as much as is used. Truncating such a file while a model runs kills the process.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from mtp_spec.kernels.cpu.engine import KINDS, library
from mtp_spec.kernels.fp8 import block_counts
from mtp_spec.kernels.fp8_cpu import dequantise
from mtp_spec.model.checkpoint.folder import Checkpoint, Report, square_block, stored_weights
from mtp_spec.model.checkpoint.narrow import narrow
from mtp_spec.model.cpu.model import CPUModel
from mtp_spec.model.distributed.group import ALONE, Ranks
from mtp_spec.model.errors import CheckpointError
from mtp_spec.model.files.formats import SCALE
from mtp_spec.model.files.tensors import DTYPES, Part, TensorInfo, read_part, read_tensor, widen_scales

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAPPED_BYTES = 2**30  # models from this size on are mapped
SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of a model's weights on the engine.

    Attributes:
        own: in the process's own memory: read, rounded, converted to FP8 or joined.
        mapped: in the files, which the system reads on use and drops when it needs the memory.
    """

    own: int
    mapped: int

    @property
    def total(self) -> int:
        return self.own + self.mapped


def kept_weights(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> dict[str, tuple[torch.dtype, int, bool]]:
    """Returns for every weight except scales: the type that `load_cpu_model` keeps it in, its bytes with its scales,
    and whether it stays in its file."""
    tensors = stored_weights(checkpoint)
    mapped = sum(info.bytes for info in tensors.values()) >= MAPPED_BYTES
    kept: dict[str, tuple[torch.dtype, int, bool]] = {}
    for name, info in tensors.items():
        if name.endswith(SCALE):
            continue
        numbers, blocks, stored = prod(info.shape), 0, torch.float32 if info.dtype == "F64" else DTYPES[info.dtype]
        if name in checkpoint.narrowed:
            stored, blocks = torch.float8_e4m3fn, prod(block_counts(*info.shape))
        elif name + SCALE in tensors:
            blocks = prod(tensors[name + SCALE].shape)
        kind = _kind(name, len(info.shape), stored, dtype)
        if kind != stored:
            blocks = 0
        in_file = mapped and kind == DTYPES[info.dtype] and _lies_whole(info)
        kept[name] = kind, numbers * kind.itemsize + blocks * SCALE_BYTES, in_file
    return kept


def footprint(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Footprint:
    """Returns the memory that `load_cpu_model` with this dtype will take, from the files' headers."""
    sizes = [(size, in_file) for _, size, in_file in kept_weights(checkpoint, dtype).values()]
    return Footprint(*(sum(size for size, in_file in sizes if in_file == mapped) for mapped in (False, True)))


def load_cpu_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    progress: Report | None = None,
    draft_ids: Sequence[int] | None = None,
    ranks: Ranks = ALONE,
) -> CPUModel:
    """Returns the model with its weights as they are stored.

    Args:
        dtype: bfloat16 or float16: matrices stored in another type are rounded to it, in newly allocated memory. None
            and float32 leave them as they are; arithmetic is float32 in any case.
        progress: called with (bytes done, bytes in all) after each tensor.
        draft_ids: the tokens that may be drafted; None for all.
        ranks: the ranks that share the work. Each maps all files and reads its own parts of the matrices.

    Raises:
        CheckpointError: a matrix holds NaN, or infinity if it is converted to FP8.
    """
    tensors = stored_weights(checkpoint)
    total, done = sum(info.bytes for info in tensors.values()), 0
    files, block = _Files(total >= MAPPED_BYTES), square_block(checkpoint.config)
    weights: dict[str, Tensor] = {}
    for name in sorted(tensors, key=lambda name: not name.endswith(SCALE)):  # a matrix comes after its scales
        info = tensors[name]
        weight = files.read(info)
        if name.endswith(SCALE):
            weights[name] = widen_scales(weight).contiguous()
        else:
            if name in checkpoint.narrowed:
                weight, weights[name + SCALE] = narrow(name, weight, len(weight), "cpu")
            elif weight.dtype == torch.float8_e4m3fn:
                _check_numbers(name, weight, info)
            kind = _kind(name, weight.dim(), weight.dtype, dtype)
            scale = weights.pop(name + SCALE, None) if kind != weight.dtype else None
            weights[name] = weight.to(kind) if scale is None else dequantise(weight, scale, block, kind)
        done += info.bytes
        if progress is not None:
            progress(done, total)
    model = CPUModel(checkpoint.config, weights, ranks)
    if draft_ids is not None:
        model.draft_from(draft_ids)
    return model


def _kind(name: str, dimensions: int, stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """Returns the type that a weight is kept in: its own, the requested one, or float32 if neither is possible."""
    if dimensions == 2 and dtype in (torch.bfloat16, torch.float16):
        return dtype
    # embeddings are read by single rows and vectors whole, so without block scales. No products for integers
    plain = dimensions != 2 or name.endswith("embed_tokens.weight") or stored not in KINDS
    return torch.float32 if plain and stored not in FLOATS else stored


def _lies_whole(info: TensorInfo) -> bool:
    """Whether a tensor can be read in place: contiguous in one file, and aligned."""
    divided = info.axis is not None and len(info.parts) > 1
    return info.dtype != "F64" and not divided and not info.parts[0].start % DTYPES[info.dtype].itemsize


class _Files:
    """Contents of files, each mapped into memory or read once."""

    def __init__(self, mapped: bool) -> None:
        self._mapped, self._bytes = mapped, dict[Path, Tensor]()

    def read(self, info: TensorInfo) -> Tensor:
        """Returns a tensor, in place if it is contiguous and aligned."""
        kind, part = DTYPES[info.dtype], info.parts[0]
        if not _lies_whole(info):
            tensor = read_tensor(info)
            return tensor.float() if info.dtype == "F64" else tensor
        if part.file not in self._bytes:
            self._bytes[part.file] = self._open(part.file)
        found = self._bytes[part.file][part.start : part.start + info.bytes]
        if len(found) < info.bytes:
            raise CheckpointError(f"{part.file} ended early: another program cut it while it was read")
        return found.view(kind).view(info.shape)

    def _open(self, file: Path) -> Tensor:
        try:
            size = file.stat().st_size
            if not self._mapped:
                return read_part(Part(file, 0, (size,)), "U8")
            return torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error


def _check_numbers(name: str, weight: Tensor, info: TensorInfo) -> None:
    if not library().finite(ctypes.c_void_p(weight.data_ptr()), ctypes.c_int64(weight.numel())):
        raise CheckpointError(f"{name} in {info.file} holds NaN: download the file again")
