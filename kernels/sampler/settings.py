"""Parameters and results of sampling on the device.

Legend: as in `sampling`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

COLUMNS = 8
IN_PROMPT = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Stages that exist in a captured step; a request need not use them."""

    bias: bool = False
    penalty: bool = False
    noise: bool = True
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """Sampling parameters of R requests on the device.

    Attributes:
        values: `[R, 8]` float64: temperature, top_k, top_p, log(min_p), repetition, presence, frequency penalty, 0.
        seed: `[R]` int64, bits of a number from 0 to 2**64 - 1.
        bias: `[R, V]` float32, or None.
        seen: `[R, V]` int32: how often a token was generated, plus `IN_PROMPT` if the prompt has it; or None.
    """

    values: Tensor
    seed: Tensor
    bias: Tensor | None = None
    seen: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """Tokens `[M, B]` int32 best first, their scores `[M, B]` float32, and `[M]` int32: 1 if none can be drawn.

    A row with fewer than B tokens left repeats its best with a score of -inf; a failed row has token 0.

    Attributes:
        rows: `[M, V]` float32, the rows that tokens are drawn from, before noise, removed tokens at -inf; if kept.
    """

    tokens: Tensor
    scores: Tensor
    failed: Tensor
    rows: Tensor | None = None


def settings_row(
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
) -> list[float]:
    """Returns one row of `Settings.values`."""
    log_min_p = math.log(min_p) if min_p > 0 else -math.inf
    return [temperature, top_k, top_p, log_min_p, repetition_penalty, presence_penalty, frequency_penalty, 0.0]


def seed_bits(seed: int) -> int:
    """Returns a seed of 0 .. 2**64 - 1 as the int64 of the same bits."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
