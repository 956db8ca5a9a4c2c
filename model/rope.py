"""Rotary position embedding with YaRN scaling (Su et al. 2104.09864; Peng et al. 2309.00071)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtp_spec.model.config import ModelConfig, YarnConfig


def yarn_mscale(factor: float, mscale: float) -> float:
    """Returns YaRN's attention temperature `0.1 * mscale * ln(factor) + 1` (2309.00071 eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


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
    base = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)

    def correction(rotations: float) -> float:
        length = yarn.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

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


def rope_table(config: ModelConfig, length: int, device: torch.device | str = "cpu") -> Tensor:
    """Returns `[length, 2, R]` float32: for each position what a vector and its swapped copy are multiplied with.

    R is qk_rope_head_dim. See `apply_rope`.
    """
    dim = config.qk_rope_head_dim
    if config.rope_scaling is None:
        steps = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        frequencies = 1.0 / (config.rope_theta**steps)
    else:
        frequencies = _yarn_frequencies(config.rope_theta, dim, config.rope_scaling)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    scale = _table_scale(config.rope_scaling)
    cos, sin = angles.cos() * scale, angles.sin() * scale
    if config.rope_interleave:
        own, other = torch.stack((cos, cos), -1).flatten(-2), torch.stack((-sin, sin), -1).flatten(-2)
    else:
        own, other = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    return torch.stack((own, other), dim=1).to(device)


def apply_rope(x: Tensor, table: Tensor, interleaved: bool) -> Tensor:
    """Returns x rotated by its rows' angles, in x's dtype; the arithmetic is float32.

    `(a, b)` becomes `(a cos - b sin, b cos + a sin)`: x times the table's first row plus x with each pair swapped
    times its second.

    Args:
        x: `[..., R]`, pairs (0, 1), (2, 3), ... when `interleaved`, else (0, R / 2), (1, R / 2 + 1), ...
        table: `[..., 2, R]` rows of `rope_table`, broadcast against x.
    """
    wide = x.float()
    swapped = (
        wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleaved else wide.roll(wide.shape[-1] // 2, -1)
    )
    own, other = table.unbind(-2)
    return (wide * own + swapped * other).to(x.dtype)
