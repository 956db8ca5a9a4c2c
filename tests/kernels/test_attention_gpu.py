"""Attention at DeepSeek-V3's sizes on a GPU: against plain torch, and each row against itself decoded alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mtp_spec.bench.layers import decoded_alone, tree
from mtp_spec.kernels import mla
from mtp_spec.kernels.launching import on_hopper
from mtp_spec.kernels.mla import KEYS, attention, new_caches

# also passes across the borders of split sizes: 1,024, 16,384 or 32,768, and 65,536
CONTEXTS = (1, 2, 63, 64, 65, 127, 128, 129, 1000, 1023, 1024, 1025, 1500, 8193, 16380, 16385, 32760, 65530)
TOLERANCE = 0.01  # weights are multiplied in bf16


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["bf16", "packed"])
@pytest.mark.parametrize("latent", [512, 256, 64])
@pytest.mark.parametrize("heads", [128, 20, 16, 8])
def test_attention_of_chains_and_trees(heads: int, latent: int, packed: bool) -> None:
    torch.manual_seed(heads)
    head = mla.Head(heads, 128, 64, latent, 128, 192**-0.5)
    for context in CONTEXTS if heads in (128, 20) and latent == 512 else CONTEXTS[:13]:
        cache = new_caches(2, context + 70, 66, head.layout(packed), "cuda")[1]
        everything = replace(cache, base=0, capacity=len(cache.store))
        rows_of_all = torch.arange(len(cache.store), device="cuda")
        length = torch.tensor([context - 1], dtype=torch.int32, device="cuda")
        for rows in (1, 3, 8, 64 if context < 1500 else 16):
            for plan in (mla.chain(length, rows), tree(length, rows)):
                everything.write(rows_of_all, torch.randn(len(rows_of_all), head.width, device="cuda"))
                q = torch.randn(rows, head.padded, head.width, device="cuda").bfloat16()
                got = mla.attend(q, cache, plan, head)
                expected = mla.attend_reference(q, cache, plan, head).float()
                assert (got.float() - expected).norm() < TOLERANCE * expected.norm(), (context, rows)
                assert torch.equal(decoded_alone(q, cache, plan, head), got[-1]), (context, rows)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["bf16", "packed"])
@pytest.mark.parametrize("latent", [512, 64])
@pytest.mark.parametrize("heads", [128, 16])
def test_pages_are_read_as_slots_in_a_row(heads: int, latent: int, packed: bool) -> None:
    """Several texts on pages in any order, two with a common beginning, among pages that hold no numbers."""
    torch.manual_seed(heads)
    head, rows_of_page = mla.Head(heads, 128, 64, latent, 128, 192**-0.5), torch.arange(KEYS, device="cuda")
    lengths = (0, 63, 64, 65, 127, 191, 192, 1000, 1025, 1535)
    cache = new_caches(2, 1536 + KEYS, 64 * len(lengths), head.layout(packed), "cuda", 200)[1]
    columns = cache.capacity // KEYS
    cache.store[: cache.spare].view(torch.bfloat16).fill_(float("nan"))
    length = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    for rows in (1, 3, 8, 64):
        free = iter(torch.randperm(200).tolist())
        pages = [[next(free) for _ in range((context + rows + KEYS - 1) // KEYS)] for context in lengths]
        pages[-1][:5] = pages[-2][:5]
        for page in {page for own in pages for page in own}:
            cache.write(rows_of_page + page * KEYS, torch.randn(KEYS, head.width, device="cuda"))
        table = torch.tensor([own + own[-1:] * (columns - len(own)) for own in pages]).int().cuda() * KEYS
        for plan in (mla.chain(length, rows), replace(tree(length[:1], rows), length=length)):
            q = torch.randn(rows * len(lengths), head.padded, head.width, device="cuda").bfloat16()
            paged = replace(plan, pages=table)
            got = mla.attend(q, cache, paged, head)
            for part, alone, own in paged.apart(cache):
                single = new_caches(2, cache.capacity, rows, head.layout(packed), "cuda")[1]
                single.slots.copy_(own.slots)
                expected = mla.attend(q[part].contiguous(), single, replace(alone, pages=None), head)
                assert torch.equal(got[part], expected), (rows, int(alone.length))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [128, 20])
def test_few_tiles_have_the_bits_of_many(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hopper's two ways of sharing a context among programs, by chains, trees and pages of two texts."""
    if not on_hopper(torch.device("cuda", 0)):
        pytest.skip("other cards have one way")
    torch.manual_seed(heads)
    head = mla.Head(heads, 128, 64, 512, 128, 192**-0.5)
    for context in (1, 63, 64, 129, 4095, 16_385, 65_540):
        contiguous = new_caches(2, context + 70, 32, head.layout(), "cuda")[1]
        columns = contiguous.capacity // KEYS
        paged = new_caches(2, context + 70, 32, head.layout(), "cuda", 2 * columns)[1]
        pages = torch.randperm(2 * columns, device="cuda").int().view(2, columns) * KEYS
        for cache in (contiguous, paged):
            cache.store.copy_(torch.randn(cache.store.shape, device="cuda"))
        length = torch.tensor([context - 1], dtype=torch.int32, device="cuda")
        lengths = torch.tensor([context - 1, (context - 1) // 2], dtype=torch.int32, device="cuda")
        for rows in (1, 2, 4, 5, 8, 16):
            for plan in (mla.chain(length, rows), tree(length, rows)):
                for cache, its in ((contiguous, plan), (paged, replace(plan, length=lengths, pages=pages))):
                    q = torch.randn(its.rows, head.padded, head.width, device="cuda").bfloat16()
                    found = []
                    for most in (0, 1000):
                        for name in ("FEW_TILES", "FEW_TILES_LONG"):
                            monkeypatch.setattr(attention, name, most)
                        with torch.inference_mode():  # in which it may have been made
                            for room in (attention.PARTS, attention.PEAKS_AND_SUMS):  # what is not written shows
                                room.room(q.device, 1).fill_(float("nan"))
                        found.append(mla.attend(q, cache, its, head))
                    assert found[0].isfinite().all(), (context, rows)
                    assert torch.equal(*found), (context, rows)
