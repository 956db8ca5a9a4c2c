"""Sums in an order of their own: the same on every processor, beside any neighbours, in any number of threads.

A library's matrix product or sum chooses its order by the shape, by the processor and by the number of threads, so a
row may come out otherwise alone than among others. Here numbers are multiplied and added in operations of their own,
each rounded to float32 as IEEE 754 has it, in an order that only the length of the sum decides. So what the references
and the interpreted kernels show about rows is shown by construction, not by luck. It takes about 2 ns a product: enough
for tests, and for what a machine without a GPU multiplies in FP8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 128  # terms that are added as a tree; pieces are added in ascending order
NARROW = 8  # numbers of a tree from which on it is faster to add whole planes of them
ROOM = 1 << 18  # terms at a time, which a processor's cache holds; not part of the arithmetic


def products(x: Tensor, w: Tensor) -> Tensor:
    """Returns float32 x `[..., M, K]` @ w `[..., N, K]`.mT, `[..., M, N]`."""
    if x.device.type != "cpu":  # there a reference is compared within a tolerance
        return x @ w.mT
    step = max(1, ROOM // max(1, w[..., :PIECE].numel()))
    pieces = w.split(PIECE, -1)
    out = []
    for rows in x.split(step, -2):
        own = zip(rows.split(PIECE, -1), pieces, strict=True)
        out.append(_ascending(left.unsqueeze(-2) * right.unsqueeze(-3) for left, right in own))
    return torch.cat(out, -2)


def total(x: Tensor) -> Tensor:
    """Returns the sums of x `[..., K]` over K."""
    return _ascending(x.split(PIECE, -1))


def softmax(x: Tensor) -> Tensor:
    """Returns the softmax of x `[..., K]` over K."""
    powers = by_row(torch.exp, x - x.amax(-1, keepdim=True))
    return powers / total(powers).unsqueeze(-1)


def by_row(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Returns an elementwise function of x `[..., K]`, called for one row at a time.

    torch has functions such as exp in two forms, one for whole vectors of the processor and one for the few numbers
    left over, that may differ in the last bit. Rows beside a number must not decide which form it gets.
    """
    if x.device.type != "cpu":
        return function(x)
    return torch.stack([function(row) for row in x.reshape(-1, x.shape[-1])]).view(x.shape)


def _ascending(pieces: Iterable[Tensor]) -> Tensor:
    """Returns the sums over the last dimension of all pieces."""
    first, *others = map(_tree, pieces)
    for other in others:
        first = first + other
    return first


def _tree(x: Tensor) -> Tensor:
    """Returns the sums over the last dimension: halves are added, zeros after the end, until one number is left."""
    size = 1 << (x.shape[-1] - 1).bit_length()
    if size != x.shape[-1]:
        x = F.pad(x, (0, size - x.shape[-1]))
    while x.shape[-1] > NARROW:
        low, high = x.chunk(2, -1)
        x = low + high
    planes = x.movedim(-1, 0).contiguous()
    while len(planes) > 1:
        low, high = planes.chunk(2)
        planes = low + high
    return planes[0]
