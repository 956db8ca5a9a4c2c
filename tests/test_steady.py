"""Products keep within the limits between which a row does not depend on its neighbours, whatever the library does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtp_spec.model import steady
from mtp_spec.model.attention import by_head, probe_by_head
from mtp_spec.model.layers import packed, probe_product, product
from mtp_spec.model.steady import FREE, NONE, Limits, cancelling, probe, steadily

# of toy models, of the bundled one, of DeepSeek-V2-Lite (its hidden size, down-projections, expert widths)
MATRICES = [(48, 64), (32, 96), (24, 112), (24, 48), (512, 256), (1024, 384), (1408, 2048), (2048, 3648)]
HEADS = [(4, 16, 24), (4, 24, 12), (8, 64, 128), (16, 128, 512), (16, 512, 128)]
PASSES = (2, 3, 5, 8, 14, 16, 20, 33, 65, 100, 256)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    for memory in ("_known", "_limited"):
        monkeypatch.setattr(steady, memory, {})


def changes(at: Callable[[int], int]) -> Callable[[Tensor], Tensor]:
    """A product in whose results one sees which loops `at` chose for so many rows."""
    return lambda x: x.sum(-1, keepdim=True) + at(x.shape[0])


@pytest.mark.parametrize(
    ("at", "limits"),
    [
        (lambda rows: 0, FREE),
        (lambda rows: rows == 1, Limits(2)),
        (lambda rows: 1 + (rows > 2) if rows < 4 else 0, Limits(4)),
        (lambda rows: rows > 17, Limits(1, 17)),
        (lambda rows: (rows == 1) + 2 * (rows > 64), Limits(2, 64)),
        (lambda rows: rows > 8, Limits(16)),
        (lambda rows: rows, NONE),
    ],
    ids=["none", "alone", "few", "many", "both", "company of more", "no two alike"],
)
def test_limits_are_found_and_kept(at: Callable[[int], int], limits: Limits) -> None:
    multiply, x = changes(at), torch.randn(256, 6, generator=torch.Generator().manual_seed(1))
    assert probe((6,), lambda: (multiply, x)) == limits
    whole = steadily(multiply, x[:16], (6,))
    for rows in PASSES:
        got = steadily(multiply, x[:rows], (6,))
        assert got.shape == (rows, 1)
        if limits.most >= steady.PROMPT_LIMIT or (limits.most and rows <= steady.VERIFIED):
            assert torch.equal(got[:16], whole[:rows])
        else:
            assert torch.equal(got, multiply(x[:rows]))


def test_places_in_a_pass_count_too() -> None:
    def multiply(x: Tensor) -> Tensor:
        return torch.cat((x[:7], x[7:] + 1)) if len(x) > 7 else x

    assert probe((7,), lambda: (multiply, torch.zeros(256, 1))) == NONE


def rows_alike(multiply: Callable[[Tensor], Tensor], x: Tensor, limits: Limits) -> None:
    assert limits != NONE, "nothing would be fast here"
    alone = torch.cat([multiply(row) for row in x.split(1)])
    for rows in PASSES:
        if limits.most >= steady.PROMPT_LIMIT or rows <= steady.VERIFIED:
            for first in {0, 3, 256 - rows}:
                part = x[first : first + rows]
                assert torch.equal(multiply(part), alone[first : first + len(part)]), rows


@pytest.mark.parametrize("sizes", MATRICES, ids=str)
@pytest.mark.parametrize("packs", [False, True], ids=["plain", "packed"])
def test_products_of_this_machine(sizes: tuple[int, int], packs: bool) -> None:
    columns, outputs = sizes
    x, weight = cancelling((256,), (outputs,), columns)
    x = x.roll(31, 0)  # not the probe's rows
    with torch.inference_mode():
        layout = packed(weight) if packs else None
        rows_alike(lambda rows: product(rows, weight, layout), x, probe_product(weight, layout))


@pytest.mark.parametrize("sizes", HEADS, ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_products_by_head_of_this_machine(sizes: tuple[int, int, int], turned: bool) -> None:
    heads, size, outputs = sizes
    x, weight = cancelling((256, heads), (heads, outputs), size)
    weight = weight.transpose(1, 2) if turned else weight.transpose(1, 2).contiguous()
    with torch.inference_mode():
        rows_alike(lambda rows: by_head(rows, weight), x.roll(31, 0), probe_by_head(weight))


def test_the_probe_sees_an_order_that_noise_hides() -> None:
    """Two orders of summing differ in most sums that cancel, and in few others."""
    x, weight = cancelling((64,), (32,), 48)

    def halves(x: Tensor) -> Tensor:
        a, b = (part.float() @ own.float().T for part, own in zip(x.split(24, 1), weight.split(24, 1), strict=True))
        return (a + b).bfloat16()

    def whole(x: Tensor) -> Tensor:
        total = torch.zeros(len(x), len(weight))
        for k in range(48):
            total += x[:, k : k + 1].float() * weight[:, k].float()
        return total.bfloat16()

    assert (halves(x) != whole(x)).float().mean() > 0.3
    noise = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert (halves(noise) != whole(noise)).float().mean() < 0.03
