"""Acceptance rules: their distributions by exact enumeration, and by sampling on the bundled model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

import mtp_spec
from enumerated import VOCAB, Context, Rows, Toy, error_and_length, random_rows
from mtp_spec import Speculation
from mtp_spec.acceptance import RULES, Relaxed
from mtp_spec.acceptance.accept import accept_coupled
from mtp_spec.acceptance.base import SeededChoices
from mtp_spec.tree import ROOT, TokenTree

LOSSLESS = [name for name, rule in RULES.items() if rule.lossless]
CHAINS = [(1,), (1, 1), (1, 1, 1)]
TREES = [(2,), (3,), (2, 1), (2, 2), (1, 3)]
CERTAIN, FULL = random_rows(8, "certain"), random_rows(7)
KINDS = [("full", "full"), ("truncated", "full"), ("full", "truncated"), ("certain", "full"), ("full", "certain")]


def steer(ids: list[int], logits: Tensor) -> Tensor:
    """A processor that depends on all of the past: how much of it, what it sums up to, what came last."""
    logits[ids[-1]] -= 1.5
    if len(ids) % 2 and int(logits.isfinite().sum()) > 1:
        logits[sum(ids) % len(logits)] = -torch.inf
    return logits


PENALTIES = {"repetition_penalty": 1.7, "presence_penalty": 0.5, "frequency_penalty": 0.4, "logit_bias": {0: 0.7}}
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, **PENALTIES, "logits_processor": steer},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.3},
    "penalties": PENALTIES,
    "processor": {"logits_processor": steer},
    "all": {"temperature": 1.3, "top_k": 2, "top_p": 0.95, "min_p": 0.05, **PENALTIES, "logits_processor": steer},
}


def shapes_of(name: str, *shapes: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [shape for shape in shapes if max(shape) == 1 or not RULES[name].chains_only]


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("seed", range(len(KINDS)), ids=lambda seed: " from ".join(KINDS[seed]))
def test_the_output_has_the_targets_law(name: str, seed: int) -> None:
    p, q = KINDS[seed]
    toy = Toy(random_rows(seed, p), random_rows(seed + 50, q))
    for shape in shapes_of(name, *CHAINS, *TREES):
        assert error_and_length(RULES[name], shape, toy)[0] < 1e-12, shape


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("way", SAMPLING)
def test_every_way_of_sampling_follows_each_path(name: str, way: str) -> None:
    toy = Toy(random_rows(11), random_rows(61), **SAMPLING[way])
    for shape in shapes_of(name, (1, 1, 1), (2, 1), (2, 2)):
        assert error_and_length(RULES[name], shape, toy)[0] < 1e-12, shape


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from([name for name in LOSSLESS if not RULES[name].chains_only]),
    widths=st.dictionaries(st.lists(st.integers(0, VOCAB - 1), max_size=2).map(tuple), st.integers(1, 3), max_size=5),
    seed=st.integers(0, 2**32 - 1),
    kinds=st.sampled_from(KINDS),
    way=st.sampled_from(list(SAMPLING)),
)
def test_any_tree_has_the_targets_law(
    name: str, widths: dict[Context, int], seed: int, kinds: tuple[str, str], way: str
) -> None:
    """Shapes differ from node to node, and from one token of a node to another."""
    toy = Toy(random_rows(seed, kinds[0]), random_rows(seed + 1, kinds[1]), **SAMPLING[way])
    shape = lambda path: widths.get(path, 1 if not path else 0)  # noqa: E731
    assert error_and_length(RULES[name], shape, toy, depth=3)[0] < 1e-12


GIVEN: dict[str, Callable[[Context], list[int]]] = {  # what another drafter proposes after a path
    "one at the root": lambda path: [2] if not path else [],
    "a chain": lambda path: [1] if path in ((), (1,), (1, 1)) else [],
    "after what was drawn": lambda path: [path[-1]] if path else [],
    "two branches": lambda path: [0, 2],
    "all there is": lambda path: [2, 0, 1],
}


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("proposed", GIVEN)
def test_drafts_of_another_drafter_keep_the_law(name: str, proposed: str) -> None:
    """They come from point distributions, alone, as siblings of the modules' drafts, above and below them."""
    for kinds in (("full", "full"), ("certain", "full"), ("truncated", "certain")):
        toy = Toy(random_rows(21, kinds[0]), random_rows(71, kinds[1]), given=GIVEN[proposed])
        for shape in shapes_of(name, (1, 1, 1), (2,), (3,), (2, 2)):
            assert error_and_length(RULES[name], shape, toy)[0] < 1e-12, shape
    toy = Toy(random_rows(11), random_rows(61), given=GIVEN[proposed], **SAMPLING["all"])
    assert error_and_length(RULES[name], (1, 1), toy)[0] < 1e-12


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_proposal_is_accepted_as_often_as_the_target_draws_it(name: str) -> None:
    toy = Toy(random_rows(1), random_rows(2), given=lambda path: [1])
    assert error_and_length(RULES[name], (1,), toy)[1] == pytest.approx(1 + toy.target(())[1])


@settings(max_examples=20, deadline=None)
@given(stops=st.sets(st.lists(st.integers(0, VOCAB - 1), max_size=2).map(tuple), max_size=4), seed=st.integers(0, 999))
def test_chains_that_end_where_the_drafter_likes(stops: set[Context], seed: int) -> None:
    toy = Toy(random_rows(seed), random_rows(seed + 1))
    for name in LOSSLESS:
        shape = lambda path: int(len(path) < 3 and (not path or path not in stops))  # noqa: E731
        assert error_and_length(RULES[name], shape, toy, depth=3)[0] < 1e-12, name


@settings(max_examples=60, deadline=None)
@given(data=st.data(), way=st.sampled_from(list(SAMPLING)), seed=st.integers(0, 2**32 - 1))
def test_coupled_walks_any_tree_as_plain_decoding_draws(data: st.DataObject, way: str, seed: int) -> None:
    vocab, tree = 4, TokenTree()
    rows, sampler = random_rows(seed, vocab=vocab), Toy(FULL, FULL, vocab, seed=seed, **SAMPLING[way]).sampler
    for _ in range(data.draw(st.integers(0, 12))):
        parent, token = data.draw(st.integers(ROOT, len(tree) - 1)), data.draw(st.integers(0, vocab - 1))
        if tree.child(parent, token) is None:
            tree.add(parent, token, 0)
    logits = torch.stack([rows(tuple(tree.path_tokens(node))) for node in range(ROOT, len(tree))])
    history = sampler.history([2, 1])
    out = accept_coupled(tree, logits, sampler, history, 2, lambda _: False)
    plain: Context = ()
    for _ in out.drawn:
        plain += (sampler.draw(sampler.process(rows(plain), sampler.history([2, 1]).extend(plain)), 2 + len(plain)),)
    assert tuple(drawn.token for drawn in out.drawn) == plain
    assert tuple(tree.path_tokens(out.nodes[-1]) if out.nodes else ()) == plain[:-1]
    assert tree.child(out.nodes[-1] if out.nodes else ROOT, plain[-1]) is None


def rolled(rows: Rows) -> Rows:
    return lambda context: rows(context).roll(1)


def without_the_best(rows: Rows) -> Rows:
    def cut(context: Context) -> Tensor:
        row = rows(context).clone()
        row[row.argmax()] = -torch.inf
        return row

    return cut


DRAFTERS: dict[str, tuple[Rows, Rows, float | None]] = {  # target, drafter, tokens a step where they are known
    "always right": (FULL, FULL, 3.0),
    "always wrong": (CERTAIN, rolled(CERTAIN), 1.0),
    "no chance for the best": (FULL, without_the_best(FULL), None),
    "almost always the same": (FULL, lambda context: 40.0 * torch.eye(VOCAB)[0], None),
    "always the same": (FULL, lambda context: torch.eye(VOCAB)[0].log(), None),
    "anything": (FULL, lambda context: torch.zeros(VOCAB), None),
    "the same at a depth, whatever the path": (FULL, lambda context: random_rows(9)((0,) * len(context)), None),
}


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_no_drafter_can_change_the_law(name: str, drafter: str) -> None:
    p, q, tokens = DRAFTERS[drafter]
    toy = Toy(p, q)
    error, mean = error_and_length(RULES[name], (1, 1), toy)
    assert error < 1e-12
    assert tokens is None or mean == pytest.approx(tokens)
    for shape in shapes_of(name, (3,), (2, 2)):
        assert error_and_length(RULES[name], shape, toy)[0] < 1e-12


def means(shape: tuple[int, ...], *names: str) -> list[float]:
    toys = [Toy(random_rows(seed), random_rows(seed + 90)) for seed in range(4)]
    return [sum(error_and_length(RULES[name], shape, toy)[1] for toy in toys) for name in names]


def test_better_rules_accept_more() -> None:
    rejection, block, traversal = means((1, 1, 1), "rejection", "block", "traversal")
    assert block > rejection
    assert traversal == pytest.approx(block)  # on a chain they are one rule
    rejection, traversal, hybrid = means((2, 2), "rejection", "traversal", "hybrid")
    assert traversal > rejection
    assert hybrid > rejection


def test_one_child_is_accepted_as_often_as_possible() -> None:
    toy = Toy(random_rows(1), random_rows(2))
    overlap = float(np.minimum(toy.target(()), toy.draft(())).sum())
    for name in LOSSLESS:
        assert error_and_length(RULES[name], (1,), toy)[1] == pytest.approx(1 + overlap)


def test_lossy_rules_accept_what_they_say() -> None:
    p = np.array([0.5, 0.3, 0.15, 0.05])
    tree = TokenTree()
    for token in (2, 1, 3):
        tree.add(ROOT, token, 0)
    for name, expected in (("typical", 1), ("relaxed", 1)):
        verdict = RULES[name].judge(tree, [p] * 3, lambda _: p, SeededChoices(0))
        assert tree.tokens[verdict.nodes[0]] == expected
    narrow = Relaxed(among=1)
    assert narrow.judge(tree, [p] * 3, lambda _: p, SeededChoices(0)).nodes == []


def test_seeded_choices_repeat_and_follow_the_law() -> None:
    distribution = np.array([0.2, 0.0, 0.5, 0.3])
    first, second = SeededChoices(5), SeededChoices(5)
    drawn = [first.pick(distribution) for _ in range(4000)]
    assert drawn[:50] == [second.pick(distribution) for _ in range(50)]
    counts = np.bincount(drawn, minlength=4)
    assert counts[1] == 0
    assert chisquare(counts[[0, 2, 3]], 4000 * distribution[[0, 2, 3]]).pvalue > 1e-4


@pytest.fixture(scope="module")
def lm() -> mtp_spec.LM:
    return mtp_spec.load()


@pytest.mark.parametrize("name", ["coupled", "hybrid"])
def test_texts_have_the_targets_law_on_the_bundled_model(lm: mtp_spec.LM, name: str) -> None:
    """Every pair of first tokens: its share of many seeds against its exact probability."""
    prompt, options = lm.encode("One day a"), {"temperature": 1.5, "top_k": 3}
    counts: dict[tuple[int, ...], int] = {}
    shape = Speculation(branching=(2,), acceptance=name)
    number = 120
    for seed in range(number):
        # the last token is never drafted for, so a third is asked for
        out = lm.generate(prompt, max_new_tokens=3, seed=seed, speculation=shape, **options)
        assert out.stats.drafted > 0 or len(out.token_ids) < 2
        pair = tuple(out.token_ids[:2])
        counts[pair] = counts.get(pair, 0) + 1
    exact: dict[tuple[int, ...], float] = {}
    for first, chance in _distribution(lm, prompt).items():
        for second, then in _distribution(lm, [*prompt, first]).items():
            exact[first, second] = chance * then
    assert set(counts) <= set(exact)
    common = [pair for pair, chance in exact.items() if chance * number >= 5]
    observed = [counts.get(pair, 0) for pair in common]
    expected = [exact[pair] * number for pair in common]
    observed.append(number - sum(observed))
    expected.append(number - sum(expected))
    if expected[-1] < 1e-6:
        observed, expected = observed[:-1], expected[:-1]
    assert chisquare(observed, expected).pvalue > 1e-4


def _distribution(lm: Any, ids: list[int]) -> dict[int, float]:
    row = lm.score(ids).logits[-1].double() / 1.5
    top = row.topk(3)
    chances = top.values.softmax(-1)
    return dict(zip(top.indices.tolist(), chances.tolist(), strict=True))


def test_rules_run_with_every_option(lm: mtp_spec.LM) -> None:
    for name, rule in RULES.items():
        branching = (1, 1, 1) if rule.chains_only else (2, 2)
        shape = Speculation(branching=branching, acceptance=name)
        options: dict[str, Any] = {"max_new_tokens": 20, "speculation": shape, "repetition_penalty": 1.1, "logprobs": 1,
                                   "top_p": 0.9, "logit_bias": {5: 1.0}}  # fmt: skip
        first, again = (lm.generate("One day a fox", seed=4, **options) for _ in range(2))
        assert first.token_ids == again.token_ids
        assert first.logprobs is not None
        assert len(first.logprobs) == len(first.token_ids)
        greedy = lm.generate("One day a fox", temperature=0, max_new_tokens=20, speculation=shape)
        plain = lm.generate("One day a fox", temperature=0, max_new_tokens=20, speculation=None)
        if rule.lossless:
            assert greedy.token_ids == plain.token_ids
        assert greedy.stats.tokens_per_step > 1.2
