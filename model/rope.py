"""Rotary position embedding with YaRN scaling (Su et al. 2104.09864; Peng et al. 2309.00071).

The table is the same to the last bit on every machine: powers and logarithms are decimal arithmetic, sine and cosine
polynomials in float64, where libraries' own differ in their last bit.
"""

from __future__ import annotations

import math
from decimal import Context, Decimal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtp_spec.model.config import ModelConfig, YarnConfig

Float64Array = npt.NDArray[np.float64]
_EXACT = Context(prec=40)
# pi / 2 in three parts, of which the first two have 33 bits: their products with a small integer are exact
_HALF_PI = (1.57079632673412561417e00, 6.07710050630396597660e-11, 2.02226624879595063154e-21)
# minimax polynomials of sine and cosine within pi / 4, of odd and even powers from the third and fourth on (fdlibm)
_SINE = (-1.66666666666666324348e-01, 8.33333333332248946124e-03, -1.98412698298579493134e-04,
         2.75573137070700676789e-06, -2.50507602534068634195e-08, 1.58969099521155010221e-10)  # fmt: skip
_COSINE = (4.16666666666666019037e-02, -1.38888888888741095749e-03, 2.48015872894767294178e-05,
           -2.75573143513906633035e-07, 2.08757232129817482790e-09, -1.13596475577881948265e-11)  # fmt: skip


def yarn_mscale(factor: float, mscale: float) -> float:
    """Returns YaRN's attention temperature `0.1 * mscale * ln(factor) + 1` (2309.00071 eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * _log(factor) + 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Returns `qk_head_dim^-1/2`, times the squared YaRN temperature where the model asks for it.

    V2 checkpoints state `mscale_all_dim` as V3's do, and DeepSeek's own code applies it to both families.
    """
    scale = float(config.qk_head_dim**-0.5)
    yarn = config.rope_scaling
    if yarn is not None and yarn.mscale_all_dim:
        scale *= yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def _yarn_frequencies(theta: float, dim: int, yarn: YarnConfig) -> Tensor:
    """Blends extrapolated and interpolated frequencies (2309.00071 section 3.2)."""
    base = _powers(theta, dim)

    def correction(rotations: float) -> float:
        length = yarn.original_max_position_embeddings
        return dim * _log(length / (rotations * 2 * math.pi)) / (2 * _log(theta))

    low, high = correction(yarn.beta_fast), correction(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    extrapolated, interpolated = 1.0 / base, 1.0 / (yarn.factor * base)
    return interpolated * ramp + extrapolated * (1 - ramp)


def _table_scale(yarn: YarnConfig | None) -> float:
    """Returns the factor on cos and sin: mscale / mscale_all_dim, one for the released V3 models."""
    if yarn is None:
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    return yarn_mscale(yarn.factor, 1.0)


def _log(value: float) -> float:
    return float(_EXACT.ln(Decimal(value)))


def _powers(theta: float, dim: int) -> Tensor:
    """Returns `theta^(2 i / dim)` for i < dim / 2, rounded to float32."""
    steps = (torch.arange(0, dim, 2, dtype=torch.float32) / dim).tolist()
    return torch.tensor([float(_EXACT.power(Decimal(theta), Decimal(step))) for step in steps], dtype=torch.float32)


def sine_cosine(angles: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Returns sines and cosines of angles up to a million, to about 1e-16, using only additions and products."""
    quarters = np.rint(angles * (2 / math.pi))
    rest = angles
    for part in _HALF_PI:
        rest = rest - quarters * part
    square = rest * rest
    sine, cosine = np.zeros_like(rest), np.zeros_like(rest)
    for odd, even in zip(reversed(_SINE), reversed(_COSINE), strict=True):
        sine, cosine = sine * square + odd, cosine * square + even
    sine, cosine = rest + rest * square * sine, 1.0 - 0.5 * square + square * square * cosine
    turned = quarters.astype(np.int64) % 4
    swapped = turned % 2 == 1
    sines = np.where(swapped, cosine, sine)
    cosines = np.where(swapped, sine, cosine)
    return np.where(turned >= 2, -sines, sines), np.where((turned == 1) | (turned == 2), -cosines, cosines)


def rope_table(config: ModelConfig, length: int, device: torch.device | str = "cpu") -> Tensor:
    """Returns `[length, 2, R]` float32: for each position the factors of a vector and of its swapped copy.

    R is qk_rope_head_dim. See `apply_rope`.
    """
    dim = config.qk_rope_head_dim
    if config.rope_scaling is None:
        frequencies = 1.0 / _powers(config.rope_theta, dim)
    else:
        frequencies = _yarn_frequencies(config.rope_theta, dim, config.rope_scaling)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    scale = _table_scale(config.rope_scaling)
    sin, cos = (torch.from_numpy(part.astype(np.float32)) * scale for part in sine_cosine(angles.double().numpy()))
    if config.rope_interleave:
        own, other = torch.stack((cos, cos), -1).flatten(-2), torch.stack((-sin, sin), -1).flatten(-2)
    else:
        own, other = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    return torch.stack((own, other), dim=1).to(device)


def apply_rope(x: Tensor, table: Tensor, interleaved: bool) -> Tensor:
    """Returns x rotated by its rows' angles, in x's dtype; the arithmetic is float32, float64 for such x.

    `(a, b)` becomes `(a cos - b sin, b cos + a sin)`: x times the table's first row plus x with each pair swapped
    times its second.

    Args:
        x: `[..., R]`, pairs (0, 1), (2, 3), ... when `interleaved`, else (0, R / 2), (1, R / 2 + 1), ...
        table: `[..., 2, R]` rows of `rope_table`, broadcast against x.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleaved else wide.roll(wide.shape[-1] // 2, -1)
    own, other = table.unbind(-2)
    return (wide * own + swapped * other).to(x.dtype)
