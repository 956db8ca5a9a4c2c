"""FP8 e4m3 with block scales in plain torch, the reference with which every kernel is compared.

Scales follow DeepSeek-V3 (2412.19437 section 3.3): activations one scale for each row and 128 channels, weights one
for each 128x128 block; real value = stored value * scale ("scale_inv" in checkpoints). Sizes that are no multiple
of the block have a smaller last block. An all-zero block has scale 1.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_spec.kernels import ordered

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max
BLOCK = 128
VALUES = torch.arange(256, dtype=torch.uint8).view(E4M3).float().numpy()  # of every byte, including NaN
PLACES = 128  # a factor that shifts bits by seven
SIGN_AND_NUMBER = -0x4080  # 0xBF80: float16's bits that come from e4m3; the sign was copied to one more
FEW = 2**15  # up to here a table lookup is faster
RATIO = 256.0  # of e4m3 values to float16 values with these bits


def widen(x: Tensor) -> Tensor:
    """Returns e4m3 x `[...]` as float32.

    On a CPU torch converts e4m3 element by element. Few numbers are looked up in a table. Otherwise bits are shifted up
    by seven, which gives a float16 that is `RATIO` times smaller, subnormal numbers included: integer operations and
    conversions from float16 are vectorised and use torch's threads.
    """
    if x.device.type != "cpu":
        return x.float()
    if x.numel() > FEW:
        bits = x.view(torch.int8).to(torch.int16).mul_(PLACES).bitwise_and_(SIGN_AND_NUMBER)
        wide = bits.view(torch.float16).float().mul_(RATIO)
        low, high = wide.aminmax()
        if max(-low, high) <= E4M3_MAX:  # else there is a NaN, which would become a number
            return wide
    values = np.take(VALUES, x.view(torch.uint8).numpy(), mode="clip")  # skips the check of the indices
    return torch.from_numpy(np.asarray(values))


def _to_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    # rounding can push the quotient past the largest value, which the cast would turn into NaN
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def block_scale(amax: Tensor, power_of_two: bool) -> Tensor:
    """Returns float32 scales of blocks with these largest magnitudes; see `act_quant`."""
    scale = torch.where(amax > 0, amax / E4M3_MAX, torch.ones_like(amax))
    return scale.log2().ceil().exp2() if power_of_two else scale


def block_counts(rows: int, columns: int, block_size: int = BLOCK) -> tuple[int, int]:
    """Returns the number of blocks, and so of scales, along each axis of a matrix."""
    return -(-rows // block_size), -(-columns // block_size)


def act_quant(x: Tensor, block_size: int = BLOCK, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Returns x `[..., K]` as e4m3 and scales `[..., ceil(K / block)]` float32.

    Args:
        power_of_two: round scales up to powers of two, DeepSeek-V3.1's "ue8m0".
    """
    columns = x.shape[-1]
    blocks = -(-columns // block_size)
    wide = F.pad(x.float(), (0, blocks * block_size - columns)).unflatten(-1, (blocks, block_size))
    scale = block_scale(wide.abs().amax(-1), power_of_two)
    return _to_e4m3(wide, scale.unsqueeze(-1)).flatten(-2)[..., :columns].contiguous(), scale


def weight_quant(w: Tensor, block_size: int = BLOCK, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Returns w `[N, K]` as e4m3 and scales `[ceil(N / block), ceil(K / block)]` float32; see `act_quant`."""
    rows, columns = w.shape
    row_blocks, column_blocks = block_counts(rows, columns, block_size)
    pad = (0, column_blocks * block_size - columns, 0, row_blocks * block_size - rows)
    blocks = F.pad(w.float(), pad).view(row_blocks, block_size, column_blocks, block_size)
    scale = block_scale(blocks.abs().amax((1, 3)), power_of_two)
    quantised = _to_e4m3(blocks, scale[:, None, :, None]).view(row_blocks * block_size, column_blocks * block_size)
    return quantised[:rows, :columns].contiguous(), scale


def weight_dequant(w: Tensor, scale: Tensor, block_size: int = BLOCK, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Returns w `[N, K]` times its block scales, in `dtype`.

    Raises:
        ValueError: the scales do not match the blocks.
    """
    rows, columns = w.shape
    expected = block_counts(rows, columns, block_size)
    if tuple(scale.shape) != expected:
        raise ValueError(f"scales {tuple(scale.shape)} for a weight {tuple(w.shape)}: expected {expected}")
    columns_scale = scale.float().repeat_interleave(block_size, 1)[:, :columns]
    out = torch.empty(w.shape, dtype=dtype, device=w.device)
    for block, part in enumerate(w.split(block_size)):  # a row of blocks fits into the processor's cache
        out[block * block_size : block * block_size + len(part)] = widen(part) * columns_scale[block]
    return out


def fp8_gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, block_size: int = BLOCK) -> Tensor:
    """Returns a `[M, K]` @ b `[N, K]`.T in float32, scaled block by block of K as the kernels do."""
    if block_size == BLOCK and (found := ordered.scaled_products(a, a_scale, b, b_scale)) is not None:
        return found
    columns = b_scale.repeat_interleave(block_size, 0)[: b.shape[0]]
    out = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float32, device=a.device)
    blocks = (widen(x).split(block_size, 1) for x in (a, b))
    for block, (left, right) in enumerate(zip(*blocks, strict=True)):
        out += ordered.products(left, right) * a_scale[:, block, None] * columns[:, block]
    return out
