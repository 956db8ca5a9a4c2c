"""What `load` decides before it reads weights: device, dtype, context, and on which code a checkpoint runs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from mtp_spec.errors import OptionError
from mtp_spec.kernels.launching import runs_triton
from mtp_spec.memory import check_memory
from mtp_spec.model.checkpoint import fp8_obstacle, load_checkpoint, load_device_model
from mtp_spec.model.config import load_config
from mtp_spec.model.device import DeviceModel
from mtp_spec.model.transformer import Transformer

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}  # fmt: skip
FP8_CAPABILITY = (8, 9)


def context_limit(folder: Path, max_context: int | None) -> int:
    """Returns the most tokens of prompt and text together."""
    limit = load_config(folder).max_position_embeddings
    if max_context is None:
        return limit
    if isinstance(max_context, bool) or not isinstance(max_context, int) or not 1 < max_context <= limit:
        raise OptionError(f"max_context={max_context!r}: an integer from 2 to {limit}, the model's own limit")
    return max_context


def load_model(
    folder: Path, dtype: torch.dtype | None, device: str, limit: int, report: Any
) -> Transformer | DeviceModel:
    """Returns the model on the FP8 kernels where they run, which None and float8_e4m3fn ask for, else by torch."""
    if dtype in (None, torch.float8_e4m3fn):
        obstacle = _no_fp8_here(device) or fp8_obstacle(folder)
        if obstacle is None:
            check_memory(load_config(folder), limit, device)
            return load_device_model(folder, device, report)
        if dtype is not None:
            raise OptionError(f"dtype={dtype!r}: {obstacle}; leave dtype out to compute in bfloat16")
        if device != "cpu":
            warnings.warn(
                f"{folder} runs in bfloat16 by torch, not on the FP8 kernels: {obstacle}. Text is the same with and "
                "without speculation, but nothing is fast", stacklevel=3,
            )  # fmt: skip
        dtype = torch.bfloat16 if device != "cpu" or _cpu_has_bfloat16() else torch.float32
    return load_checkpoint(folder, dtype=dtype, device=device, progress=report)


def _no_fp8_here(device: str) -> str | None:
    if device.split(":")[0] != "cuda":
        return "FP8 kernels need an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < FP8_CAPABILITY:
        return f"this GPU has compute capability {major}.{minor}, FP8 begins with 8.9"
    return None if runs_triton(torch.empty(0, device=device)) else "Triton is not installed"


def check_device(device: str) -> None:
    """Refuses a device that does not exist here."""
    kind = str(device).split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise OptionError(f'device={device!r}: allowed are "cpu" and "cuda"')
    if kind == "cuda" and not torch.cuda.is_available():
        raise OptionError(
            f'device={device!r}: torch finds no CUDA device here; use device="cpu", or install a CUDA build of torch '
            "on a machine with an NVIDIA GPU"
        )


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Returns the torch dtype that a caller named; None leaves the choice open."""
    if dtype is None:
        return None
    chosen = DTYPES.get(str(dtype).removeprefix("torch."))
    if chosen is None:
        raise OptionError(f"dtype={dtype!r}: allowed are {', '.join(DTYPES)}, or None to choose")
    return chosen


def _cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in checks)
