"""Sums of `ordered` by the compiled library: the bits of those by torch, at every level, for every number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cpu_engine import E4M3_CODES, numbers, same
from mtp_spec.kernels import fp8, ordered
from mtp_spec.kernels.cpu.engine import SWITCH, levels

LENGTHS = (1, 3, 7, 8, 9, 15, 16, 17, 33, 64, 65, 127, 128, 129, 200, 300, 1024)
pytestmark = pytest.mark.skipif(not levels(), reason="no CPU engine for this processor")


def by(level: str, patch: pytest.MonkeyPatch) -> None:
    patch.setenv(SWITCH, level)
    found = ordered._library(level)
    assert (found.level if found else "torch") == level


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("length", LENGTHS)
def test_products_and_totals(level: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (((), 1, 1), ((), 3, 17), ((2,), 5, 40), ((2, 3), 2, 16))
    for seed, (lead, rows, columns) in enumerate(sizes):
        for edges in (False, True):
            x = torch.from_numpy(numbers(seed, *lead, rows, length, edges=edges))
            w = torch.from_numpy(numbers(seed + 9, *lead, columns, length, edges=edges))
            if edges:
                x.view(-1)[0], w.view(-1)[-1] = torch.inf, torch.nan
            found = dict[str, tuple[Tensor, ...]]()
            for name in ("torch", level):
                by(name, monkeypatch)
                crooked = x.mT.contiguous().mT
                found[name] = (ordered.products(x, w), ordered.products(crooked, w), ordered.total(x))
            assert all(same(*pair) for pair in zip(*found.values(), strict=True))


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize(("rows", "columns", "length"), [(1, 128, 128), (7, 300, 208), (33, 130, 1000), (2, 48, 16)])
def test_scaled_products(level: str, rows: int, columns: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for every_code in (False, True):
        (a, a_scale), (w, w_scale) = (
            fp8.act_quant(torch.from_numpy(numbers(1, rows, length))),
            fp8.weight_quant(torch.from_numpy(numbers(2, columns, length))),
        )
        if every_code:
            codes = np.random.default_rng(3).choice(E4M3_CODES, (rows + columns, length)).astype(np.uint8)
            codes[-1, 0], codes[0, -1] = 0x7F, 0xFF  # NaN, of either sign
            a, w = (torch.from_numpy(part).view(fp8.E4M3) for part in (codes[:rows], codes[rows:]))
        found = []
        for name in ("torch", level):
            by(name, monkeypatch)
            found.append(fp8.fp8_gemm(a, a_scale, w, w_scale))
        assert same(*found)
        assert bool(found[0].isnan().any()) == every_code


def test_scales_that_do_not_fit_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    by(levels()[0], monkeypatch)
    a, a_scale = fp8.act_quant(torch.randn(2, 256))
    w, w_scale = fp8.weight_quant(torch.randn(200, 256))
    assert ordered.scaled_products(a, a_scale, w, w_scale) is not None
    for scales in (
        (a_scale[:1], w_scale),
        (a_scale, w_scale[:1]),
        (a_scale[:, :1], w_scale),
        (a_scale.double(), w_scale),
    ):
        assert ordered.scaled_products(a, scales[0], w, scales[1]) is None
    with pytest.raises(ValueError, match="256 numbers cannot be multiplied with rows of 128"):
        ordered.products(torch.randn(2, 256), torch.randn(3, 128))
