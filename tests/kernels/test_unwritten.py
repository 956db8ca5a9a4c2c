"""Tests of kernels do not find in fresh memory what an operation should have written there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtp_spec.kernels import fp8_cpu
from mtp_spec.kernels.fp8 import weight_quant
from mtp_spec.kernels.workspace import Workspace

CPU = torch.device("cpu")
MAKERS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "empty": lambda dtype: torch.empty(3, 5, dtype=dtype),
    "empty_like": lambda dtype: torch.empty_like(torch.zeros(15), dtype=dtype),
    "empty_strided": lambda dtype: torch.empty_strided((3, 5), (5, 1), dtype=dtype),
    "new_empty": lambda dtype: torch.zeros(1).new_empty(3, 5, dtype=dtype),
    "new_empty_strided": lambda dtype: torch.zeros(1).new_empty_strided((3, 5), (5, 1), dtype=dtype),
    "room": lambda dtype: Workspace(dtype, least=15).room(CPU, 9),
}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("maker", MAKERS)
def test_fresh_memory_holds_no_number(maker: str, dtype: torch.dtype) -> None:
    made = MAKERS[maker](dtype)
    assert made.dtype == dtype
    assert made.numel() == 15
    assert made.float().isnan().all()


def test_a_room_holds_nothing_of_the_launch_before() -> None:
    space = Workspace(torch.float32)
    space.room(CPU, 4).fill_(1.0)
    assert space.room(CPU, 4).isnan().all()


def test_a_count_and_a_parameter_are_left() -> None:
    assert not Workspace(torch.int32, zeros=True).room(CPU, 4).any()
    assert torch.nn.Parameter(torch.empty(2, requires_grad=True)).requires_grad
    assert torch.empty(2, device="meta").is_meta


def test_an_operation_that_leaves_rows_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scale = weight_quant(torch.randn(300, 256))
    assert fp8_cpu.dequantise(weight, scale).isfinite().all()
    # the last row of blocks is not written, neither to this output nor to the one before
    monkeypatch.setattr(fp8_cpu, "zip", lambda *parts, strict: list(zip(*parts, strict=strict))[:-1], raising=False)
    found = fp8_cpu.dequantise(weight, scale)
    assert found[:256].isfinite().all()
    assert found[256:].isnan().all()
