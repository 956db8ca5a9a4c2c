"""How interpreted.py compares kernels with their references, and where they run."""

from __future__ import annotations

import os

import torch

from mtp_spec.kernels.quant import Operand

HALVES = (torch.bfloat16, torch.float16)
ON = os.environ.get("KERNELS_ON", "cpu")  # on a GPU the kernels run as they are


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    error = (got.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-30)
    assert error <= tolerance, float(error)  # a NaN fails


def values_of(given: Operand | None) -> torch.Tensor:
    """Returns what a product would read, in float32."""
    assert given is not None
    return given.float() if isinstance(given, torch.Tensor) else fp8_values(*given)


def fp8_values(quantised: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return quantised.float() * scales.repeat_interleave(128, 1)[:, : quantised.shape[1]]
