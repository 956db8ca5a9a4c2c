"""Rows that the CPU engine draws from: the same noise, token and lead as NumPy's."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from mtp_spec.errors import NotFiniteError
from mtp_spec.kernels.cpu import engine
from mtp_spec.sampling.noise import _to_gumbel, gumbel, random_bits
from mtp_spec.sampling.params import SamplingParams
from mtp_spec.sampling.sampler import Sampler

pytestmark = pytest.mark.skipif(engine.why_not() is not None, reason="needs the CPU engine")
SIZES = (1, 2, 15, 16, 17, 63, 64, 65, 129, 1000, 8192)


def made(level: str, seed: int, position: int, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    row = np.full(count + 1, np.nan, dtype=np.float32)
    engine.library(level).noise(seed, position, count, row.ctypes.data)
    assert math.isnan(row[count])  # nothing is written past the end
    return row[:count]


@pytest.mark.parametrize("level", engine.levels())
def test_noise_is_numpys(level: str) -> None:
    """Logarithms of two libraries may round to different float32 neighbours, once in some hundred million numbers."""
    for seed, position, count in itertools.product((0, 7, 2**64 - 1), (0, 1, 2**40, 2**64 - 1), (*SIZES, 129_280)):
        ours, theirs = made(level, seed, position, count), _to_gumbel(random_bits(seed, position, count))
        assert (ours != theirs).sum() <= 1
        np.testing.assert_allclose(ours, theirs, rtol=2e-7)


def test_levels_give_the_same_bits() -> None:
    rows = [made(level, 3, 11, 129_280) for level in engine.levels()]
    assert all(np.array_equal(rows[0], row) for row in rows)


@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1e-3, 0.8, 1.0, 30.0])
@pytest.mark.parametrize("size", SIZES)
def test_picked_is_what_is_drawn(size: int, temperature: float) -> None:
    dice = torch.Generator().manual_seed(size)
    for number, width in itertools.product(range(12), (0.0, 1.0, 40.0)):  # 0.0: all are equal, so the noise decides
        sampler = Sampler(SamplingParams(temperature=temperature, seed=number), size)
        row = torch.randn(size, generator=dice) * width
        if number % 3 == 0:
            row = row.round()  # equal ones
        processed = sampler.process(row, sampler.history([]))
        token = sampler.draw(processed, number)
        picked = sampler.pick(row, number)
        assert picked is not None
        assert picked[0] == token
        assert picked[1] == pytest.approx(sampler.lead(processed, number, token), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_left_to_process(wrong: float) -> None:
    sampler = Sampler(SamplingParams(temperature=0.7, seed=1), 130)
    for place in (0, 15, 16, 127, 128, 129):
        row = torch.zeros(130)
        row[place] = wrong
        assert sampler.pick(row, 0) is None
        if wrong != -math.inf:
            with pytest.raises(NotFiniteError):
                sampler.process(row, sampler.history([]), 0)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 3},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"logit_bias": {1: 2.0}},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"logits_processor": [lambda ids, row: row]},
    ],
)
def test_rows_that_change_otherwise_are_left_to_process(options: dict[str, Any]) -> None:
    row = torch.randn(40, generator=torch.Generator().manual_seed(0))
    assert Sampler(SamplingParams(temperature=0.7, seed=1, **options), 40).pick(row, 0) is None
    assert Sampler(SamplingParams(temperature=0.7, seed=1), 40).pick(row, 0) is not None
    assert Sampler(SamplingParams(temperature=0.7, seed=1), 40).pick(row.double(), 0) is None
    assert Sampler(SamplingParams(temperature=0.7, seed=1), 20).pick(torch.randn(40)[::2], 0) is None


def test_noise_without_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = gumbel(5, 6, 1000)
    monkeypatch.setenv(engine.SWITCH, "torch")
    torch.testing.assert_close(gumbel(5, 6, 1000), ours, rtol=2e-7, atol=0.0)
    assert Sampler(SamplingParams(temperature=0.7, seed=1), 1000).pick(ours, 0) is None
