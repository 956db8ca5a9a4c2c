"""Kernels for many rows, on a Hopper GPU: the bits of the kernels for few rows, and attention wherever it is cut."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mtp_spec.kernels import fp8, gemm, mla, moe, quant
from mtp_spec.kernels.mla import KEYS, new_caches, prompt
from mtp_spec.kernels.moe import many

ROWS = (513, 640, 1000)
PRODUCT_ROWS = (65, 130, *ROWS, 2049)
SHAPES = [(2112, 7168), (7168, 16384), (24576, 1536), (1536, 6144), (576, 2048), (136, 304)]
HEADS = {
    "V3": (16, 128, 64, 128),
    "GLM-4.7-Flash": (20, 192, 64, 256),
    "GigaChat3": (32, 128, 64, 192),
    "demo": (8, 64, 64, 64),
}
CUTS = (1, 63, 64, 129, 700)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Tensor]], Tensor]:
    """Runs work with the kernels for few rows."""

    def run(work: Callable[[], Tensor]) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(gemm, "MANY_ROWS", 1 << 30)
            patch.setattr(many, "LEAST_ROWS", 1 << 30)
            return work()

    return run


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), SHAPES, ids=str)
@pytest.mark.parametrize("packed", [True, False], ids=["fp8", "bf16"])
def test_products_have_the_bits_of_few_rows(
    n: int, k: int, packed: bool, few: Callable[[Callable[[], Tensor]], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    w, x = (torch.randn(size, k, device="cuda").bfloat16() for size in (n, max(PRODUCT_ROWS)))
    scaled, quantised = fp8.weight_quant(w), quant.quant(x)
    for name in ("MANY_TILES", "MANY_TILES_16"):
        monkeypatch.setattr(gemm, name, 1)
    for rows in PRODUCT_ROWS:
        for dtype in (torch.bfloat16, torch.float32):

            def product(rows: int = rows, dtype: torch.dtype = dtype) -> Tensor:
                if not packed:
                    return gemm.bf16_gemm(x[:rows], w, dtype=dtype)
                return gemm.fp8_gemm(quantised[0][:rows], quantised[1][:rows], *scaled, dtype=dtype)

            assert torch.equal(product(), few(product)), (rows, dtype)


def test_the_kernel_for_many_rows_has_enough_tiles() -> None:
    """As measured on an H200: where each is faster."""
    for rows, outputs in ((72, 4096), (192, 2112), (72, 7168), (1024, 1536)):
        assert gemm.many_rows(rows, outputs, packed=True)
    for rows, outputs in ((64, 36864), (128, 2112), (512, 640)):
        assert not gemm.many_rows(rows, outputs, packed=True)
    assert gemm.many_rows(96, 7168, packed=False)
    assert not gemm.many_rows(256, 2048, packed=False)


def test_tiles_are_narrow_where_the_last_turn_would_be_nearly_empty() -> None:
    """As measured on an H200: 136 tiles on 132 multiprocessors take 1.5 times as long as 264 halves."""
    narrowest = pytest.importorskip("mtp_spec.kernels.gemm_hopper").narrowest
    assert narrowest(8, 2112, 132) == 64
    for row_tiles, outputs in ((32, 2112), (64, 2112), (8, 4096), (32, 4096), (1, 4096), (4, 576)):
        assert narrowest(row_tiles, outputs, 132) == 128


def _experts(channels: int, inner: int, dtype: torch.dtype) -> moe.Experts:
    up, down = (
        torch.randn(9, 2 * inner, channels, device="cuda") / 16,
        torch.randn(9, channels, inner, device="cuda") / 16,
    )
    if dtype != fp8.E4M3:
        return moe.Experts(up.to(dtype), None, down.to(dtype), None)
    halves = [[fp8.weight_quant(half) for half in both.chunk(2)] for both in up]
    whole = [fp8.weight_quant(one) for one in down]
    return moe.Experts(
        torch.stack([torch.cat([gate[0], own[0]]) for gate, own in halves]),
        torch.stack([torch.cat([gate[1], own[1]]) for gate, own in halves]),
        torch.stack([one[0] for one in whole]), torch.stack([one[1] for one in whole]),
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [fp8.E4M3, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("channels", "inner"), [(256, 128), (208, 80), (1024, 384), (384, 1408), (2880, 768)])
@pytest.mark.parametrize("routed", ["anyhow", "one expert has all", "one expert has none"])
def test_experts_have_the_bits_of_few_rows(
    dtype: torch.dtype, channels: int, inner: int, routed: str, few: Callable[[Callable[[], Tensor]], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    routing, weights = moe.Routing(experts=8, chosen=2, shared=1, scale=1.5), _experts(channels, inner, dtype)
    router, bias = torch.randn(8, channels, device="cuda") / 8, torch.randn(8, device="cuda") / 8
    bias[3] += {"anyhow": 0.0, "one expert has all": 1e3, "one expert has none": -1e3}[routed]
    for rows in ROWS:
        x = torch.randn(rows, channels, device="cuda").to(torch.bfloat16 if dtype == fp8.E4M3 else dtype)

        def layer(x: Tensor = x) -> Tensor:
            return moe.moe(x, router, bias, routing, weights)

        expected = few(layer)
        assert torch.equal(layer(), expected), rows
        monkeypatch.setattr(many, "PARTS_BYTES", 2 * rows * 3 * many.OUTPUTS)  # columns in several turns
        assert torch.equal(layer(), expected), rows
        monkeypatch.undo()


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["bf16 cache", "FP8 cache"])
@pytest.mark.parametrize("sizes", HEADS)
def test_attention_of_prompts(sizes: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against plain torch; and a row's bits are the same wherever the prompt is cut, by one head at a time too."""
    torch.manual_seed(0)
    heads, nope, rope, value = HEADS[sizes]
    head, rows = mla.Head(heads, nope, rope, 512, value, (nope + rope) ** -0.5), 900
    cache = new_caches(2, rows, 0, head.layout(packed), "cuda", 40)[1]
    cache.store.view(torch.bfloat16).fill_(torch.nan)
    pages = torch.randperm(40)[: cache.capacity // KEYS].int().cuda()[None] * KEYS
    length = torch.zeros(1, dtype=torch.int32, device="cuda")
    order = torch.arange(rows, dtype=torch.int32, device="cuda")
    plan = mla.Plan(length, order, order, None, rows - 1, 1, pages)
    _, _, own = next(plan.apart(cache))
    own.write(torch.arange(rows, device="cuda"), torch.randn(rows, head.width, device="cuda"))
    q = torch.randn(rows, heads * (nope + rope), device="cuda").bfloat16()
    kv_b, scale = fp8.weight_quant(torch.randn(heads * (nope + value), 512, device="cuda") / 16)
    table = torch.randn(rows + 2, 2, rope, device="cuda")

    def attended(first: int, end: int) -> Tensor:
        out = torch.full((end - first, heads * value), torch.nan, device="cuda", dtype=torch.bfloat16)
        mla.attend_prompt(q[first:end].clone(), kv_b, scale, table, cache, plan, first, head, out)
        return out

    whole = attended(0, rows)
    expected = mla.attend_prompt_reference(q, kv_b, scale, table, cache, plan, 0, head).float()
    assert (whole.float() - expected).norm() < 0.01 * expected.norm()
    for cut in CUTS:
        assert torch.equal(torch.cat((attended(0, cut), attended(cut, rows))), whole), cut
    monkeypatch.setattr(prompt, "EXPANDED_BYTES", 1)
    assert torch.equal(attended(0, rows), whole)


@pytest.mark.parametrize(("tiles", "heads"), [(1, 1), (1, 20), (3, 128), (4, 32), (9, 33), (64, 5)])
def test_every_tile_of_a_prompt_has_a_program(tiles: int, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hopper = pytest.importorskip("mtp_spec.kernels.mla.prompt_hopper")
    found = list[tuple[int, int]]()
    for number in range(tiles * heads):
        program = SimpleNamespace(program_id=lambda _, number=number: number, minimum=min)
        monkeypatch.setitem(hopper._place.fn.__globals__, "gl", program)
        found.append(hopper._place.fn(tiles, heads, *hopper.order(heads, tiles)))
    assert sorted(found) == [(tile, head) for tile in range(tiles) for head in range(heads)]
    for place, (tile, _) in enumerate(found):
        assert max(other for other, _ in found[place:]) < tile + hopper.BAND, "tiles with the most keys come first"
    assert len({head for _, head in found[: hopper.TOGETHER]}) == min(heads, hopper.TOGETHER)
