"""The CPU engine's operations against their references in NumPy, bit for bit, at every level of this processor."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_engine import Array, Kernels, Seen, matrix, numbers, same
from mtp_spec.kernels.cpu import reference
from mtp_spec.kernels.cpu.engine import Matrix, levels, why_not
from mtp_spec.kernels.cpu.reference import GREEDY, GROUP_MAX, GROUP_TWO, SIGMOID, SOFTMAX, Routing

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
LEVELS = levels()
E4M3 = torch.float8_e4m3fn
KINDS = (torch.float32, torch.bfloat16, torch.float16, E4M3)
SIZES = (1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 130, 200, 384)
BLOCKS = ((128, 128), (64, 64), (32, 128), (128, 32), (48, 80), (1, 16), (5, 7))
ROWS = st.integers(1, 70) | st.sampled_from((1, 2, 3, 4, 5, 11, 12, 13, 63, 64, 65, 129))
SEEDS = st.integers(0, 2**32 - 1)
NUMBERS = settings(max_examples=60, deadline=None)


@pytest.fixture(params=LEVELS, scope="module")
def engine(request: pytest.FixtureRequest) -> Kernels:
    return Kernels(request.param)


@st.composite
def a_part(draw: st.DrawFn, sizes: tuple[int, ...] = SIZES) -> tuple[int, int, int]:
    """Draws a number of rows, and the first and end of a part of them."""
    count = draw(st.sampled_from(sizes))
    first = draw(st.just(0) | st.integers(0, count - 1))
    return count, first, draw(st.just(count) | st.integers(first + 1, count))


@NUMBERS
@given(
    kind=st.sampled_from(KINDS), rows=ROWS, part=a_part(), columns=st.sampled_from(SIZES),
    block=st.sampled_from(BLOCKS), seed=SEEDS, edges=st.booleans(), add=st.booleans(), gather=st.booleans(),
)  # fmt: skip
def test_product(engine: Kernels, kind: torch.dtype, rows: int, part: tuple[int, int, int], columns: int,
                 block: tuple[int, int], seed: int, edges: bool, add: bool, gather: bool) -> None:  # fmt: skip
    count, first, end = part
    stored, x = matrix(kind, count, columns, seed, block, edges), numbers(seed + 1, rows, columns, edges=edges)
    chosen = np.random.default_rng(seed).integers(0, rows, rows + 2).tolist() if gather else None
    taken = x if chosen is None else x[chosen]
    expected = reference.product(stored, first, end, taken)
    before = numbers(seed + 2, *expected.shape, edges=edges) if add else None
    if before is not None:
        with np.errstate(all="ignore"):
            expected = before + expected
    assert same(engine.product(stored, first, end, x, chosen, before), expected)


@NUMBERS
@given(kind=st.sampled_from(KINDS), rows=ROWS, part=a_part((1, 5, 16, 33, 130)), columns=st.sampled_from(SIZES),
       block=st.sampled_from(BLOCKS), seed=SEEDS, edges=st.booleans())  # fmt: skip
def test_columns(engine: Kernels, kind: torch.dtype, rows: int, part: tuple[int, int, int], columns: int,
                 block: tuple[int, int], seed: int, edges: bool) -> None:  # fmt: skip
    count, first, end = part
    stored, x = matrix(kind, count, columns, seed, block, edges), numbers(seed + 1, rows, end - first, edges=edges)
    assert same(engine.columns(stored, first, end - first, x), reference.columns(stored, first, end - first, x))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_alone_as_in_company(engine: Kernels, kind: torch.dtype) -> None:
    stored, x = matrix(kind, 50, 150, 3), numbers(4, 70, 150)
    whole = engine.product(stored, 3, 47, x)
    up = engine.columns(stored, 5, 40, x[:, :40])
    for row in range(70):
        assert same(engine.product(stored, 3, 47, x[row : row + 1]), whole[row : row + 1])
        assert same(engine.columns(stored, 5, 40, x[row : row + 1, :40]), up[row : row + 1])
    for count in range(2, 20):
        assert same(engine.product(stored, 3, 47, x[:count]), whole[:count])
        assert same(engine.columns(stored, 5, 40, x[:count, :40]), up[:count])
    for column in range(3, 47):  # nor does it matter how the matrix's rows are divided
        assert same(engine.product(stored, column, column + 1, x), whole[:, column - 3 : column - 2])


def test_every_code_of_fp8(engine: Kernels) -> None:
    codes = torch.arange(256).to(torch.uint8).view(256, 1)
    codes = codes[(codes & 0x7F).flatten() != 0x7F]
    for scale in (1.0, 0.37, -2.0):
        stored = Matrix(codes.view(E4M3), torch.full((2, 1), scale))
        expected = codes.view(E4M3).float().numpy() * np.float32(scale)
        for rows in (1, 4, 13, 70):
            x = np.ones((rows, 1), np.float32)
            got = engine.product(stored, 0, len(codes), x)
            assert np.array_equal(got, np.broadcast_to(expected.T, got.shape))


@NUMBERS
@given(heads=st.integers(1, 19), rows=st.integers(1, 11), width=st.sampled_from((1, 17, 24, 40, 64, 129)),
       lost=st.integers(0, 20), sequences=st.integers(1, 3), longest=st.sampled_from((1, 15, 63, 64, 65, 129, 200)),
       seed=SEEDS, edges=st.booleans())  # fmt: skip
def test_attend(engine: Kernels, heads: int, rows: int, width: int, lost: int, sequences: int, longest: int, seed: int,
                edges: bool) -> None:  # fmt: skip
    random, values = np.random.default_rng(seed), max(1, width - lost)
    caches = [numbers(seed + n, longest, width, edges=edges) for n in range(sequences)]
    seen = []
    for sequence in sorted(random.integers(0, sequences, rows).tolist()):
        order = random.permutation(longest)
        run = int(random.integers(0, longest + 1))
        more = tuple(int(slot) for slot in order[order >= run][: random.integers(0, 9)])
        seen.append(Seen(sequence, run, more) if run + len(more) else Seen(sequence, longest))
    unseen = [set(range(longest)) for _ in caches]
    for own in seen:
        unseen[own.sequence] -= {*range(own.run), *own.more}
    for latents, left in zip(caches, unseen, strict=True):
        latents[sorted(left)] = np.nan
    q, scale = numbers(seed + 9, rows, heads, width, edges=edges), 0.3
    got = engine.attend(q, caches, seen, values, scale, seed)
    for row, own in enumerate(seen):
        slots = [*range(own.run), *own.more]
        assert same(got[row], reference.attend(q[row], caches[own.sequence], slots, values, scale))


def test_attend_as_a_line(engine: Kernels) -> None:
    """A tree's row, whose last slots are further ones, has the bits of one that follows a committed line."""
    latents, q = numbers(1, 150, 40), numbers(2, 6, 3, 40)
    line = [Seen(0, length) for length in (141, 142, 143, 144, 145, 146)]
    tree = [Seen(0, 140, tuple(range(140, own.run))) for own in line]
    expected = engine.attend(q, [latents], line, 24, 0.2)
    assert same(engine.attend(q, [latents], tree, 24, 0.2), expected)
    for row in range(6):
        assert same(engine.attend(q[row : row + 1], [latents], [line[row]], 24, 0.2, row), expected[row : row + 1])
    both = engine.attend(np.concatenate([q, q]), [latents, latents[::-1].copy()],
                         [*line, *(Seen(1, own.run) for own in line)], 24, 0.2)  # fmt: skip
    assert same(both[:6], expected)


@NUMBERS
@given(size=st.sampled_from(SIZES), seed=SEEDS, edges=st.booleans(), eps=st.sampled_from((1e-6, 0.0, 1e-30)))
def test_norm(engine: Kernels, size: int, seed: int, edges: bool, eps: float) -> None:
    x, weight = numbers(seed, size, edges=edges), numbers(seed + 1, size)
    assert same(engine.norm(x, weight, eps), reference.norm(x, weight, eps))


@NUMBERS
@given(pairs=st.integers(1, 70), seed=SEEDS, edges=st.booleans(), interleaved=st.booleans())
def test_rotate(engine: Kernels, pairs: int, seed: int, edges: bool, interleaved: bool) -> None:
    x, table = numbers(seed, 2 * pairs, edges=edges), numbers(seed + 1, 2, 2 * pairs)
    assert same(engine.rotate(x, table, interleaved), reference.rotate(x, table, interleaved))


@NUMBERS
@given(size=st.sampled_from(SIZES), seed=SEEDS, spread=st.sampled_from((1.0, 20.0, 1e-30)), edges=st.booleans())
def test_activate(engine: Kernels, size: int, seed: int, spread: float, edges: bool) -> None:
    gate = (numbers(seed, size, edges=edges) * np.float32(spread)).astype(np.float32)
    up = numbers(seed + 1, size, edges=edges)
    assert same(engine.activate(gate, up), reference.activate(gate, up))


def test_exponential_is_right_to_an_ulp() -> None:
    x = np.linspace(-87, 88, 200001).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(reference.exponential(x) / exact - 1).max() < 2**-22.5
    special = reference.exponential(np.array([0.0, -0.0, -87.5, -np.inf, np.nan, -1e38], np.float32))
    assert same(special, [1, 1, 0, 0, np.nan, 0])


def test_activate_far_below_zero(engine: Kernels) -> None:
    gate = np.linspace(-1000, -85, 999).astype(np.float32)
    assert np.abs(engine.activate(gate, np.ones_like(gate))).max() < 1e-30


def test_large_negative_logits_of_a_router(engine: Kernels) -> None:
    routing = Routing(experts=4, chosen=2, normalised=False)
    index, weights = engine.choose(routing, np.array([-90.0, 2.0, -200.0, 1.0], np.float32), None)
    assert index == [1, 3]
    assert (weights < 1).all()


ROUTINGS = st.builds(
    lambda groups, size, kept, chosen, scoring, method, normalised: Routing(
        groups * size, min(chosen, min(kept, groups) * size), groups, min(kept, groups), scoring, method, normalised,
        2.5,
    ),
    st.sampled_from((1, 2, 4, 8)), st.sampled_from((1, 2, 3, 8, 32)), st.integers(1, 8), st.integers(1, 8),
    st.sampled_from((SOFTMAX, SIGMOID)), st.sampled_from((GREEDY, GROUP_MAX, GROUP_TWO)), st.booleans(),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(routing=ROUTINGS, seed=SEEDS, biased=st.booleans(), kind=st.sampled_from(("random", "ties", "large", "nan")))
def test_choose(engine: Kernels, routing: Routing, seed: int, biased: bool, kind: str) -> None:
    logits, random = numbers(seed, routing.experts), np.random.default_rng(seed)
    if kind == "ties":
        logits = random.choice(np.array([0.0, -0.0, 0.5], np.float32), routing.experts)
    elif kind == "large":
        logits = (logits * 60).astype(np.float32)
    elif kind == "nan":
        logits[random.random(routing.experts) < random.choice([0.1, 1.0])] = np.nan
    bias = numbers(seed + 1, routing.experts) if biased and kind != "ties" else None
    index, weights = engine.choose(routing, logits, bias)
    expected, wanted = reference.choose(routing, logits, bias)
    assert index == expected.tolist()
    assert same(weights, wanted)


@pytest.mark.parametrize("scoring", [SOFTMAX, SIGMOID])
@pytest.mark.parametrize("method", [GREEDY, GROUP_MAX, GROUP_TWO])
def test_nan_of_a_router_is_seen(engine: Kernels, scoring: int, method: int) -> None:
    """One that is NaN altogether, as after a NaN before: valid experts, and weights that are NaN."""
    routing = Routing(64, 6, 8, 3, scoring, method)
    for bias in (None, numbers(1, 64)):
        index, weights = engine.choose(routing, np.full(64, np.nan, np.float32), bias)
        assert sorted(set(index)) == index
        assert len(index) == 6
        assert 0 <= min(index) <= max(index) < 64
        assert np.isnan(weights).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_nan_stays_nan_and_in_its_row(engine: Kernels, kind: torch.dtype) -> None:
    stored, x = matrix(kind, 20, 70), numbers(1, 14, 70)
    clean = engine.product(stored, 0, 20, x)
    x[5, 69] = np.nan
    got = engine.product(stored, 0, 20, x)
    assert np.isnan(got[5]).all()
    assert same(np.delete(got, 5, 0), np.delete(clean, 5, 0))
    assert np.isnan(engine.activate(x[5], x[5])[69])
    assert np.isnan(engine.norm(x[5], x[4], 1e-6)).all()
    q, latents = numbers(2, 3, 2, 24), numbers(3, 70, 24)
    q[1, 0, 3] = np.nan
    out = engine.attend(q, [latents], [Seen(0, 68), Seen(0, 69), Seen(0, 70)], 16, 0.5)
    assert np.isnan(out[1, 0]).all()
    assert not np.isnan(np.delete(out.reshape(6, 16), 2, 0)).any()


@pytest.fixture
def flushed() -> Iterator[None]:
    """A caller for whom subnormal numbers are zero."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    yield
    torch.set_flush_denormal(False)


def test_the_callers_arithmetic_changes_nothing(engine: Kernels, request: pytest.FixtureRequest) -> None:
    stored, codes = matrix(torch.float32, 20, 70, edges=True), matrix(E4M3, 20, 70, edges=True)
    x, line = numbers(1, 5, 70, edges=True) * np.float32(1e-36), numbers(2, 130) * np.float32(1e-38)
    seen, table = [Seen(0, 5)] * 5, np.full((2, 130), 0.5, np.float32)

    def results() -> list[Array]:
        return [
            engine.product(stored, 0, 20, x), engine.product(codes, 0, 20, x), engine.columns(stored, 0, 5, x[:, :5]),
            engine.norm(line, line, 0.0), engine.activate(line, line), engine.activate(line, np.ones_like(line)),
            engine.rotate(line, table, True), engine.attend(x[:, None], [x], seen, 16, 0.3),
        ]  # fmt: skip

    expected = results()
    small = np.abs(np.concatenate([part.ravel() for part in expected]))
    assert ((small > 0) & (small < 1e-38)).sum() > 200
    request.getfixturevalue("flushed")
    half = torch.tensor(1e-39) * 0.5
    assert [part.tobytes() for part in results()] == [part.tobytes() for part in expected]
    assert float(half) == float(torch.tensor(1e-39) * 0.5) == 0.0  # the caller's own is left as it was
