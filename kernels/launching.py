"""What every kernel's wrapper asks before it launches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

try:
    import triton
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton for this platform: the references remain
    triton = None


def runs_triton(x: Tensor) -> bool:
    """Whether a kernel runs on this tensor: on CUDA, or anywhere while Triton interprets."""
    return triton is not None and (x.is_cuda or interpreted())


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which cannot multiply bfloat16."""
    return bool(triton.knobs.runtime.interpret)


def described(x: Tensor, rows: int, columns: int) -> Any:
    """Returns the TMA descriptor of a matrix in tiles of `rows` by `columns`."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])
