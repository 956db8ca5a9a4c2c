"""Argument checks for kernel wrappers: a wrong shape would read or write out of bounds without an error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def expect(
    name: str,
    x: Tensor,
    shape: Sequence[int | None],
    dtypes: torch.dtype | Sequence[torch.dtype] = (),
    beside: Tensor | None = None,
) -> None:
    """Raises if a kernel cannot take a tensor as it is.

    Args:
        shape: expected sizes; None for any.
        dtypes: allowed dtypes; empty for any.
        beside: a tensor on whose device it must be.

    Raises:
        ValueError: wrong shape, dtype or device, or not contiguous; names what was given and what is expected.
    """
    own, allowed = x.shape, (dtypes,) if isinstance(dtypes, torch.dtype) else dtypes
    if (own == shape or _fits(own, shape)) and (not allowed or x.dtype in allowed) and x.is_contiguous():
        if beside is None or x.device == beside.device:
            return
        raise ValueError(f"{name} is on {x.device}, the other operand on {beside.device}: move one of them")
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
    given = f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}{'' if x.is_contiguous() else ', not contiguous'}"
    raise ValueError(f"{name} is {given}: [{sizes}]{' ' + kinds if kinds else ''}, contiguous, is expected")


def _fits(own: Sequence[int], shape: Sequence[int | None]) -> bool:
    return len(own) == len(shape) and all(size in (None, given) for size, given in zip(shape, own, strict=True))
