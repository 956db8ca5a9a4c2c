"""Published mistakes of other implementations: enumeration finds each. And what was called a mistake but is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from enumerated import VOCAB, Toy, error_and_length, every_outcome, random_rows
from mtp_spec import OptionError, Speculation
from mtp_spec.acceptance import Block, Choices, Rejection, Traversal, Verdict
from mtp_spec.acceptance.base import Distribution, Proposal, best, positive_part
from mtp_spec.tree import ROOT, TokenTree

# a distribution is found to be wrong where it errs by more than this; lossless rules err by less than 1e-12
FOUND = 1e-4


class ArgmaxDraft(Rejection):
    """The draft is the best token, the test assumes it was drawn (rtp-llm PR 1311)."""

    def propose(self, q: Distribution, scores: Any, width: int, choices: Choices) -> list[Proposal]:
        return [Proposal(int(q.argmax()), q)]


class OtherTemperature(Rejection):
    """Drawn from one distribution, tested with another (transformers 47932)."""

    def propose(self, q: Distribution, scores: Any, width: int, choices: Choices) -> list[Proposal]:
        sharper = q**2 / (q**2).sum()
        return [Proposal(choices.pick(sharper), q)]


class TokenwiseBlock(Block):
    """The residuals of block verification behind token-wise tests (vllm-ascend 7807)."""

    def judge(self, tree: TokenTree, distributions: Sequence[Distribution], target: Any, choices: Choices) -> Verdict:
        weight = 1.0
        for node, token in enumerate(tree.tokens):
            p, q = target(node - 1), distributions[node]
            if not choices.happens(min(1.0, float(p[token] / q[token]))):
                rest, mass = positive_part(weight * p - q)
                return Verdict(list(range(node)), choices.pick(rest / mass if mass else p))
            weight = min(1.0, weight * float(p[token] / q[token]))
        return Verdict(list(range(len(tree))), choices.pick(target(len(tree) - 1)))


class Uncapped(Block):
    """The last test with the joint ratio, not capped on the way (2601.05724's released code)."""

    def judge(self, tree: TokenTree, distributions: Sequence[Distribution], target: Any, choices: Choices) -> Verdict:
        ratios = [target(n - 1)[t] / distributions[n][t] for n, t in enumerate(tree.tokens)]
        if choices.happens(min(1.0, float(np.prod(ratios)))):
            return Verdict(list(range(len(tree))), choices.pick(target(len(tree) - 1)))
        weights = [1.0]
        for ratio in ratios:
            weights.append(min(1.0, weights[-1] * ratio))
        for length in range(len(tree) - 1, -1, -1):
            rest, mass = positive_part(weights[length] * target(length - 1) - distributions[length])
            missing = mass + 1.0 - weights[length]
            if length == 0 or choices.happens(mass / missing if missing > 0 else 1.0):
                token = choices.pick(rest / mass if mass > 0 else target(length - 1))
                return Verdict(list(range(length)), token)
        raise AssertionError


class Forgetful(Rejection):
    """Siblings without replacement, tested as if each had been drawn from q (EAGLE's duplicates)."""

    def propose(self, q: Distribution, scores: Any, width: int, choices: Choices) -> list[Proposal]:
        return [Proposal(proposal.token, q) for proposal in super().propose(q, scores, width, choices)]


class NeverResets(Traversal):
    """A removed leaf leaves its parent's weight as it was."""

    def judge(self, tree: TokenTree, distributions: Sequence[Distribution], target: Any, choices: Choices) -> Verdict:
        for node in range(len(tree) - 1, -1, -1):
            path, weight = tree.path(node), 1.0
            for step in path:
                p, token = target(tree.parents[step]), tree.tokens[step]
                weight = min(1.0, weight * float(p[token] / distributions[step][token]))
            if choices.happens(weight):
                return Verdict(path, choices.pick(target(node)))
        return Verdict([], choices.pick(target(ROOT)))


class RoundedDraft(Rejection):
    """Drawn from bfloat16 probabilities, tested with float32 ones (DeepSpec issue 31)."""

    def propose(self, q: Distribution, scores: Any, width: int, choices: Choices) -> list[Proposal]:
        rounded = torch.from_numpy(q).bfloat16().double().numpy()
        return [Proposal(choices.pick(rounded / rounded.sum()), q)]


class InPlace(Rejection):
    """The residual overwrites p, which the test then reads (vllm-ascend PR 2881)."""

    def judge(self, tree: TokenTree, distributions: Sequence[Distribution], target: Any, choices: Choices) -> Verdict:
        for node, token in enumerate(tree.tokens):
            p = target(node - 1)
            p -= distributions[node]
            np.maximum(p, 0.0, out=p)
            if not choices.happens(min(1.0, float(p[token] / distributions[node][token]))):
                return Verdict(list(range(node)), choices.pick(p / p.sum()))
        return Verdict(list(range(len(tree))), choices.pick(target(len(tree) - 1)))


class OneStepLate(Rejection):
    """A rejected draft is dropped, but the token after it is kept in its place (openvino.genai issue 4190)."""

    def judge(self, tree: TokenTree, distributions: Sequence[Distribution], target: Any, choices: Choices) -> Verdict:
        for node, token in enumerate(tree.tokens):
            if not choices.happens(min(1.0, float(target(node - 1)[token] / distributions[node][token]))):
                return Verdict(list(range(node)), choices.pick(target(node)))
        return Verdict(list(range(len(tree))), choices.pick(target(len(tree) - 1)))


class OnlyTheDraft(Rejection):
    """The residual takes q away at the rejected token alone (EAGLE issue 20, xLLM PR 2175)."""

    def judge(self, tree: TokenTree, distributions: Sequence[Distribution], target: Any, choices: Choices) -> Verdict:
        for node, token in enumerate(tree.tokens):
            p, q = target(node - 1), distributions[node]
            if not choices.happens(min(1.0, float(p[token] / q[token]))):
                p[token] = max(0.0, p[token] - q[token])
                return Verdict(list(range(node)), choices.pick(p / p.sum()))
        return Verdict(list(range(len(tree))), choices.pick(target(len(tree) - 1)))


class ParentsBonus(Rejection):
    """After the last accepted draft the token is drawn from the row that accepted it (EAGLE PR 47)."""

    def judge(self, tree: TokenTree, distributions: Sequence[Distribution], target: Any, choices: Choices) -> Verdict:
        verdict = super().judge(tree, distributions, target, choices)
        if len(verdict.nodes) < len(tree):
            return verdict
        return Verdict(verdict.nodes, choices.pick(target(len(tree) - 2)))


class TestedTwice(Rejection):
    """A draft that stands in the list of candidates twice is tested and taken away twice (as EAGLE's must not be)."""

    def judge(self, tree: TokenTree, distributions: Sequence[Distribution], target: Any, choices: Choices) -> Verdict:
        left = target(ROOT)
        for child in (*tree.children(ROOT), *tree.children(ROOT)):
            token = tree.tokens[child]
            if choices.happens(min(1.0, float(left[token] / distributions[child][token]))):
                return Verdict([child], choices.pick(target(child)))
            rest, mass = positive_part(left - distributions[child])
            left = rest / mass if mass > 0.0 else left
        return Verdict([], choices.pick(left))


class FirstFailure(Block):
    """Block verification stopped at the first failure, as reviewers have asked for; the largest success is right."""

    def judge(self, tree: TokenTree, distributions: Sequence[Distribution], target: Any, choices: Choices) -> Verdict:
        weight = 1.0
        for node, token in enumerate(tree.tokens):
            p, before = target(node - 1), weight
            weight = min(1.0, weight * float(p[token] / distributions[node][token]))
            rest, mass = (
                (p, 1.0) if node + 1 == len(tree) else positive_part(weight * target(node) - distributions[node + 1])
            )
            missing = mass + 1.0 - weight
            passed = weight if node + 1 == len(tree) else mass / missing if missing > 0.0 else 1.0
            if not choices.happens(passed):
                rest, mass = positive_part(before * p - distributions[node])
                return Verdict(list(range(node)), choices.pick(rest / mass if mass > 0.0 else p))
        return Verdict(list(range(len(tree))), choices.pick(target(len(tree) - 1)))


MISTAKES: list[tuple[Any, tuple[int, ...]]] = [
    (ArgmaxDraft, (1,)), (OtherTemperature, (1,)), (RoundedDraft, (1,)), (InPlace, (1,)), (OneStepLate, (1,)),
    (OnlyTheDraft, (1,)), (ParentsBonus, (1,)), (TokenwiseBlock, (1, 1)), (Uncapped, (1, 1)), (FirstFailure, (1, 1)),
    (NeverResets, (1, 1)), (Forgetful, (2,)), (TestedTwice, (1,)),
]  # fmt: skip


@pytest.mark.parametrize(("mistake", "branching"), MISTAKES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_published_mistakes_are_found(mistake: Any, branching: tuple[int, ...]) -> None:
    errors = [error_and_length(mistake(), branching, toy(seed))[0] for seed in range(5)]
    assert max(errors) > FOUND


def toy(seed: int) -> Toy:
    return Toy(random_rows(seed), random_rows(seed + 50))


# slower, not wrong


class Independent(Rejection):
    """A draft is accepted where it equals a draw of the target's own (mlx-lm PR 1085 calls it 5 % acceptance)."""

    def judge(self, tree: TokenTree, distributions: Sequence[Distribution], target: Any, choices: Choices) -> Verdict:
        node, nodes = ROOT, list[int]()
        while True:
            token = choices.pick(target(node))
            child = tree.child(node, token)
            if child is None:
                return Verdict(nodes, token)
            nodes.append(child)
            node = child


class BestDrafts(Rejection):
    """Certain drafts, tested as such (dflash PR 77 calls them biased)."""

    def propose(self, q: Distribution, scores: Any, width: int, choices: Choices) -> list[Proposal]:
        return best(scores, width)


def test_slower_is_not_wrong() -> None:
    for seed in range(3):
        one = toy(seed)
        p, q = one.target(()), one.draft(())
        error, mean = error_and_length(Independent(), (1,), one)
        assert error < 1e-12
        assert mean == pytest.approx(1 + float(p @ q))
        error, mean = error_and_length(BestDrafts(), (1,), one)
        assert error < 1e-12
        assert mean == pytest.approx(1 + p[q.argmax()])
        assert error_and_length(Independent(), (2, 2), one)[0] < 1e-12
        assert error_and_length(BestDrafts(), (2, 2), one)[0] < 1e-12


def test_pruning_by_what_was_drawn_is_refused_because_it_is_wrong() -> None:
    """EAGLE-2's rerank on sampled drafts: the better of two chains is kept (DSpark, appendix A)."""
    one = toy(3)

    def accepts(choices: Choices) -> bool:
        drafts = Rejection().propose(one.draft(()), np.zeros(VOCAB, dtype=np.float32), 2, choices)
        kept = max(drafts, key=lambda proposal: one.draft(())[proposal.token])
        tree = TokenTree()
        tree.add(ROOT, kept.token, 0)
        target = lambda node: one.target(tuple(tree.path_tokens(node)))  # noqa: E731
        return bool(Rejection().judge(tree, [kept.distribution], target, choices).nodes)

    accepted = sum(weight for weight, yes in every_outcome(accepts) if yes)
    # no exact rule accepts one draft more or less often than this
    assert abs(accepted - float(np.minimum(one.target(()), one.draft(())).sum())) > 1e-3
    for name in ("rejection", "hybrid", "traversal", "block"):
        for given in ({"budget": 3}, {"adaptive": True}):
            with pytest.raises(OptionError, match="with acceptance"):
                Speculation(depth=2, acceptance=name, **given)
    with pytest.raises(OptionError, match="judges chains"):
        Speculation(branching=(2, 1), acceptance="block")
    assert Speculation(depth=2, budget=2, acceptance="typical").budget == 2
