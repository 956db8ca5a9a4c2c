"""Kernels of which one program does not run; for interpreted.py, which runs them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtp_spec.kernels import fp8, gemm, quant, sampler
from mtp_spec.kernels.sampler import kernels as sampler_kernels


class WithoutTheLast:
    """Launches a kernel on a grid whose first side is shorter by one."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        shorter = (grid[0] - 1, *grid[1:])
        return self._kernel[shorter]


def incomplete_launches_show(device: str) -> None:
    """What a program leaves unwritten is NaN, where it is returned and where the next kernel reads it."""
    x, logits = torch.randn(3, 256, device=device), torch.randn(2, 300, device=device)
    a, w = fp8.act_quant(torch.randn(3, 256)), fp8.weight_quant(torch.randn(130, 256))
    operands = [t.to(device) for t in (*a, *w)]
    numbers = torch.zeros(2, dtype=torch.int64, device=device)
    values = torch.tensor([sampler.settings_row(temperature=1.0)], dtype=torch.float64, device=device)
    settings = sampler.Settings(values, numbers[:1])
    for module, kernel, run in (
        (quant, "_quant_kernel", lambda: quant.quant(x)[1]),
        (gemm, "_gemm_kernel", lambda: gemm.fp8_gemm(*operands)),
        (sampler_kernels, "_gumbel_kernel", lambda: sampler.gumbel(numbers, numbers, 300)),
        (sampler_kernels, "_penalise_kernel",  # read by the one that draws
         lambda: sampler.sample(logits, numbers.int(), numbers, settings, sampler.Stages()).scores),
    ):  # fmt: skip
        assert run().isfinite().all(), kernel
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, kernel, WithoutTheLast(getattr(module, kernel)))
            assert not run().isfinite().all(), kernel
