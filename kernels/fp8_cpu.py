"""FP8 weights to wider numbers and back on a CPU: bit for bit what `fp8` computes, at the pace of memory."""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_spec.kernels.fp8 import BLOCK, E4M3, E4M3_MAX, RATIO, block_counts, block_scale, lowered, weight_dequant

NAN = 0xFE  # without its sign, moved one place up
CHUNK_NUMBERS = 2**20  # at once: what a processor's caches hold


def dequantise(
    weight: Tensor, scale: Tensor, block: int = BLOCK, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None
) -> Tensor:
    """Returns w `[N, K]` times its block scales, as `fp8.weight_dequant`.

    Args:
        weight: on the CPU.  scale: float32, one for each block.
        out: where to write; None makes a tensor of `dtype`.

    Raises:
        ValueError: the scales do not match the blocks.
    """
    rows, columns = weight.shape
    if tuple(scale.shape) != block_counts(rows, columns, block):
        return weight_dequant(weight, scale, block, dtype)  # says what is wrong
    out = torch.empty(rows, columns, dtype=dtype) if out is None else out
    plain = scale.float().repeat_interleave(block, 1)[:, :columns]
    step, lifted = _rows_at_once(columns, block), plain * RATIO
    exact = bool(lifted.isfinite().all())
    half, wide = torch.empty(step, columns, dtype=torch.int16), torch.empty(step, columns)
    for first in range(0, rows, step):
        part = weight[first : first + step]
        blocks = slice(first // block, -(-(first + len(part)) // block))
        if not exact or (part.view(torch.uint8) << 1).amax() == NAN:
            out[first : first + step] = part.float() * plain[blocks].repeat_interleave(block, 0)[: len(part)]
            continue
        bits, numbers = half[: len(part)], wide[: len(part)]
        numbers.copy_(lowered(part, bits))
        for row, line in enumerate(lifted[blocks]):
            numbers[row * block : (row + 1) * block].mul_(line)
        out[first : first + step] = numbers
    return out


def quantise(weight: Tensor, block: int = BLOCK, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Returns w `[N, K]` as e4m3 and block scales, as `fp8.weight_quant`.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    rows, columns = weight.shape
    out, scales = torch.empty(rows, columns, dtype=E4M3), torch.empty(block_counts(rows, columns, block))
    padded = torch.zeros(scales.shape[1] * block)
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


def _rows_at_once(columns: int, block: int) -> int:
    """Returns as many rows of blocks as `CHUNK_NUMBERS` are, or a part of one, divided by two again and again."""
    step = block * max(1, CHUNK_NUMBERS // (block * columns))
    while step % 2 == 0 and step * columns > CHUNK_NUMBERS and step <= block:
        step //= 2
    return step
