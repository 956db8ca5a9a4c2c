"""The steps of long prompts of interpreted.py, which runs them: what surrounds the products that only Hopper has."""

from __future__ import annotations

import torch

from comparing import HALVES, ON, close
from mtp_spec.kernels import fp8, mla, moe, quant
from mtp_spec.kernels.mla import KEYS, new_caches, prompt
from mtp_spec.kernels.mla.reference import rotate
from mtp_spec.kernels.moe import many, router


def prompts() -> None:
    """Latents put in order, queries rotated, weights widened; pairs sorted and added; scores by products."""
    generator = torch.Generator().manual_seed(0)
    for heads, nope, interleaved, packed_cache in ((3, 32, True, False), (4, 16, False, True)):
        head = mla.Head(heads, nope, 16, 256, 48, 0.1, interleaved)
        _latents(head, packed_cache, generator)
        _queries(head, generator)
    for n, k in ((130, 300), (200, 48)):
        w, scale = fp8.weight_quant(torch.randn(n, k, generator=generator).to(ON))
        for dtype in HALVES:
            assert torch.equal(prompt.widened(w, scale, dtype), fp8.weight_dequant(w, scale, dtype=dtype))
            assert prompt.widened(w.to(dtype), None, dtype).dtype == dtype
    for rows, per_row, experts in ((1, 2, 3), (63, 1, 5), (33, 3, 40)):
        _pairs(rows, per_row, experts, generator)
    for dtype in (torch.float32, torch.bfloat16):
        _scores(dtype, generator)


def _latents(head: mla.Head, packed: bool, generator: torch.Generator) -> None:
    layout = head.layout(packed)
    for paged in (False, True):
        cache = new_caches(2, 3 * KEYS, 0, layout, ON, 9 if paged else None)[1]
        cache.store.view(torch.bfloat16).fill_(torch.nan)  # in pages that nobody has, too
        table = (torch.tensor([[5, 0, 2]], dtype=torch.int32) * KEYS).to(ON) if paged else None
        zero = torch.zeros(1, dtype=torch.int32).to(ON)
        plan = mla.Plan(zero, zero, zero, None, 0, 0, table)
        _, _, own = next(plan.apart(cache))
        for count in (1, 63, 64, 129):
            rows, slots = (
                torch.randn(count, head.width, generator=generator).bfloat16().to(ON),
                torch.arange(count).to(ON),
            )
            own.write(slots, rows)
            latents, ropes = prompt.gathered(cache, plan, count, head)
            assert torch.equal(torch.cat((latents, ropes), 1), own.read(slots))


def _queries(head: mla.Head, generator: torch.Generator) -> None:
    table, width = torch.randn(300, 2, head.rope, generator=generator).to(ON), head.nope + head.rope
    for rows, start in ((1, 0), (37, 129)):
        # columns of a wider matrix, as without a query LoRA
        held = torch.randn(rows, head.heads * width + 24, generator=generator).bfloat16().to(ON)
        q, before = held[:, : head.heads * width], held.clone()
        prompt.turn(q, table, start, head)
        nope, rope = (
            before[:, : head.heads * width].unflatten(-1, (head.heads, width)).split((head.nope, head.rope), -1)
        )
        turned = rotate(rope, table[start : start + rows].unsqueeze(1), head.interleaved)
        got_nope, got_rope = q.unflatten(-1, (head.heads, width)).split((head.nope, head.rope), -1)
        assert torch.equal(got_nope, nope)
        close(got_rope, turned, 0.01)
        assert torch.equal(held[:, head.heads * width :], before[:, head.heads * width :])


def _pairs(rows: int, per_row: int, experts: int, generator: torch.Generator) -> None:
    """Pairs next to those of their expert, of which some have none; each row's parts added in order."""
    indices = torch.rand(rows, experts, generator=generator).argsort(1)[:, :per_row].sort(1).values.int()
    order = moe.group_reference(indices, experts, many.TOKENS).order
    x, scale = quant.quant_reference(torch.randn(rows, 304, generator=generator))
    got, scales = many.sort(x.to(ON), scale.to(ON), order.to(ON), per_row)
    assert scales is not None
    rows_of_pairs = order.long() // per_row
    assert torch.equal(got.cpu().view(torch.uint8), x.view(torch.uint8)[rows_of_pairs])
    assert torch.equal(scales.cpu(), scale[rows_of_pairs])
    wide, none = many.sort(x.to(torch.bfloat16).to(ON), None, order.to(ON), per_row)
    assert none is None
    assert torch.equal(wide.cpu(), x.to(torch.bfloat16)[rows_of_pairs])
    parts, weights = torch.randn(rows * per_row, 272, generator=generator), torch.rand(rows, per_row)
    out = torch.full((rows, 1424), 7.0).to(ON)
    many.add(parts.to(ON), weights.to(ON), out, 128)
    expected = torch.zeros(rows, 272)
    for place in range(per_row):
        expected += weights[:, place, None] * parts.view(rows, per_row, -1)[:, place]
    close(out[:, 128:400].cpu(), expected, 1e-6)
    assert (out[:, :128] == 7).all()
    assert (out[:, 400:] == 7).all()


def _scores(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Rows of long prompts by products, the others as if these were not there."""
    routing = moe.Routing(experts=12, chosen=3, groups=4, kept_groups=2, shared=1)
    x = torch.randn(20, 600, generator=generator).bfloat16().to(ON)
    weight, bias = (
        torch.randn(12, 600, generator=generator).to(dtype).to(ON),
        torch.randn(12, generator=generator).to(ON),
    )
    close(router.scored(x, weight), x.float() @ weight.float().T, 1e-5)
    plain = moe.route(x, weight, bias, routing)
    for long in ((slice(0, 20),), (slice(3, 4), slice(6, 17))):
        mixed = moe.route(x, weight, bias, routing, long=long)
        others = torch.ones(20, dtype=torch.bool)
        for part in long:
            others[part] = False
        assert plain.quantised is not None
        assert mixed.quantised is not None
        assert torch.equal(mixed.quantised.view(torch.uint8), plain.quantised.view(torch.uint8))
        assert torch.equal(mixed.weights[others], plain.weights[others])
        assert torch.equal(mixed.indices, plain.indices)
        close(mixed.weights, plain.weights, 1e-5)
