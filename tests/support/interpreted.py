"""Kernels on a CPU: run as a program, in Triton's interpreter. See kernels/test_triton.py.

What the interpreter does otherwise than a GPU is corrected by `interpreter`. What remains is the kernels' own logic:
indices, masks, order of sums.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from itertools import product
from typing import Any

os.environ["TRITON_INTERPRET"] = "0" if "KERNELS_ON" in os.environ else "1"

import numpy as np
import pytest
import torch

from comparing import HALVES, ON, close, fp8_values
from incomplete import incomplete_launches_show
from interpreted_attention import attention, pages, shares
from interpreted_prompts import prompts
from interpreter import correct
from mtp_spec.kernels import commit, divergence, exchange, fp8, gemm, moe, quant, sampler
from mtp_spec.kernels.mla import Layout, new_caches
from mtp_spec.kernels.moe.grouping import ARRIVALS
from mtp_spec.sampling import noise as library_noise
from mtp_spec.sampling.params import SamplingParams
from mtp_spec.sampling.sampler import Sampler
from unsound import unsound_gates
from unwritten import spoil

if ON == "cpu":
    correct()
spoil(pytest.MonkeyPatch())  # until the program ends


def products() -> None:
    generator = torch.Generator().manual_seed(0)
    launches = (gemm.Launch(), gemm.Launch(splits=2), gemm.Launch(tile=128, splits=4))
    for n, k in ((128, 256), (576, 512), (130, 304), (200, 1408)):
        w, w_scale = fp8.weight_quant(torch.randn(n, k, generator=generator))
        w[:128, :128] = 0
        a, a_scale = fp8.act_quant(torch.randn(64, k, generator=generator))
        for launch in launches:
            whole = gemm.fp8_gemm(a, a_scale, w, w_scale, dtype=torch.float32, launch=launch)
            close(whole, fp8.fp8_gemm(a, a_scale, w, w_scale), 1e-5)
            for first, rows in ((0, 1), (5, 2), (7, 17), (1, 63)):
                part = slice(first, first + rows)
                out = torch.empty(rows, n)
                gemm.fp8_gemm(a[part], a_scale[part], w, w_scale, out=out, launch=launch)
                assert torch.equal(out, whole[part]), "rows depend on their neighbours"
                assert not gemm.ARRIVALS.room(a.device, 1).any(), "arrival counts must return to zero"

    for dtype in HALVES:
        w, x = (torch.randn(n, 264, generator=generator).to(dtype) for n in (130, 70))
        for launch in launches:
            whole = gemm.bf16_gemm(x, w, dtype=torch.float32, launch=launch)
            close(whole, x.float() @ w.float().T, 1e-5)
            assert torch.equal(gemm.bf16_gemm(x[5:6], w, dtype=torch.float32, launch=launch), whole[5:6])


def quantisers() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, channels in ((1, 128), (3, 576), (63, 300), (2, 2048)):
        for power in (False, True):
            x = torch.randn(rows, channels, generator=generator) * 3
            x[0, :128] = 0
            other = torch.randn(rows, channels, generator=generator)
            weight = torch.rand(channels, generator=generator) + 0.5
            both = torch.cat((x, other), dim=1)
            gated = torch.nn.functional.silu(x) * other
            for kernel, expected in (
                (quant.quant(x, power), fp8.act_quant(x, power_of_two=power)),
                (quant.silu_mul_quant(both, power), fp8.act_quant(gated, power_of_two=power)),
            ):
                close(kernel[1], expected[1], 1e-6)
                close(fp8_values(*kernel), fp8_values(*expected), 1e-6 if power else 0.07)
            got, scales, total = quant.rms_norm_quant(x, weight, 1e-6, other, power)
            assert torch.equal(total, x + other)
            wide = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-6) * weight
            expected = fp8.act_quant(wide, power_of_two=power)
            close(scales, expected[1], 1e-5)
            close(fp8_values(got, scales), fp8_values(*expected), 0.07)
            for dtype in HALVES:
                given = both.to(dtype)
                close(quant.silu_mul(given), quant.silu_mul_reference(given), 0.01)
                assert torch.equal(quant.silu_mul(given[-1:]), quant.silu_mul(given)[-1:])
            alone = quant.rms_norm_quant(x[-1:], weight, 1e-6, other[-1:], power)
            assert torch.equal(alone[0].view(torch.uint8), got[-1:].view(torch.uint8))
    x[:3, 5] = torch.tensor([torch.nan, torch.inf, -torch.inf])[:rows]
    assert bool(fp8_values(*quant.quant(x, power))[:3, 5].isnan().all())


def divergences() -> None:
    """Of rows that end within a stretch, with equals among the likeliest, and of a draft that is its target."""
    generator = torch.Generator().manual_seed(0)
    for dtype, vocabulary in product((torch.float32, torch.bfloat16), (90, divergence.SIZE, divergence.SIZE + 300)):
        p, q = (3 * torch.randn(5, vocabulary, generator=generator).to(dtype) for _ in range(2))
        p[1, [40, 70]], q[1, [40, 70]] = 30.0, 20.0
        q[2] = p[2]
        tokens = torch.tensor([0, 40, 3, vocabulary - 1, 7])
        weights = torch.tensor([1.0, 0.5, 1.0, 0.0, 2.0])
        target, expected = divergence.targets(p), divergence.targets_reference(p)
        for one, other in zip(target[1:], expected[1:], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        for parts in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.1, 0.0, 0.9), (0.5, 2.0, 1.0)):
            found = divergence.divergence(target, q, tokens, weights, *parts)
            wanted = divergence.divergence_reference(expected, q, tokens, weights, *parts)
            assert torch.equal(found.equal, wanted.equal)
            assert found.equal[1]
            assert found.slope.dtype == dtype
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=0.01 if dtype != torch.float32 else 1e-4, atol=1e-5)


def experts() -> None:
    """The whole layer against its reference, and every row alone; scales as they are, and powers of two; 16 bits."""
    for power in (False, True):
        _experts(power)
    for dtype in HALVES:
        _wide_experts(dtype)


def _wide_experts(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    routing = moe.Routing(experts=6, chosen=2, shared=1, scale=1.5)
    channels, inner = 208, 80
    gate_up, down = (torch.randn(shape, generator=generator).div(8).to(dtype).to(ON)
                     for shape in ((7, 2 * inner, channels), (7, channels, inner)))  # fmt: skip
    weights = moe.Experts(gate_up, None, down, None)
    router, bias = torch.randn(6, channels, generator=generator).to(ON), torch.randn(6, generator=generator).to(ON)
    x = torch.randn(70, channels, generator=generator).to(dtype).to(ON)
    expected = moe.moe_reference(x, router, bias, routing, weights)
    launches = moe.Launch(), moe.Launch(up_tile=128, down_tile=128), moe.Launch(tokens=32, up_unroll=2)
    for launch in launches:
        whole = moe.moe(x, router, bias, routing, weights, launch=launch)
        close(whole, expected, 0.01)
        for first, rows in ((0, 1), (3, 2), (1, 16), (5, 63)):
            chosen = slice(first, first + rows)
            alone = moe.moe(x[chosen].contiguous(), router, bias, routing, weights, launch=launch)
            assert torch.equal(alone, whole[chosen])
    ones, indices = torch.ones(70, 1, device=ON), torch.arange(70, device=ON).remainder(7)[:, None].int()
    for run in (moe.experts, moe.experts_reference):
        rounded = 3 * run(x, indices, ones, weights).float()
        assert torch.equal(run(x, indices, 3 * ones, weights), rounded.to(dtype)), "rounded before it is weighted"


def _experts(power: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    routing = moe.Routing(experts=8, chosen=2, groups=4, kept_groups=2, shared=1, scale=1.5)
    channels, inner = 256, 128
    quantised = [
        [fp8.weight_quant(torch.randn(*shape, generator=generator) / 16) for _ in range(9)]
        for shape in ((inner, channels), (inner, channels), (channels, inner))
    ]
    gate, up, down = ([w for w, _ in part] for part in quantised)
    gate_scale, up_scale, down_scale = ([s for _, s in part] for part in quantised)
    weights = moe.Experts(
        torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)]).to(ON),
        torch.stack([torch.cat(pair) for pair in zip(gate_scale, up_scale, strict=True)]).to(ON),
        torch.stack(down).to(ON),
        torch.stack(down_scale).to(ON),
        power_of_two=power,
    )
    router, bias = torch.randn(8, channels, generator=generator), torch.randn(8, generator=generator) * 0.1
    x, router, bias = (t.to(ON) for t in (torch.randn(17, channels, generator=generator), router, bias))
    expected = moe.moe_reference(x, router, bias, routing, weights)
    launches = moe.Launch(), moe.Launch(up_tile=128, down_tile=128), moe.Launch(tokens=32)
    for launch in launches[:1] if power else launches:
        whole = moe.moe(x, router, bias, routing, weights, launch=launch)
        # scales that are powers of two have one value for most roundings: what is quantised is the same, but on a GPU,
        # whose sums differ more, a few codes of what lies between the products fall to their neighbours
        close(whole, expected, 1e-5 if power and ON == "cpu" else 0.05)
        for first, rows in ((0, 1), (3, 2), (1, 16)):
            chosen = slice(first, first + rows)
            alone = moe.moe(x[chosen].contiguous(), router, bias, routing, weights, launch=launch)
            assert torch.equal(alone, whole[chosen])
    for normalise in (True, False):
        unsound_gates(replace(routing, normalise=normalise), x, router, bias)


def grouping() -> None:
    """Pairs by expert, for few rows by one program, for many by all."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((3, 2, 8, 16), (64, 3, 5, 16), (65, 3, 9, 32), (300, 2, 6, 32), (200, 1, 3, 16))
    for rows, chosen, experts, tokens in sizes:
        weights = torch.rand(rows, experts, generator=generator) * torch.arange(experts).square()
        indices = weights.argsort(1, descending=True)[:, :chosen].sort(1).values.int()
        got = moe.group(indices.to(ON), experts, tokens)
        expected = moe.group_reference(indices, experts, tokens)
        assert torch.equal(got.order.cpu(), expected.order)
        assert torch.equal(got.count.cpu(), expected.count)
        for ours, theirs in ((got.expert, expected.expert), (got.first, expected.first)):
            assert torch.equal(ours.cpu()[expected.count > 0], theirs[expected.count > 0])
        assert not ARRIVALS.room(got.order.device, 1).any()


def noise() -> None:
    """The device's noise is the library's, to the last bit or the one before."""
    seeds, positions = [0, 7, 2**64 - 1, 2**63], [0, 5, 40_000, 2**33]
    bits = torch.tensor([sampler.seed_bits(s) for s in seeds])
    got = sampler.gumbel(bits.to(ON), torch.tensor(positions).to(ON), 300).cpu()
    for row, seed, position in zip(got, seeds, positions, strict=True):
        expected = library_noise.gumbel(seed, position, 300)
        assert torch.equal(sampler.gumbel_reference(seed, position, 300), expected)
        apart = row.view(torch.int32).long() - expected.view(torch.int32).long()
        assert int(apart.abs().max()) <= 1
    for seed in seeds:
        stream = np.random.Generator(np.random.Philox(key=np.array([seed, 1], dtype=np.uint64))).random(60)
        for first in (0, 1, 7, 40):
            place = torch.tensor([first]).to(ON)
            got = sampler.uniforms(torch.tensor([sampler.seed_bits(seed)]).to(ON), place, 20)
            assert got.tolist() == stream[first : first + 20].tolist()
            assert torch.equal(sampler.uniforms_reference(seed, first, 20), got.cpu())


WAYS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.1, "frequency_penalty": 0.2},
    {"temperature": 1e-30, "top_p": 0.5},
]


def sampling() -> None:
    """The device draws the library's tokens and siblings, every row by its own settings, ties included."""
    vocabulary, ways = 1000, len(WAYS)
    prompt, generated, drafted = [1, 2, 3, 9], [5, 5, 7, 2], [11, 12]
    logits = torch.randn(ways, vocabulary, generator=torch.Generator().manual_seed(0)) * 3
    seen = torch.zeros(ways, vocabulary, dtype=torch.int32)
    seen[:, prompt] = sampler.IN_PROMPT
    for token in generated:
        seen[:, token] += 1
    values = torch.tensor([sampler.settings_row(**way) for way in WAYS], dtype=torch.float64)
    bias = torch.zeros(ways, vocabulary)
    settings = sampler.Settings(*(t.to(ON) for t in (values, torch.full((ways,), 7), bias, seen)))
    stages = sampler.Stages(bias=True, penalty=True, top_k=True, top_p=True, min_p=True)
    request, position = torch.arange(ways, dtype=torch.int32).to(ON), torch.arange(ways).to(ON) + 100
    path = torch.tensor([[11, -1, 12]] * ways, dtype=torch.int32).to(ON)
    for rows in (logits, logits.round()):
        got = sampler.sample(rows.to(ON), request, position, settings, stages, 4, path, keep=True)
        assert got.rows is not None
        for row, way in enumerate(WAYS):
            library = Sampler(SamplingParams(seed=7, **way), vocabulary)
            history = library.history(prompt).extend(generated + drafted)
            processed = library.process(rows[row], history)
            expected = library.top(processed, 100 + row, 4)
            assert got.tokens[row].tolist()[: len(expected)] == expected, way
            assert torch.equal(got.rows[row].cpu(), processed), way


def commits() -> None:
    """The walk and the moves of the cache, against the plain form, on random trees and draws from few tokens."""
    generator = torch.Generator().manual_seed(0)
    for texts, rows in ((1, 1), (3, 2), (2, 5), (1, 16), (2, 33)):
        for _ in range(6):
            earlier = [int(torch.randint(0, row, (), generator=generator)) for row in range(1, rows)]
            parents = torch.tensor([-1, *earlier])
            ids = torch.randint(0, 3, (texts * rows,), generator=generator)
            drawn = torch.randint(0, 3, (texts * rows,), generator=generator).int()
            failed = (torch.rand(texts * rows, generator=generator) < 0.1).int()
            chosen = torch.randint(0, 9, (texts, 9), generator=generator).sort().values
            got: list[list[torch.Tensor]] = []
            for kernel in (True, False):
                place = ON if kernel else "cpu"
                path, tokens = (torch.full((texts, 9), -7, dtype=torch.int64, device=place) for _ in range(2))
                record = torch.full((texts, commit.record_size(9)), -7, dtype=torch.int32, device=place)
                seen = torch.zeros(texts, 3, dtype=torch.int32, device=place)
                inputs = [t.to(place) for t in (drawn, failed, ids, parents.int())]
                commit.__dict__["runs_triton"] = lambda _, kernel=kernel: kernel  # else the references
                if (depth := _depth(parents)) < 9:
                    commit.accept(*inputs, path, tokens, record, seen, depth if rows % 3 else None)
                caches = new_caches(3, 100, 0, Layout(64, 16, packed=rows % 2 == 1), place, 6 if texts > 1 else None)
                held = caches[0].store
                held.copy_(torch.arange(held.numel()).view(held.shape) % 251)
                length = torch.tensor([60, 3, 70][:texts], dtype=torch.int32, device=place)
                own = chosen.to(place)
                record[:, commit.COUNT] = torch.tensor([5, 2, 9][:texts], device=place)
                table = torch.tensor([5, 0, 2, 4, 1, 3][: 2 * texts], dtype=torch.int32, device=place).view(-1, 2) * 64
                commit.commit(caches, length, own, record, table if texts > 1 else None, 8 if rows % 3 else None)
                if texts > 1:
                    commit.clean(caches[1:], torch.tensor([3, 0], device=place))
                hidden, ring = (torch.full((texts, count, 1300), float("nan"), device=place).bfloat16()
                                for count in (3, 7))  # fmt: skip
                ring_tokens = torch.full((texts, 7), -7, dtype=torch.int64, device=place)
                row = (torch.arange(1300 * texts, device=place) % 89).bfloat16().view(texts, 1300)
                commit.keep(row, own + rows, length, hidden, ring, ring_tokens)
                got.append([t.cpu() for t in (path, tokens, record, seen, caches[0].store)])
                got[-1] += [t.nan_to_num(-5.0).cpu() for t in (hidden, ring, ring_tokens)]
            assert all(torch.equal(a, b) for a, b in zip(*got, strict=True))


def exchanges() -> None:
    """Two ranks, one after the other: the second's part of an exchange is put where the first will look for it."""
    size, generator = 2, torch.Generator().manual_seed(0)
    rooms = [torch.zeros(exchange.room_words(size), dtype=torch.int32) for _ in range(size)]
    addresses = torch.tensor([room.data_ptr() for room in rooms])
    flags = 2 * size * exchange.PROGRAMS * exchange.CAPACITY
    turns = torch.zeros(exchange.PROGRAMS, dtype=torch.int32)
    lost = torch.zeros(1, dtype=torch.int32)
    held = exchange.Rooms(0, addresses, turns, lost, looks=3)
    for turn, (rows, first, second) in enumerate(((1, 256, 8), (3, 1024, 0), (2, 4, 12), (5, 3000, 64)), start=1):
        shapes = [(rows, width) for width in (first, second) if width]
        own, other = ([torch.randint(-9, 9, shape, generator=generator, dtype=torch.int32) for shape in shapes]
                      for _ in range(size))  # fmt: skip
        words = torch.cat([x.flatten() for x in other])
        each = -(-len(words) // (exchange.PROGRAMS * exchange.CHUNK)) * exchange.CHUNK
        for program, part in enumerate(words.split(each)):
            place = (((int(turns[program]) + 1) & 1) * size + 1) * exchange.PROGRAMS + program
            rooms[0][place * exchange.CAPACITY :][: len(part)] = part
            rooms[0][flags + exchange.PROGRAMS + program] = turns[program] + 1
        assert exchange.fits(own)
        got = exchange.exchange([x.view(torch.float32) for x in own], held)
        expected = [torch.cat(pair, 1) for pair in zip(own, other, strict=True)]
        assert all(torch.equal(a.view(torch.int32), b) for a, b in zip(got, expected, strict=True))
        sent = rooms[1][((turn & 1) * size) * exchange.PROGRAMS * exchange.CAPACITY :][: min(each, len(words))]
        assert torch.equal(sent, torch.cat([x.flatten() for x in own])[: len(sent)])
        assert rooms[1][flags] == turns[0] == turn
        assert not lost
    exchange.exchange([own[0]], held)  # nobody answers
    assert lost


def incomplete() -> None:
    incomplete_launches_show(ON)


def _depth(parents: torch.Tensor) -> int:
    depths: list[int] = []
    for parent in parents.tolist():
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return max(depths)


if __name__ == "__main__":
    whats = (products, quantisers, divergences, experts, grouping, attention, pages, shares, prompts, commits,
             exchanges, noise, sampling, incomplete)  # fmt: skip
    for what in whats:
        if what.__name__ == sys.argv[1]:
            what()
    print("passed")
