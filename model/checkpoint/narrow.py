"""Converts wide matrices to FP8 as they are read, to the same bits that `mtp-spec cast --to fp8` writes."""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_spec.kernels.fp8 import BLOCK, weight_quant
from mtp_spec.kernels.fp8_cpu import quantise
from mtp_spec.model.errors import CheckpointError

WIDE = ("BF16", "F16", "F32")


def is_packed(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is FP8 in released checkpoints."""
    packed = name.endswith(("_proj.weight", "_with_mqa.weight")) and not name.endswith("eh_proj.weight")
    return len(shape) == 2 and packed


def narrow(name: str, weight: Tensor, rows: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Returns the first rows of a matrix as e4m3, and their block scales.

    Args:
        weight: whole blocks of rows, or the end of a matrix.
        device: where they are computed and stored.

    Raises:
        CheckpointError: NaN or infinity, which FP8 cannot keep.
    """
    try:
        if torch.device(device).type == "cpu":
            values, scales = quantise(weight)
        else:
            weight = weight.to(device)
            if not weight.isfinite().all():
                raise ValueError("NaN or infinity has no FP8")
            values, scales = weight_quant(weight)
    except ValueError as error:
        message = f"{name} holds NaN or infinity: FP8 cannot keep them, correct the checkpoint"
        raise CheckpointError(message) from error
    return values[:rows], scales[: -(-rows // BLOCK)]
