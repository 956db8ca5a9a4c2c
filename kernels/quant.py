"""Fused steps before a product: norm, activation and residual in one pass with the 1x128 quantisation of FP8.

Before a product in bfloat16 or float16 the same steps skip the quantisation.

Each has its plain-torch reference in this file. One program works on one row (or one stretch of it), so a row's bits do
not depend on other rows. Scales as in `fp8.act_quant`; with `power_of_two` they are rounded up to a power of two, as in
DeepSeek-V3.1's "ue8m0" format.

Legend: `M` rows, `D` channels, `B` = ceil(D / 128) blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_spec.kernels import ordered
from mtp_spec.kernels.checks import FLOATS, expect
from mtp_spec.kernels.direct import enqueue
from mtp_spec.kernels.fp8 import BLOCK, E4M3, E4M3_MAX, act_quant
from mtp_spec.kernels.launching import late, next_power, runs_triton

try:
    import triton
    import triton.language as tl

    from mtp_spec.kernels.launching import follow
except ImportError:  # no Triton for this platform: the references remain
    triton = None

STRETCH = 1024  # channels per program of the elementwise kernels
# left operand of a product: e4m3 with scales for FP8 weights, or a tensor of the weights' type
Operand = Tensor | tuple[Tensor, Tensor]


def rms_norm_quant(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, power_of_two: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns e4m3 `[M, D]` and scales `[M, B]` of RMSNorm(x + residual), and the sum x + residual `[M, D]`.

    Args:
        x: `[M, D]`.
        residual: `[M, D]` or None.
        weight: `[D]`.
    """
    _check_norm(x, weight, residual)
    if not runs_triton(x):
        return rms_norm_quant_reference(x, weight, eps, residual, power_of_two)
    quantised, scales = _outputs(x, *x.shape)
    return quantised, scales, _launch_norm(x, weight, eps, residual, quantised, scales, power_of_two)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns RMSNorm(x + residual) in x's dtype and the sum x + residual, both `[M, D]`."""
    _check_norm(x, weight, residual)
    if not runs_triton(x):
        return rms_norm_reference(x, weight, eps, residual)
    out = torch.empty_like(x)
    return out, _launch_norm(x, weight, eps, residual, out, None)


def rms_norm_quant_reference(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, power_of_two: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`rms_norm_quant` in plain torch."""
    out, total = rms_norm_reference(x, weight, eps, residual)
    return *act_quant(out, power_of_two=power_of_two), total


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`rms_norm` in plain torch."""
    total = x if residual is None else x + residual
    return normed(total, weight, eps), total


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm in plain torch: float32 inside, rounded to x's dtype before and after the weight."""
    wide = x.float()
    square = ordered.total(wide.square()).unsqueeze(-1) / x.shape[-1]
    return weight * (wide * torch.rsqrt(square + eps)).to(x.dtype)


def _check_norm(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    expect("x", x, (None, None), FLOATS)
    expect("weight", weight, x.shape[1:], FLOATS, beside=x)
    if residual is not None:
        expect("residual", residual, x.shape, x.dtype, beside=x)


def _launch_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, out: Tensor, scales: Tensor | None,
    power_of_two: bool = False,
) -> Tensor:  # fmt: skip
    """Writes the norm to `out`, quantised if there are scales; returns the sum."""
    rows, channels = x.shape
    total = torch.empty_like(x)
    enqueue(
        _rms_norm_quant_kernel, (rows,),
        x, x if residual is None else residual, weight, out, out if scales is None else scales, total, channels,
        -(-channels // BLOCK), eps, SIZE=next_power(max(channels, BLOCK)), ADD=residual is not None,
        POWER=power_of_two, LARGEST=E4M3_MAX, QUANTISE=scales is not None, num_warps=8 if channels > STRETCH else 4,
        **late(x),
    )  # fmt: skip
    return total


def silu_mul_quant(gate_up: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Returns e4m3 `[M, D]` and scales `[M, B]` of silu(gate) * up for gate_up `[M, 2 D]`."""
    rows, channels = _halves(gate_up)
    if not runs_triton(gate_up):
        return silu_mul_quant_reference(gate_up, power_of_two)
    quantised, scales = _outputs(gate_up, rows, channels)
    _launch_silu(gate_up, quantised, scales, power_of_two)
    return quantised, scales


def silu_mul(gate_up: Tensor) -> Tensor:
    """Returns silu(gate) * up `[M, D]` in gate_up's dtype, rounded once, for gate_up `[M, 2 D]`."""
    rows, channels = _halves(gate_up)
    if not runs_triton(gate_up):
        return silu_mul_reference(gate_up)
    out = gate_up.new_empty(rows, channels)
    _launch_silu(gate_up, out, None)
    return out


def silu_mul_quant_reference(gate_up: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """`silu_mul_quant` in plain torch."""
    return act_quant(_silu_mul(gate_up), power_of_two=power_of_two)


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """`silu_mul` in plain torch."""
    return _silu_mul(gate_up).to(gate_up.dtype)


def _silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return ordered.by_row(F.silu, gate.float()) * up.float()


def _halves(gate_up: Tensor) -> tuple[int, int]:
    """Returns the rows, and the channels of gate and of up, which lie side by side."""
    expect("gate_up", gate_up, (None, None), FLOATS)
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up is {list(gate_up.shape)}: gate and up of one size beside each other are expected")
    return gate_up.shape[0], gate_up.shape[1] // 2


def _launch_silu(gate_up: Tensor, out: Tensor, scales: Tensor | None, power_of_two: bool = False) -> None:
    """Writes the product to `out`, quantised if there are scales."""
    rows, channels = out.shape
    enqueue(
        _silu_mul_quant_kernel, (rows, -(-channels // STRETCH)),
        gate_up, out, out if scales is None else scales, channels, -(-channels // BLOCK), SIZE=STRETCH,
        POWER=power_of_two, LARGEST=E4M3_MAX, QUANTISE=scales is not None, **late(gate_up),
    )  # fmt: skip


def quant(x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Returns e4m3 `[M, D]` and scales `[M, B]` of x `[M, D]`; `fp8.act_quant` as a kernel."""
    expect("x", x, (None, None), FLOATS)
    rows, channels = x.shape
    if not runs_triton(x):
        return quant_reference(x, power_of_two)
    quantised, scales = _outputs(x, rows, channels)
    enqueue(
        _quant_kernel, (rows, -(-channels // STRETCH)),
        x, quantised, scales, channels, scales.shape[1], SIZE=STRETCH, POWER=power_of_two, LARGEST=E4M3_MAX,
        **late(x),
    )  # fmt: skip
    return quantised, scales


def quant_reference(x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """`quant` in plain torch."""
    return act_quant(x, power_of_two=power_of_two)


def _outputs(x: Tensor, rows: int, channels: int) -> tuple[Tensor, Tensor]:
    quantised = torch.empty(rows, channels, dtype=E4M3, device=x.device)
    return quantised, torch.empty(rows, -(-channels // BLOCK), dtype=torch.float32, device=x.device)


if triton is not None:

    @triton.jit
    def block_scaled(values, LARGEST: tl.constexpr, POWER: tl.constexpr = False):
        """Returns values [N, 128] float32 scaled to e4m3's range, and scales [N]; NaN for NaN and infinity."""
        scale = tl.max(tl.abs(values), axis=1) / LARGEST
        if POWER:
            scale = tl.exp2(tl.ceil(tl.log2(scale)))
        scale = tl.where(scale > 0, scale, 1.0)
        # rounding can push the quotient past the largest value
        every: tl.constexpr = tl.PropagateNan.ALL
        least = tl.maximum(values / scale[:, None], -LARGEST, propagate_nan=every)
        return tl.minimum(least, LARGEST, propagate_nan=every), scale

    @triton.jit
    def _store_quantised(
        values, row, first, quantised, scales, channels, blocks,
        SIZE: tl.constexpr, POWER: tl.constexpr, LARGEST: tl.constexpr,
    ):  # fmt: skip
        """Quantises values [SIZE] float32, a row's channels from `first` on, by blocks of 128."""
        scaled, scale = block_scaled(tl.reshape(values, (SIZE // 128, 128)), LARGEST, POWER)
        block = first // 128 + tl.arange(0, SIZE // 128)
        tl.store(scales + row * blocks + block, scale, mask=block < blocks)
        places = first + tl.arange(0, SIZE)
        flat = tl.reshape(scaled, (SIZE,)).to(quantised.dtype.element_ty)
        tl.store(quantised + row.to(tl.int64) * channels + places, flat, mask=places < channels)

    @triton.jit
    def _quant_kernel(
        x, quantised, scales, channels, blocks,
        SIZE: tl.constexpr, POWER: tl.constexpr, LARGEST: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        follow(PDL)
        row, first = tl.program_id(0), tl.program_id(1) * SIZE
        places = first + tl.arange(0, SIZE)
        values = tl.load(x + row.to(tl.int64) * channels + places, mask=places < channels, other=0.0)
        _store_quantised(values.to(tl.float32), row, first, quantised, scales, channels, blocks, SIZE, POWER, LARGEST)

    @triton.jit
    def _silu_mul_quant_kernel(
        gate_up, quantised, scales, channels, blocks,
        SIZE: tl.constexpr, POWER: tl.constexpr, LARGEST: tl.constexpr, QUANTISE: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        follow(PDL)
        row, first = tl.program_id(0), tl.program_id(1) * SIZE
        places = first + tl.arange(0, SIZE)
        inside = places < channels
        source = gate_up + row.to(tl.int64) * (2 * channels) + places
        gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(source + channels, mask=inside, other=0.0).to(tl.float32)
        values = gate / (1 + tl.exp(-gate)) * up
        if QUANTISE:
            _store_quantised(values, row, first, quantised, scales, channels, blocks, SIZE, POWER, LARGEST)
        else:
            target = quantised + row.to(tl.int64) * channels + places
            tl.store(target, values.to(quantised.dtype.element_ty), mask=inside)

    @triton.jit
    def _rms_norm_quant_kernel(
        x, residual, weight, quantised, scales, total, channels, blocks, eps,
        SIZE: tl.constexpr, ADD: tl.constexpr, POWER: tl.constexpr, LARGEST: tl.constexpr, QUANTISE: tl.constexpr,
        PDL: tl.constexpr,
    ):  # fmt: skip
        follow(PDL)
        row = tl.program_id(0)
        places = tl.arange(0, SIZE)
        inside = places < channels
        offset = row.to(tl.int64) * channels
        summed = tl.load(x + offset + places, mask=inside, other=0.0)
        if ADD:
            other = tl.load(residual + offset + places, mask=inside, other=0.0)
            summed = (summed.to(tl.float32) + other.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + offset + places, summed, mask=inside)
        wide = summed.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide) / channels + eps)
        # rounded to the model's type before and after the weight, as the reference does
        normed = (wide * scale).to(x.dtype.element_ty).to(tl.float32)
        w = tl.load(weight + places, mask=inside, other=0.0).to(tl.float32)
        rounded = (normed * w).to(x.dtype.element_ty)
        if QUANTISE:
            wide = rounded.to(tl.float32)
            _store_quantised(wide, row, 0, quantised, scales, channels, blocks, SIZE, POWER, LARGEST)
        else:
            tl.store(quantised + offset + places, rounded, mask=inside)
