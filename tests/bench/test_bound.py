"""The most that a node's drafts can be accepted: against every set of tokens, and against the rules."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from enumerated import Toy, error_and_length
from mtp_spec.acceptance import RULES
from mtp_spec.bench.bound import best_hybrid, best_pair, best_single


def distributions(seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    p = generator.dirichlet([(0.2, 0.5, 1.0)[seed % 3]] * 6)
    if seed % 2:
        return p, generator.dirichlet([0.5] * 6)
    q = p * np.exp(generator.normal(0, 0.5, 6))
    return p, q / q.sum()


@pytest.mark.parametrize("seed", range(12))
def test_no_set_of_tokens_bounds_a_pair_of_drafts_lower(seed: int) -> None:
    p, q = distributions(seed)
    pair = np.outer(q, q) / (1 - q[:, None])
    np.fill_diagonal(pair, 0.0)
    sets = [list(chosen) for size in range(7) for chosen in combinations(range(6), size)]
    lowest = 1 + min(p[chosen].sum() - pair[np.ix_(chosen, chosen)].sum() for chosen in sets)
    assert best_pair(p, q) == pytest.approx(lowest, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_rules_keep_to_the_bound(seed: int) -> None:
    p, q = distributions(seed)
    toy = Toy(lambda _: torch.from_numpy(p).log().float(), lambda _: torch.from_numpy(q).log().float(), vocab=6)
    for name, bound in (("rejection", best_pair), ("traversal", best_pair), ("hybrid", best_hybrid)):
        accepted = error_and_length(RULES[name], (2,), toy)[1] - 1
        assert accepted <= bound(p, q) + 1e-6
        assert name != "hybrid" or accepted == pytest.approx(bound(p, q), abs=1e-6)


def test_bounds_at_the_edge() -> None:
    certain, half = np.array([1.0, 0.0, 0.0]), np.array([0.5, 0.5, 0.0])
    assert best_pair(half, certain) == 0.5  # one draft only
    assert best_pair(certain, half) == 1.0
    assert best_single(half, certain) == 0.5
    assert best_hybrid(half, certain) == 0.5
    nearly = np.array([1.0 - 2e-15, 1e-15, 1e-15])
    assert best_pair(nearly, nearly) == pytest.approx(1.0)
    # the second draft has the distribution p: what is left beside the first must not be lost in rounding
    assert best_pair(np.array([0.0, 0.5, 0.5]), nearly) == pytest.approx(1.0)
    assert best_pair(np.array([0.0, 1.0, 0.0]), nearly) == pytest.approx(0.5)
