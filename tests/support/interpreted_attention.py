"""The attention of interpreted.py, which runs it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl

from comparing import close, values_of
from mtp_spec.kernels import fp8, mla
from mtp_spec.kernels.mla import Cache, new_caches
from mtp_spec.kernels.mla import attention as mla_attention
from mtp_spec.kernels.mla.kernels import _split_start, share_of
from mtp_spec.kernels.mla.plan import SPLIT_ENDS, SPLIT_ENDS_ONE_TILE, SPLIT_SIZES, split_of


def attention() -> None:
    """Every step against its reference; every row of a tree bitwise as if decoded alone after its ancestors."""
    generator = torch.Generator().manual_seed(0)
    # two siblings under the root, three tokens below the second, one more below the first
    table = torch.tensor([[0, -1, -1, -1], [0, 1, -1, -1], [0, 2, -1, -1], [0, 2, 3, -1], [0, 2, 3, 4], [0, 1, 5, -1]])
    depths = (table >= 0).sum(1) - 1
    sizes = (
        (4, 32, 64, True, (0, 62), False), (3, 128, 64, True, (1022,), False), (33, 32, 64, False, (1,), False),
        (4, 32, 64, True, (130,), True), (3, 128, 256, True, (64,), True),
    )  # fmt: skip
    # the products before and after in FP8, in bfloat16, in float16
    kinds = ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, False))
    for number, (heads, value, latent, packed, contexts, packed_cache) in enumerate(sizes):
        dtype, quantise = kinds[0 if packed_cache else number % 3]
        power = packed_cache != (value == 128)
        head = mla.Head(heads, 32, 16, latent, value, 0.1, interleaved=packed, power_of_two=power, dtype=dtype)
        rows = heads * (32 + value)
        kv_b, kv_b_scale = torch.randn(rows, latent, generator=generator).to(dtype), None
        if packed:
            kv_b, kv_b_scale = fp8.weight_quant(kv_b)
        angles = torch.randn(1200, 2, 16, generator=generator)
        for context in contexts:
            length = torch.tensor([context], dtype=torch.int32)
            plan = mla.Plan(length, depths.int(), torch.arange(6, dtype=torch.int32), table.int(), 3, offset=1)
            # a second layer's rows and those of the other tokens hold numbers that would show
            cache = new_caches(2, 1100, 6, head.layout(packed_cache), "cpu")[1]
            _fill(cache, 1e4)
            cache.write(torch.arange(context), torch.randn(context, head.width, generator=generator).to(dtype))
            down = torch.randn(6, 96 + head.width, generator=generator).to(dtype)
            norms = torch.rand(96, generator=generator) + 0.5, torch.rand(latent, generator=generator) + 0.5
            other = replace(cache, store=cache.store.clone())
            got = mla.prepare(down, *norms, angles, cache, plan, head, 1e-6, quantise)
            expected = mla.prepare_reference(down, *norms, angles, other, plan, head, 1e-6, quantise)
            close(values_of(got), values_of(expected), 0.08 if quantise else 0.01)
            written = torch.arange(context + 6)
            close(cache.read(written), other.read(written), 0.08 if packed_cache else 0.01)
            assert (cache.slots[context + 6 :] == cache.store[0]).all()
            q = torch.randn(6, heads * 48, generator=generator).to(dtype)
            latent_q = mla.absorb(q, kv_b, kv_b_scale, angles, plan, head)
            absorbed = mla.absorb_reference(q, kv_b, kv_b_scale, angles, plan, head)
            close(latent_q[:, :heads], absorbed[:, :heads], 0.01)
            seen = mla.attend(latent_q, cache, plan, head)
            close(seen, mla.attend_reference(latent_q, cache, plan, head), 0.02)
            for row, depth in enumerate(depths.tolist()):
                alone = replace(cache, store=torch.empty_like(cache.store))
                _fill(alone, -1e4)
                alone.slots[:context] = cache.slots[:context]
                alone.slots[context : context + depth + 1] = cache.slots[context + table[row, : depth + 1]]
                one = mla.chain(length + depth, 1, offset=1)
                assert torch.equal(mla.attend(latent_q[row : row + 1], alone, one, head), seen[row : row + 1])
            line = mla.chain(length, 6)
            close(mla.attend(latent_q, cache, line, head), mla.attend_reference(latent_q, cache, line, head), 0.02)
            values = mla.up(seen, kv_b, kv_b_scale, head, quantise)
            expected = mla.up_reference(seen, kv_b, kv_b_scale, head, quantise)
            close(values_of(values), values_of(expected), 0.08 if quantise else 0.01)
            names = mla_attention.__dict__
            before, names["shared_memory"] = names["shared_memory"], lambda _: 0
            again = mla.up(seen, kv_b, kv_b_scale, head, quantise)  # its weights are not held in shared memory
            names["shared_memory"] = before
            assert torch.equal(values_of(values), values_of(again))
            for quantised in (got, values) if quantise else ():
                assert isinstance(quantised, tuple)
                assert (quantised[1].frexp().mantissa == 0.5).all().item() == power


def pages() -> None:
    """Several texts in one pass, by chains and trees: each bitwise as alone in a cache without pages, whatever lies in
    the others' pages, and whatever has never been written."""
    generator = torch.Generator().manual_seed(0)
    table = torch.tensor([[0, -1, -1], [0, 1, -1], [0, 2, -1], [0, 2, 3]], dtype=torch.int32)
    depths, order = (table >= 0).sum(1).int() - 1, torch.arange(4, dtype=torch.int32)
    tree, plain, chain = (depths, order, table, 2), (order[:1], order[:1], None, 0), (order[:2], order[:2], None, 1)
    angles = torch.randn(400, 2, 16, generator=generator)
    for heads, packed, lengths, passed in (
        (4, False, (0, 66, 126), tree), (4, True, (5, 63, 64, 1, 130), plain), (33, False, (0, 63), chain),
    ):  # fmt: skip
        head, texts = mla.Head(heads, 32, 16, 32, 32, 0.1), len(lengths)
        kv_b, norms = torch.randn(heads * 64, 32, generator=generator).bfloat16(), torch.rand(2, 32) + 0.5
        cache = new_caches(2, 130 + 4, 20, head.layout(packed), "cpu", 4 * texts)[1]
        numbers = torch.randperm(4 * texts, generator=generator)[: 3 * texts].view(texts, 3).int()
        if texts == 3:  # two texts that begin alike
            numbers[2, 0] = numbers[1, 0]
        _fill(cache, float("nan"))  # in pages that nobody has, too
        for page in numbers.flatten().tolist():
            cache.write(torch.arange(64) + 64 * page, torch.full((64, head.width), 1e4))
        plan = mla.Plan(torch.tensor(lengths, dtype=torch.int32), *passed, 1, numbers * 64)
        for _, alone, own in plan.apart(cache):
            own.write(torch.arange(int(alone.length)), torch.randn(int(alone.length), head.width, generator=generator))
        parts = []
        for rows, alone, own in plan.apart(cache):  # the same where slots are in a row
            single = new_caches(2, 130 + 4, 20, head.layout(packed), "cpu")[1]
            single.store[single.base : single.base + single.capacity] = own.slots
            parts.append((rows, replace(alone, pages=None), single))
        down = torch.randn(plan.rows, 32 + head.width, generator=generator).bfloat16()
        q = torch.randn(plan.rows, heads * 48, generator=generator).bfloat16()

        def run(
            rows: slice, plan: mla.Plan, cache: Cache, head: mla.Head = head, kv_b: torch.Tensor = kv_b,
            norms: torch.Tensor = norms, down: torch.Tensor = down, q: torch.Tensor = q,
        ) -> list[torch.Tensor]:  # fmt: skip
            latents = mla.absorb(q[rows], kv_b, None, angles, plan, head)[:, : head.heads]
            padded = torch.nn.functional.pad(latents, (0, 0, 0, head.padded - head.heads)).contiguous()
            prepared = mla.prepare(down[rows].contiguous(), *norms, angles, cache, plan, head, 1e-6)
            assert prepared is not None
            return [*prepared, latents, mla.attend(padded, cache, plan, head)]

        expected = [run(*part) for part in parts]
        for room in (mla_attention.PARTS_BYTES, 1)[: 1 + (texts == 3)]:  # the second: text by text
            mla_attention.PARTS_BYTES, before = room, mla_attention.PARTS_BYTES
            together = run(slice(None), plan, cache)
            mla_attention.PARTS_BYTES = before
            for (rows, _, single), apart, (*_, own) in zip(parts, expected, plan.apart(cache), strict=True):
                for ours, theirs in zip(together, apart, strict=True):
                    assert ours.float().isfinite().all()
                    assert torch.equal(ours[rows].view(torch.uint8), theirs.view(torch.uint8))
                assert torch.equal(own.slots, single.slots)


@triton.jit  # type: ignore[untyped-decorator]
def _shares(
    out: Any, starts: Any, programs: Any, last: Any, COUNTS: tl.constexpr, TURNS: tl.constexpr, END1: tl.constexpr
) -> None:
    count, turn = 1 + tl.arange(0, COUNTS)[:, None], tl.arange(0, TURNS)[None, :]
    start, end = _split_start(count - 1, END1), _split_start(count, END1)
    keys = start + tl.minimum(last, end - start)
    shares = share_of(turn + 0 * count, programs, count + 0 * turn, keys + 0 * turn, END1)
    at = ((count - 1) * TURNS + turn) * 4
    for number in tl.static_range(4):
        tl.store(out + at + number, shares[number])
    tl.store(starts + tl.arange(0, COUNTS), _split_start(tl.arange(0, COUNTS), END1))


def shares() -> None:
    """The programs of a tile together have every split once, and the longest share is near the best by a search, also
    where the last split has only begun."""
    counts, over = 128, list[float]()
    several = (1, 2, 3, 4, 7, 8, 13, 16, 18, 22, 26, 33, 44, 66, 132)
    for ends, programs, last in product((SPLIT_ENDS, SPLIT_ENDS_ONE_TILE), several, (SPLIT_SIZES[-1], 1, 700)):
        out, starts = torch.empty(counts, 256, 4, dtype=torch.int32), torch.empty(counts, dtype=torch.int32)
        _shares[(1,)](out, starts, programs, last, counts, 256, ends[1])
        assert [split_of(start, ends) for start in starts.tolist()] == list(range(counts))
        assert [split_of(start - 1, ends) for start in starts.tolist()[1:]] == list(range(counts - 1))
        for count in range(1, counts + 1):
            sizes = [*starts[: count + 1].diff().tolist(), SPLIT_SIZES[-1]][:count]
            sizes[-1] = min(sizes[-1], last)
            lists = [[*range(high, high - highs, -1), *range(low, low - lows, -1)]
                     for high, highs, low, lows in out[count - 1, :programs].tolist()]  # fmt: skip
            assert sorted(split for own in lists for split in own) == list(range(count)), (programs, count)
            best = [0] * programs
            for size in sorted(sizes, reverse=True):
                best[best.index(min(best))] += size
            longest = max(sum(sizes[split] for split in own) for own in lists)
            over.append(longest / max(best))
            assert longest < max(best) + max(sizes), (programs, count, last, longest, max(best))
    assert sum(over) < 1.025 * len(over)  # dealing them out one by one: 1.11


def _fill(cache: Cache, value: float) -> None:
    """Fills the whole store."""
    rows, width = cache.store.shape[0], cache.layout.width
    replace(cache, base=0, capacity=rows).write(torch.arange(rows), torch.full((rows, width), value))
