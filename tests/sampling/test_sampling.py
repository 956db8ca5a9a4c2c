"""Noise, the sampler's distribution, acceptance walk and text ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from mtp_spec import OptionError, SamplingParams, Speculation
from mtp_spec.sampling.noise import GumbelNoise, gumbel, random_bits
from mtp_spec.sampling.sampler import Sampler
from mtp_spec.speculation import resolve_speculation


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 as the paper writes it."""
    for _ in range(10):
        first, third = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [
            (third >> 64) ^ counter[1] ^ key[0],
            third & (2**64 - 1),
            (first >> 64) ^ counter[3] ^ key[1],
            first & (2**64 - 1),
        ]
        key = [(key[0] + 0x9E3779B97F4A7C15) % 2**64, (key[1] + 0xBB67AE8584CAA73B) % 2**64]
    return counter


def test_philox_reference_gives_the_published_answers() -> None:
    known = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox4x64([0] * 4, [0] * 2) == known


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (7, 1), (2**64 - 1, 2**40 + 3)])
def test_noise_is_the_documented_function_of_seed_position_and_token(seed: int, position: int) -> None:
    bits = random_bits(seed, position, 21)
    for token in range(21):
        word = philox4x64([1 + token // 8, position, 0, 0], [seed, 0])[token % 8 // 2]
        assert int(bits[token]) == (word >> (32 * (token % 2))) & 0xFFFFFFFF


def test_noise_is_a_function_of_seed_position_and_token() -> None:
    rows = GumbelNoise(5, 100)
    for position in (3, 900, 0, 17, 3):
        assert torch.equal(rows.row(position), gumbel(5, position, 100))
    assert not torch.equal(gumbel(5, 1, 100), gumbel(5, 2, 100))
    assert not torch.equal(gumbel(5, 1, 100), gumbel(6, 1, 100))


DISTRIBUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.5},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
}


@pytest.mark.parametrize("distribution", list(DISTRIBUTIONS))
def test_draws_follow_the_processed_law(distribution: str) -> None:
    options: dict[str, Any] = {"temperature": 1.0, **DISTRIBUTIONS[distribution]}
    logits = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0, 0.7])
    p = (logits / options["temperature"]).softmax(-1)
    order = p.argsort(descending=True)
    keep = torch.ones(6, dtype=torch.bool)
    if "top_k" in options:
        keep[order[options["top_k"] :]] = False
    if "top_p" in options:
        keep[order[(p[order].cumsum(0) - p[order]) >= options["top_p"]]] = False
    if "min_p" in options:
        keep = p >= options["min_p"] * p.max()
    p = torch.where(keep, p, torch.zeros(())) / p[keep].sum()
    sampler = Sampler(SamplingParams(seed=11, **options), 6)
    row = sampler.process(logits, sampler.history([0]))
    count = 6000
    draws = np.bincount([sampler.draw(row, t) for t in range(count)], minlength=6)
    assert (draws[~keep.numpy()] == 0).all()
    expected = p[keep].double().numpy()
    assert chisquare(draws[keep.numpy()], expected / expected.sum() * count).pvalue > 1e-4


def test_siblings_are_distinct_and_begin_with_the_draw() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=0), 50)
    row = sampler.process(torch.randn(50, generator=torch.Generator().manual_seed(0)), sampler.history([1]))
    for position in range(20):
        top = sampler.top(row, position, 5)
        assert top[0] == sampler.draw(row, position)
        assert len(set(top)) == 5


def test_penalties_follow_the_path() -> None:
    sampler = Sampler(SamplingParams(temperature=0.0, frequency_penalty=1.0, repetition_penalty=2.0), 4)
    history = sampler.history([3])
    row = torch.tensor([1.0, 0.9, 0.5, 4.0])
    assert sampler.process(row, history).tolist() == pytest.approx([1.0, 0.9, 0.5, 2.0])
    twice = history.child(0).child(0)
    assert sampler.process(row, twice).tolist() == pytest.approx([0.5 - 2.0, 0.9, 0.5, 2.0])
    assert sampler.process(row, history).tolist() == pytest.approx([1.0, 0.9, 0.5, 2.0])


BAD = [
    {"temperature": -1},
    {"temperature": float("nan")},
    {"top_p": 0.0},
    {"top_p": 1.1},
    {"top_k": -1},
    {"min_p": 2},
    {"max_new_tokens": 0},
    {"repetition_penalty": 0},
    {"seed": -1},
    {"logprobs": -2},
    {"stop": [""]},
]


@pytest.mark.parametrize("options", BAD, ids=str)
def test_bad_options_are_named(options: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        SamplingParams(**options)


def test_unknown_option_is_named() -> None:
    with pytest.raises(OptionError, match="temprature"):
        SamplingParams.from_options({"temprature": 1.0})


@pytest.mark.parametrize("value", ["on", 9, -1, 2.5, (1, 1)])
def test_bad_speculation(value: object) -> None:
    with pytest.raises(OptionError, match="speculation"):
        resolve_speculation(value)


def test_speculation_shapes() -> None:
    assert Speculation(depth=3, branching=(3, 2)).branching == (3, 2, 1)
    assert Speculation(branching=(3, 2, 1)).nodes == 15
    assert resolve_speculation(0) is None
    with pytest.raises(OptionError, match="64"):
        Speculation(branching=(8, 8, 8))
    with pytest.raises(OptionError, match="acceptance"):
        Speculation(acceptance="majority")
