"""Sums in a fixed order: the same on every processor, in any batch, with any number of threads.

A library's matrix product or sum chooses its order by the shape, the processor and the number of threads, so a row may
differ alone and in a batch. Here numbers are multiplied and added in separate operations, each rounded to float32 as in
IEEE 754, in an order that depends only on the length of the sum. So what the references and the interpreted kernels
show about rows holds by construction, not by luck. A multiplication takes about 2 ns with torch and 0.1 ns with the CPU
engine's library, which is used if available: the bits are the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from ctypes import byref, c_int64, c_void_p
from functools import cache
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_spec.kernels.cpu import engine

PIECE = 128  # terms that are added as a tree; pieces are then added in ascending order
NARROW = 8  # from this many numbers of a tree on, adding whole planes is faster
TAKEN = (torch.float32, torch.float8_e4m3fn)  # dtypes that the engine's library takes
ROOM = 1 << 18  # terms at a time, to fit a processor's cache; not part of the arithmetic


def products(x: Tensor, w: Tensor) -> Tensor:
    """Returns float32 x `[..., M, K]` @ w `[..., N, K]`.mT, `[..., M, N]`."""
    if x.device.type != "cpu":  # there the reference is compared within a tolerance
        return x @ w.mT
    if (library := _compiled(x, w)) is not None:
        return _products(library, x, None, w, None)
    step = max(1, ROOM // max(1, w[..., :PIECE].numel()))
    pieces = w.split(PIECE, -1)
    out = []
    for rows in x.split(step, -2):
        own = zip(rows.split(PIECE, -1), pieces, strict=True)
        out.append(_ascending(left.unsqueeze(-2) * right.unsqueeze(-3) for left, right in own))
    return torch.cat(out, -2)


def scaled_products(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor | None:
    """Returns what `fp8.fp8_gemm` does, or None without the compiled engine.

    Args:
        x: e4m3 `[M, K]`.
        x_scale: float32 `[M, ceil(K / 128)]`.
        w: e4m3 `[N, K]`.
        w_scale: float32 `[ceil(N / 128), ceil(K / 128)]`.
    """
    library, pieces = _compiled(x, w), -(-x.shape[-1] // PIECE)
    fits = x_scale.shape == (len(x), pieces) and w_scale.shape == (-(-len(w) // PIECE), pieces)
    if library is None or not fits or {x_scale.dtype, w_scale.dtype} != {torch.float32}:
        return None
    return _products(library, x, x_scale, w, w_scale)


def total(x: Tensor) -> Tensor:
    """Returns the sums of x `[..., K]` over K."""
    if x.dtype == torch.float32 and (library := _compiled(x)) is not None:
        given, out = x.contiguous(), torch.empty(x.shape[:-1], dtype=torch.float32)
        library.ordered_totals(_at(given), c_int64(out.numel()), c_int64(x.shape[-1]), _at(out))
        return out
    return _ascending(x.split(PIECE, -1))


def softmax(x: Tensor) -> Tensor:
    """Returns the softmax of x `[..., K]` over K."""
    powers = by_row(torch.exp, x - x.amax(-1, keepdim=True))
    return powers / total(powers).unsqueeze(-1)


def by_row(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Returns an elementwise function of x `[..., K]`, called for one row at a time.

    torch implements functions such as exp in two forms, for whole vectors and for the remaining numbers, which may
    differ in the last bit. Other rows must not decide which form a number gets.
    """
    if x.device.type != "cpu":
        return function(x)
    return torch.stack([function(row) for row in x.reshape(-1, x.shape[-1])]).view(x.shape)


def _compiled(*given: Tensor) -> engine.Library | None:
    """Returns the engine's library if it exists and takes these float32 or e4m3 tensors."""
    for one in given:
        if one.device.type != "cpu" or one.dtype not in TAKEN or not one.numel() or one.requires_grad:
            return None
    return _library(os.environ.get(engine.SWITCH))


@cache
def _library(switch: str | None) -> engine.Library | None:
    """Returns the engine's library unless switched off or unavailable; cached, since asking the processor is slow."""
    return None if engine.why_not() else engine.library()


def _products(library: engine.Library, x: Tensor, x_scale: Tensor | None, w: Tensor, w_scale: Tensor | None) -> Tensor:
    """Returns `products`, scaled if there are scales, computed by the engine's library."""
    (*lead, rows, length), (*others, columns, depth) = x.shape, w.shape
    if length != depth:
        raise ValueError(f"rows of {length} numbers cannot be multiplied with rows of {depth}")
    if lead != others:
        lead = list(torch.broadcast_shapes(lead, others))
        x, w = x.expand(*lead, rows, length), w.expand(*lead, columns, length)
    x, w, out = x.contiguous(), w.contiguous(), torch.empty(*lead, rows, columns, dtype=torch.float32)
    left = engine.MatrixStruct(engine.KINDS[x.dtype], rows, length, 1, PIECE, x.data_ptr())
    right = engine.MatrixStruct(engine.KINDS[w.dtype], columns, length, PIECE, PIECE, w.data_ptr())
    if x_scale is not None and w_scale is not None:
        x_scale, w_scale = x_scale.contiguous(), w_scale.contiguous()
        left.scale, right.scale = x_scale.data_ptr(), w_scale.data_ptr()
    library.ordered_products(byref(left), byref(right), c_int64(prod(lead)), _at(out))
    return out


def _at(x: Tensor) -> c_void_p:
    return c_void_p(x.data_ptr())


def _ascending(pieces: Iterable[Tensor]) -> Tensor:
    """Returns the sums over the last dimension of all pieces."""
    first, *others = map(_tree, pieces)
    for other in others:
        first = first + other
    return first


def _tree(x: Tensor) -> Tensor:
    """Returns the sums over the last dimension: halves, zero-padded, are added until one number is left."""
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
