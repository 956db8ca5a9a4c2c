"""The token tree, the count of what was accepted, and the distribution of coupled acceptance by enumeration."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from mtp_spec import SamplingParams
from mtp_spec.acceptance.accept import accept_coupled
from mtp_spec.sampling.sampler import Sampler
from mtp_spec.stats import GenerationStats
from mtp_spec.tree import ROOT, TokenTree

VOCAB = 4


def grow(parents: list[int]) -> TokenTree:
    """Node n hangs below node parents[n] % n (or the root); its token is its number, so siblings differ."""
    tree = TokenTree()
    for node, parent in enumerate(parents):
        tree.add(parent % (node + 1) - 1, node, 0)
    return tree


@given(st.lists(st.integers(0, 100), max_size=20))
def test_paths_agree_with_parents_and_depths(parents: list[int]) -> None:
    tree = grow(parents)
    for node in range(len(tree)):
        path = tree.path(node)
        assert path[-1] == node
        assert tree.parents[path[0]] == ROOT
        assert all(tree.parents[child] == parent for parent, child in pairwise(path))
        assert len(path) == tree.depths[node]
        assert tree.child(tree.parents[node], node) == node
    assert tree.is_chain() == all(len(tree.children(node)) <= 1 for node in range(ROOT, len(tree)))
    line = tree.path(len(tree) - 1) if parents else []
    part = tree.part(line)
    assert (part.is_chain(), part.tokens, part.path_tokens(len(part) - 1) if line else []) == (True, line, line)


def test_a_tree_refuses_equal_siblings_and_missing_parents() -> None:
    tree = grow([0])
    with pytest.raises(ValueError, match="already"):
        tree.add(ROOT, 0, 1)
    with pytest.raises(ValueError, match="does not exist"):
        tree.add(7, 0, 0)


def test_rates_by_depth_and_merging() -> None:
    stats = GenerationStats()
    stats.record_step(3, 3, [0, 0, 0], 4)
    stats.record_step(3, 5, [1], 2)
    stats.record_step(1, 1, [], 1)
    assert stats.tokens_per_step == pytest.approx(7 / 3)
    assert stats.accepted_per_depth["conditional"] == pytest.approx([2 / 3, 1 / 2, 1.0])
    assert stats.accepted_per_depth["unconditional"] == pytest.approx([2 / 3, 1 / 2, 1 / 2])
    assert stats.histogram == {3: 1, 1: 1, 0: 1}
    stats.record_step(4, 5, [0, 1, 0], 4, ["mtp", "text", "text"], ["text"] * 4)
    assert stats.accepted_by_source == {"mtp 1": 3, "mtp 2": 1, "mtp 3": 1, "text": 2}
    assert stats.drafted_by_source == {"mtp": 10, "text": 4}
    again = GenerationStats.from_record(json.loads(json.dumps(stats.to_record())))
    assert again.to_json() == stats.to_json()
    assert stats.merge(again).accepted_by_source["text"] == 4


def test_merging_and_steps_that_cannot_be() -> None:
    stats = GenerationStats()
    stats.record_step(3, 3, [0, 0, 0], 4)
    stats.record_step(3, 5, [1], 2)
    stats.record_step(1, 1, [], 1)
    twice = stats.merge(stats)
    assert (twice.steps, twice.drafted, twice.tokens_per_step) == (6, 18, stats.tokens_per_step)
    assert stats.steps == 3
    for bad in ((1, 1, [0, 0], 1), (2, 2, [0], 3), (2, 2, [0], 0)):
        with pytest.raises(ValueError):  # noqa: PT011 - each message differs
            stats.record_step(*bad)


def distribution(depth_rows: torch.Tensor, tree: TokenTree, seeds: int) -> np.ndarray:
    """Counts of the first two tokens committed; row 0 predicts the first, every node's row the second."""
    counts = np.zeros((VOCAB, VOCAB))
    for seed in range(seeds):
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), VOCAB)
        logits = torch.stack([depth_rows[0], *(depth_rows[1 + token] for token in tree.tokens)])
        done = accept_coupled(tree, logits, sampler, sampler.history([0]), 5, lambda _: False)
        first = done.drawn[0].token
        if len(done.drawn) > 1:
            second = done.drawn[1].token
        else:  # the next step's row, as decoding on would compute it
            second = sampler.draw(sampler.process(depth_rows[1 + first], done.history), 6)
        counts[first, second] += 1
    return counts


@pytest.mark.parametrize("drafts", [[], [0], [3, 1], [2, 0, 1, 3]], ids=str)
def test_coupled_acceptance_keeps_the_law_and_the_draws(drafts: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(1 + VOCAB, VOCAB, generator=generator)
    tree = TokenTree()
    for rank, token in enumerate(drafts):
        tree.add(ROOT, token, rank)
    counts = distribution(rows, tree, 3000)
    p = rows.softmax(-1).double().numpy()
    expected = p[0][:, None] * p[1:] * counts.sum()
    assert chisquare(counts.ravel(), expected.ravel() * counts.sum() / expected.sum()).pvalue > 1e-4
    # stronger than the distribution: every single draw is that of the empty tree
    assert (counts == distribution(rows, TokenTree(), 3000)).all()
