"""Triton's interpreter, corrected; to be imported where TRITON_INTERPRET is set.

It truncates float32 to bfloat16 and rounds float32 to e4m3 wrongly (triton issue 8322), so both casts go through torch.
Its products and sums are NumPy's, whose order depends on shapes and on the processor; `ordered` has one of its own, so
that equal bits are the kernels' merit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from mtp_spec.kernels import ordered

WRONG = {tl.float8e4nv: torch.float8_e4m3fn, tl.bfloat16: torch.bfloat16}
original, added = interpreter._convert_float, interpreter.ReduceOps.sum


def _convert(value: Any, source: Any, target: Any, rounding: Any) -> Any:
    if source.scalar == tl.float32 and target.scalar in WRONG:
        wide = torch.from_numpy(np.ascontiguousarray(value)).view(torch.float32)
        kind = WRONG[target.scalar]
        narrow = wide.clamp(-448, 448).to(kind) if kind == torch.float8_e4m3fn else wide.to(kind)
        return narrow.view(torch.uint8 if kind == torch.float8_e4m3fn else torch.uint16).numpy()
    return original(value, source, target, rounding)


def _dot(_: Any, a: Any, b: Any, into: Any, *options: Any) -> Any:
    """`tl.dot` of float32 tiles, or of e4m3 ones, which are widened to float16."""
    left, right = (_wide(one) for one in (a, b))
    assert into.data.dtype == np.float32
    summed = ordered.products(left, right.mT) + torch.from_numpy(into.data)
    return interpreter.TensorHandle(summed.numpy(), into.dtype.scalar)


def _wide(tile: Any) -> torch.Tensor:
    data = tile.data
    if tile.dtype.scalar == tl.float8e4nv:
        data = original(data, tile.dtype, tl.float16, None).view(np.float16)
    assert data.dtype in (np.float16, np.float32)
    return torch.from_numpy(np.ascontiguousarray(data, np.float32))


def _sum(self: Any, given: Any) -> Any:
    """`tl.sum`, along one axis or over everything."""
    data = given.handle.data
    if data.dtype.kind != "f":
        return added(self, given)
    wide = torch.from_numpy(np.ascontiguousarray(data.reshape(-1) if self.axis is None else data))
    summed = ordered.total(wide.movedim(self.axis or 0, -1)).numpy()
    if self.keep_dims:
        summed = summed.reshape([1] * data.ndim) if self.axis is None else np.expand_dims(summed, self.axis)
    return self.to_tensor(summed, given.dtype)


def correct() -> None:
    """Has the interpreter cast, multiply and add as above."""
    interpreter._convert_float = _convert
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter.ReduceOps.sum = _sum
