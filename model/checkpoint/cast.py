"""FP8 checkpoints to bfloat16 and back: a Hugging Face folder in, a Hugging Face folder out, file for file.

To FP8, the matrices of attention, MLPs and experts get e4m3 numbers and one scale for each 128x128 block, as in the
released checkpoints; embedding, head, gates, norms and an MTP module's `eh_proj` stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_spec.kernels.fp8 import BLOCK, E4M3, block_counts, weight_dequant, weight_quant
from mtp_spec.kernels.fp8_cpu import dequantise, quantise
from mtp_spec.model.checkpoint.folder import open_checkpoint
from mtp_spec.model.checkpoint.jobs import Job, Task, carried_files
from mtp_spec.model.checkpoint.narrow import WIDE, is_packed
from mtp_spec.model.checkpoint.writer import CHECKSUMS, Output, as_json
from mtp_spec.model.errors import CheckpointError
from mtp_spec.model.files.deepseek import rank_files
from mtp_spec.model.files.formats import POWERS, SCALE
from mtp_spec.model.files.tensors import TensorInfo, widen_scales

KINDS = ("bf16", "fp8")
CHUNK_NUMBERS = 2**22  # computed at once, in float32
CHUNK_BYTES = 4 * 4 * CHUNK_NUMBERS  # the numbers, their scales, the result and a temporary


def cast_job(folder: Path, to: str, *, device: str = "cpu", scale_fmt: str | None = None) -> Job:
    """Returns the job that casts a folder.

    Args:
        folder: a Hugging Face folder, checked whole before anything is written.
        to: "bf16" or "fp8".
        device: where numbers are computed, "cpu" or "cuda".
        scale_fmt: "ue8m0" rounds scales up to powers of two (only to "fp8").

    Raises:
        CheckpointError: a scale is missing, a file truncated, a shape wrong, or there is nothing to cast.
    """
    if rank_files(folder):
        raise CheckpointError(f"{folder} holds per-rank files: convert it to a Hugging Face folder first (--to-hf)")
    checkpoint = open_checkpoint(folder)
    tensors = checkpoint.tensors
    packed = [name for name, info in tensors.items() if info.dtype == "F8_E4M3"]
    if to == "bf16" and not packed:
        raise CheckpointError(f"{folder} holds no FP8 tensors: there is nothing to cast to bf16")
    if to == "fp8" and packed:
        raise CheckpointError(f"{folder} holds {len(packed)} FP8 tensors already: cast it to bf16 first")
    names = sorted(tensors, key=lambda name: (str(tensors[name].file), tensors[name].parts[0].start))
    if to == "bf16":
        block = (checkpoint.config.fp8_block or (BLOCK, BLOCK))[0]
        tasks = [widened(name, tensors, block, device) for name in names if not name.endswith(SCALE)]
    else:
        tasks = [narrowed(name, tensors[name], device, scale_fmt == POWERS) for name in names]
    files = carried_files(folder)
    files.pop(CHECKSUMS, None)
    files["config.json"] = as_json(_config(json.loads(files["config.json"]), to, scale_fmt))
    return Job(f"cast to {to} {scale_fmt}", tasks, files, index=True)


def _config(values: dict[str, Any], to: str, scale_fmt: str | None) -> dict[str, Any]:
    """Returns config.json with or without its quantisation."""
    values.pop("quantization_config", None)
    for name in ("torch_dtype", "dtype"):
        if name in values:
            values[name] = "bfloat16"
    if to == "fp8":
        values["quantization_config"] = {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK],
            **({"scale_fmt": scale_fmt} if scale_fmt else {}),
        }  # fmt: skip
    return values


def copied(name: str, info: TensorInfo) -> Task:
    """Returns the task that writes a tensor unchanged, to a file of the same name."""
    return Task((info,), (Output(info.file.name, name, info.dtype, info.shape),), lambda tensors: tensors)


def widened(name: str, tensors: Mapping[str, TensorInfo], block: int, device: str) -> Task:
    """Returns the task that writes a tensor in bfloat16 if it is FP8, else unchanged."""
    info = tensors[name]
    if info.dtype != "F8_E4M3":
        return copied(name, info)
    output = Output(info.file.name, name, "BF16", info.shape)
    work = partial(_dequantise, block=block, device=device)
    return Task((info, tensors[name + SCALE]), (output,), work, output.bytes + CHUNK_BYTES)


def narrowed(name: str, info: TensorInfo, device: str, powers: bool) -> Task:
    """Returns the task that writes a matrix as FP8 with scales, or unchanged if released checkpoints do not pack it."""
    if not is_packed(name, info.shape):
        return copied(name, info)
    if info.dtype not in WIDE:
        raise CheckpointError(f"{name} is {info.dtype}: only {', '.join(WIDE)} can be cast to FP8")
    file, blocks = info.file.name, block_counts(info.shape[0], info.shape[1])
    outputs = Output(file, name, "F8_E4M3", info.shape), Output(file, name + SCALE, "F32", blocks)
    work = partial(_quantise, name=name, device=device, powers=powers)
    return Task((info,), outputs, work, sum(output.bytes for output in outputs) + CHUNK_BYTES)


def _dequantise(tensors: list[Tensor], block: int, device: str) -> Iterator[Tensor]:
    weight, scale = tensors[0], widen_scales(tensors[1])
    if device == "cpu":
        yield dequantise(weight, scale, block)
        return
    out = torch.empty(weight.shape, dtype=torch.bfloat16)

    def chunk(rows: slice, blocks: slice) -> None:
        out[rows] = weight_dequant(weight[rows].to(device), scale[blocks].to(device), block, torch.bfloat16)

    _by_blocks(weight.shape, block, chunk)
    yield out


def _quantise(tensors: list[Tensor], name: str, device: str, powers: bool) -> Iterator[Tensor]:
    weight = tensors[0]

    def chunk(rows: slice, blocks: slice) -> None:
        part = weight[rows].to(device)
        if not part.isfinite().all():
            raise ValueError("NaN or infinity has no FP8")
        out[rows], scales[blocks] = weight_quant(part, BLOCK, powers)

    try:
        if device == "cpu":
            out, scales = quantise(weight, BLOCK, powers)
        else:
            out, scales = torch.empty(weight.shape, dtype=E4M3), torch.empty(block_counts(*weight.shape))
            _by_blocks(weight.shape, BLOCK, chunk)
    except ValueError as error:
        message = f"{name} holds NaN or infinity: FP8 cannot keep them, correct the checkpoint"
        raise CheckpointError(message) from error
    yield out
    yield scales


def _by_blocks(shape: torch.Size, block: int, work: Callable[[slice, slice], None]) -> None:
    """Calls `work` with slices of a matrix's rows, in whole blocks, and of the rows of its scales."""
    step = max(1, CHUNK_NUMBERS // (shape[1] * block))
    for first in range(0, -(-shape[0] // block), step):
        work(slice(first * block, (first + step) * block), slice(first, first + step))
