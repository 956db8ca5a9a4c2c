"""Inputs and outputs of the mixture-of-experts launches: weights, the gate's rules, pairs grouped by expert.

Legend: as in `layer` and `router`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from mtp_spec.kernels.fp8 import BLOCK, E4M3

Exchange = Callable[..., tuple[Tensor, ...]]  # hidden values, and scales if they have any


@dataclass(frozen=True)
class Experts:
    """The weights of one layer's experts; shared experts are the last ones.

    If several ranks share the layer, each has some of the I columns of the first product, in whole blocks, and some of
    the D outputs of the second.

    Attributes:
        gate_up: `[E, 2 I, D]` e4m3, bfloat16 or float16, gate rows first.
        gate_up_scale: `[E, 2 ceil(I / 128), ceil(D / 128)]` float32, gate and up quantised separately; None unless
            e4m3.
        down: `[E, D, I]`, as gate_up.
        down_scale: `[E, ceil(D / 128), ceil(I / 128)]` float32, or None.
        power_of_two: whether scales of the other operand are rounded up to powers of two ("ue8m0").
    """

    gate_up: Tensor
    gate_up_scale: Tensor | None
    down: Tensor
    down_scale: Tensor | None
    power_of_two: bool = False

    def __post_init__(self) -> None:
        count, twice, channels = self.gate_up.shape
        inner, (outputs, whole) = twice // 2, self.down.shape[1:]
        alone = (outputs, whole) == (channels, inner)
        if self.down.shape[0] != count or not (alone or (outputs <= channels and whole % inner == inner % BLOCK == 0)):
            raise ValueError(f"gate_up {tuple(self.gate_up.shape)} and down {tuple(self.down.shape)} do not fit")
        if self.gate_up.dtype != self.down.dtype:
            raise ValueError(f"gate_up is {self.gate_up.dtype} and down is {self.down.dtype}: one dtype expected")
        blocks, scaled = -(-inner // BLOCK), self.gate_up.dtype == E4M3
        expected = (
            (count, 2 * blocks, -(-channels // BLOCK)), (count, -(-outputs // BLOCK), -(-whole // BLOCK))
        )  # fmt: skip
        given = tuple(None if s is None else tuple(s.shape) for s in (self.gate_up_scale, self.down_scale))
        if given != (expected if scaled else (None, None)):
            wanted = f"expected {expected[0]} and {expected[1]}" if scaled else f"none expected with {self.down.dtype}"
            raise ValueError(f"scales {given[0]} and {given[1]}: {wanted}")
        if channels % 16 or inner % 16:
            raise ValueError(f"D={channels}, I={inner}: rows must be whole multiples of 16 bytes")
        if not all(t.is_contiguous() for t in self.tensors):
            raise ValueError("weights and scales must be contiguous")

    @property
    def tensors(self) -> list[Tensor]:
        """Weights, and scales if they have any."""
        parts = (self.gate_up, self.gate_up_scale, self.down, self.down_scale)
        return [part for part in parts if part is not None]

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Weights as matrices: `gate_up` `[E 2 I, D]` and `down` `[E D, I]`."""
        return self.gate_up.flatten(0, 1), self.down.flatten(0, 1)

    @property
    def scaled(self) -> bool:
        """Whether weights are e4m3 with scales."""
        return self.gate_up_scale is not None

    @property
    def count(self) -> int:
        """E."""
        return self.gate_up.shape[0]

    @property
    def channels(self) -> int:
        """D."""
        return self.gate_up.shape[2]

    @property
    def inner(self) -> int:
        """I of the first product."""
        return self.gate_up.shape[1] // 2

    @property
    def outputs(self) -> int:
        """D of the second product."""
        return self.down.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How a gate chooses.

    Attributes:
        experts: E.
        chosen: experts per row, without the shared ones.
        shared: experts that every row gets, weight 1.
        groups: number of equal groups of adjacent experts.
        kept_groups: number of groups a row may choose from.
        best: a group's score is the sum of its best 1 (V2) or 2 (V3) experts.
        scoring: "sigmoid" or "softmax".
        normalise: whether the weights of a row sum to `scale`.
        scale: factor on all weights.
    """

    experts: int
    chosen: int
    groups: int = 1
    kept_groups: int = 1
    best: int = 2
    scoring: str = "sigmoid"
    normalise: bool = True
    scale: float = 1.0
    shared: int = 0

    def __post_init__(self) -> None:
        if self.scoring not in ("sigmoid", "softmax"):
            raise ValueError(f"scoring={self.scoring!r}: sigmoid or softmax")
        if self.best not in (1, 2):
            raise ValueError(f"best={self.best}: 1 or 2")
        if self.experts % self.groups or not 1 <= self.kept_groups <= self.groups:
            raise ValueError(f"{self.experts} experts, {self.groups} groups, {self.kept_groups} kept: do not fit")
        if not 1 <= self.chosen <= self.experts // self.groups * self.kept_groups:
            raise ValueError(f"{self.chosen} experts cannot be chosen from {self.kept_groups} of {self.groups} groups")

    @property
    def per_row(self) -> int:
        """K."""
        return self.chosen + self.shared


@dataclass(frozen=True, slots=True)
class Routed:
    """Result of the gate: indices `[M, K]` int32 ascending, weights `[M, K]` float32, x in FP8 if wanted, pairs."""

    indices: Tensor
    weights: Tensor
    quantised: Tensor | None = None  # [M, D] e4m3
    scales: Tensor | None = None  # [M, ceil(D / 128)] float32
    groups: Groups | None = None


@dataclass(frozen=True, slots=True)
class Groups:
    """Pairs grouped by expert.

    Attributes:
        order: `[P]` int32, pairs sorted by expert, then by number.
        expert: `[slots]` int32.
        first: `[slots]` int32, where the slot's pairs start in `order`.
        count: `[slots]` int32, the slot's number of pairs; 0 in unused slots.
    """

    order: Tensor
    expert: Tensor
    first: Tensor
    count: Tensor


def most_slots(pairs: int, experts: int, tokens: int) -> int:
    """Returns the most slots that any routing can need."""
    return min(pairs, experts + pairs // tokens)
