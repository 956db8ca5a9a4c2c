"""Converts FP8 weights to wider types and back on a CPU: bit for bit as `fp8`, at memory speed."""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_spec.kernels.fp8 import BLOCK, E4M3, E4M3_MAX, block_counts, block_scale, weight_dequant

NANS = (0x7F, 0xFF)
PLACES = 16  # a factor that shifts e4m3's bits to those of a bfloat16
SIGN_AND_NUMBER = -0x7810  # 0x87F0: bfloat16's bits that come from e4m3; the sign was copied to four more
RATIO = 2.0**120  # of e4m3 values, subnormal ones included, to bfloat16 values with these bits


def dequantise(
    weight: Tensor, scale: Tensor, block: int = BLOCK, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None
) -> Tensor:
    """Returns w `[N, K]` times its block scales, as `fp8.weight_dequant`.

    Args:
        weight: on the CPU.
        scale: float32, one for each block.
        out: the output; None makes a tensor of `dtype`.

    Raises:
        ValueError: the scales do not match the blocks.
    """
    rows, columns = weight.shape
    if tuple(scale.shape) != block_counts(rows, columns, block):
        return weight_dequant(weight, scale, block, dtype)  # raises with what is wrong
    out = torch.empty(rows, columns, dtype=dtype) if out is None else out
    factors = scale.float() * RATIO
    direct = out.dtype == torch.bfloat16 and out.is_contiguous() and columns % block == 0
    direct = direct and bool(factors.isfinite().all()) and _keeps_subnormals()
    room = torch.empty(block, columns, dtype=torch.int16)
    for number, (part, target) in enumerate(zip(weight.split(block), out.split(block), strict=True)):
        codes = part.view(torch.uint8)
        if direct and codes.amax() != NANS[1] and codes.view(torch.int8).amax() != NANS[0]:
            bits = room[: len(part)].copy_(part.view(torch.int8)).mul_(PLACES).bitwise_and_(SIGN_AND_NUMBER)
            _times(bits.view(torch.bfloat16), factors[number], target)
        else:
            target.copy_(weight_dequant(part, scale[number : number + 1], block, out.dtype))
    return out


def _times(x: Tensor, factors: Tensor, out: Tensor) -> None:
    """Writes bfloat16 x `[N, K]` times float32 factors `[C]`, one for each K / C columns, rounded once, to out.

    Uses torch's batch normalisation with mean 0 and variance 1, each factor a channel's weight: the only torch
    operation that multiplies two types in one pass, instead of three via float32. A bias of -0 keeps a zero's sign.
    """
    channels = len(factors)
    bias, mean, variance = (torch.full((channels,), value, dtype=torch.float32) for value in (-0.0, 0.0, 1.0))
    torch.ops.aten.native_batch_norm.out(
        x.view(len(x), channels, -1), factors, bias, mean, variance, False, 0.0, 0.0,
        out=out.view(len(x), channels, -1), save_mean=factors.new_empty(0), save_invstd=factors.new_empty(0),
    )  # fmt: skip


def _keeps_subnormals() -> bool:
    """Returns whether all threads keep bfloat16's subnormal numbers; `torch.set_flush_denormal` makes them 0."""
    value, wide = torch.finfo(torch.bfloat16).smallest_normal / 2, torch.float32
    smallest = torch.full((torch.get_num_threads(), BLOCK), value, dtype=wide)
    found = torch.empty(smallest.shape, dtype=torch.bfloat16)
    _times(smallest.bfloat16(), torch.tensor([RATIO], dtype=wide), found)
    return bool(found.all())


def quantise(weight: Tensor, block: int = BLOCK, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Returns w `[N, K]` as e4m3 and block scales, as `fp8.weight_quant`.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    rows, columns = weight.shape
    out, wide = torch.empty(rows, columns, dtype=E4M3), torch.float32
    scales = torch.empty(block_counts(rows, columns, block), dtype=wide)
    padded = torch.zeros(scales.shape[1] * block, dtype=wide)
    for number, first in enumerate(range(0, rows, block)):
        part = weight[first : first + block].to(torch.float32, copy=True)
        padded[:columns] = part.abs().amax(0)
        amax = padded.view(-1, block).amax(1)
        if not amax.isfinite().all():
            raise ValueError("NaN or infinity has no FP8")
        scales[number] = block_scale(amax, power_of_two)
        part /= scales[number].repeat_interleave(block)[:columns]
        out[first : first + block] = part.clamp_(-E4M3_MAX, E4M3_MAX)
    return out, scales
