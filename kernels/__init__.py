"""The model's kernels: plain-torch references that run anywhere, and Triton kernels for NVIDIA GPUs.

An operation is a file, or a folder if it has several launches: `mla`, `moe`, `sampler`. The reference of a wrapper `x`
is `x_reference`, in the operation's file or in `reference.py` of its folder. References use `fp8` and `ordered`, which
are entirely plain torch. `exchange` has no reference: without its kernel the process group does the exchange.

`act_quant`, `weight_dequant` and `fp8_gemm` have the names and call forms of DeepSeek-V3's inference/kernel.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_spec.kernels import fp8, gemm, quant
from mtp_spec.kernels.fp8 import BLOCK, weight_dequant

__all__ = ["act_quant", "fp8_gemm", "weight_dequant"]


def act_quant(x: Tensor, block_size: int = BLOCK, scale_fmt: str | None = None) -> tuple[Tensor, Tensor]:
    """Returns x `[..., K]` as e4m3 and its scales `[..., K / block_size]` float32.

    Args:
        scale_fmt: "ue8m0" rounds scales up to powers of two.
    """
    if scale_fmt not in (None, "ue8m0"):
        raise ValueError(f"scale_fmt={scale_fmt!r}: None or 'ue8m0'")
    if block_size != BLOCK or not x.is_cuda:
        return fp8.act_quant(x, block_size, scale_fmt is not None)
    values, scales = quant.quant(x.contiguous().flatten(0, -2), scale_fmt is not None)
    return values.view(x.shape), scales.view(*x.shape[:-1], -1)


def fp8_gemm(a: Tensor, a_s: Tensor, b: Tensor, b_s: Tensor) -> Tensor:
    """Returns a `[..., K]` @ b `[N, K]`.T in torch's default dtype; scales as in `act_quant` and checkpoints."""
    flat, scales = a.contiguous().flatten(0, -2), a_s.contiguous().flatten(0, -2)
    return gemm.fp8_gemm(flat, scales, b, b_s, dtype=torch.get_default_dtype()).view(*a.shape[:-1], -1)
