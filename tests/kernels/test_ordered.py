"""Sums whose order only their length decides: the bits of a row, and of a column, whatever is computed beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mtp_spec.kernels import fp8, moe, ordered, quant

LENGTHS = (1, 7, 8, 100, 128, 129, 300, 1024)


def summed(terms: np.ndarray) -> np.float32:
    """The order in words: pieces of 128, each halved and added until one number is left, then one after the other."""
    total = None
    for first in range(0, len(terms), 128):
        piece = terms[first : first + 128]
        piece = np.pad(piece, (0, (1 << (len(piece) - 1).bit_length()) - len(piece)))
        while len(piece) > 1:
            low, high = np.split(piece, 2)
            piece = low + high
        total = piece[0] if total is None else total + piece[0]
    assert total is not None
    return total


@pytest.mark.parametrize("length", LENGTHS)
def test_products_are_summed_in_the_order_that_is_promised(length: int) -> None:
    x, w = torch.randn(3, length), torch.randn(5, length)
    found = ordered.products(x, w)
    for row in range(3):
        for column in range(5):
            assert found[row, column] == summed(x[row].numpy() * w[column].numpy())
        assert ordered.total(x)[row] == summed(x[row].numpy())
    torch.testing.assert_close(found, (x.double() @ w.double().T).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", LENGTHS)
def test_rows_and_columns_do_not_depend_on_their_neighbours(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(2, 33, length), torch.randn(2, 70, length)
    whole = ordered.products(x, w)
    for rows, columns in ((slice(0, 1), slice(0, 70)), (slice(3, 20), slice(5, 6)), (slice(32, 33), slice(1, 64))):
        assert torch.equal(ordered.products(x[:, rows], w[:, columns]), whole[:, rows, columns])
        transposed = x.mT.contiguous().mT  # nor on how they lie
        assert torch.equal(ordered.products(transposed[:, rows], w[:, columns]), whole[:, rows, columns])
        assert torch.equal(ordered.softmax(x[:, rows]), ordered.softmax(x)[:, rows])
    monkeypatch.setattr(ordered, "ROOM", 1)
    assert torch.equal(ordered.products(x, w), whole)


@pytest.mark.parametrize("function", [torch.sigmoid, torch.exp, torch.nn.functional.silu])
@pytest.mark.parametrize("length", [3, 8, 33])
def test_a_function_of_a_row_is_that_of_the_row_alone(function: object, length: int) -> None:
    assert callable(function)
    x = torch.randn(50, length)
    whole = ordered.by_row(function, x)
    assert all(torch.equal(function(row), found) for row, found in zip(x, whole, strict=True))


def test_references_give_a_row_alone_what_they_give_it_beside_others() -> None:
    """With odd sizes, at which a library's vector loops leave numbers over."""
    x, weight = torch.randn(37, 300), torch.rand(300) + 0.5
    routing = moe.Routing(experts=12, chosen=3, groups=4, kept_groups=2, shared=1, scale=1.5)
    router, bias = torch.randn(12, 300), torch.randn(12) * 0.1
    w, w_scale = fp8.weight_quant(torch.randn(200, 300))
    softmax = moe.Routing(experts=12, chosen=3, scoring="softmax")

    def everything(x: torch.Tensor) -> list[torch.Tensor]:
        return [
            *moe.gate_reference(x, router, bias, routing), *moe.gate_reference(x, router, None, softmax),
            quant.normed(x, weight, 1e-6), *quant.silu_mul_quant(x), fp8.fp8_gemm(*fp8.act_quant(x), w, w_scale),
        ]  # fmt: skip

    for first, rows in ((0, 1), (36, 1), (5, 16)):
        part = slice(first, first + rows)
        for alone, beside in zip(everything(x[part].clone()), everything(x), strict=True):
            assert torch.equal(alone.view(torch.uint8), beside[part].contiguous().view(torch.uint8))
