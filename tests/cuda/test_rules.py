"""Rules inside a captured step: same drafts, same accepted path, same following token as `mtp_spec.acceptance`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

import mtp_spec
from device_models import SAMPLING, device_lm
from mtp_spec.acceptance import RULES
from mtp_spec.acceptance.base import Distribution, SeededChoices
from mtp_spec.api import LM
from mtp_spec.cuda.rules import DeviceRule
from mtp_spec.kernels import commit
from mtp_spec.kernels.sampler import uniforms
from mtp_spec.sampling.params import SamplingParams
from mtp_spec.sampling.sampler import Sampler
from mtp_spec.speculation import Speculation
from mtp_spec.tree import ROOT, TokenTree
from mtp_spec.tree_shape import TreeShape

VOCAB = 12
SHAPES = ((1,), (1, 1, 1), (2,), (3, 2, 1), (1, 3), (2, 2, 2), (5, 1, 2))


def step_by_rule(
    name: str, branching: tuple[int, ...], drafts: torch.Tensor, targets: torch.Tensor, greedy: bool, seed: int,
    choices: SeededChoices, budget: int | None = None,
) -> tuple[TokenTree, list[int], int]:  # fmt: skip
    """Returns tree, accepted nodes and the token after them, as the engine on a CPU finds them.

    Rows of logits are by shape: `drafts[d]` and `targets[d]` belong to a node of depth d, shifted by its last token, so
    that both sides see the same rows whatever a tree looks like.
    """
    sampler, rule = Sampler(SamplingParams(temperature=0.0 if greedy else 1.0, seed=seed), VOCAB), RULES[name]
    shape = TreeShape.of(Speculation(branching=branching, acceptance=name, budget=budget))
    tree, distributions, level = TokenTree(), list[Distribution](), {ROOT: ROOT}
    for depth in range(1, shape.depth + 1):
        below = {}
        for place in shape.with_children(depth - 1):
            if place not in level:
                continue
            row = draft_row(drafts, tree, level[place])
            if sampler.leaves_nothing(row):
                continue
            wanted = [node for node in shape.level(depth) if shape.parents[node] == place]
            proposals = rule.propose(sampler.distribution(row, 0), row.numpy(), len(wanted), choices)
            for node, proposal in zip(wanted, proposals, strict=False):
                below[node] = tree.add(level[place], proposal.token, shape.ranks[node])
                distributions.append(proposal.distribution)
        level = below
    verdict = rule.judge(
        tree, distributions, lambda node: sampler.distribution(draft_row(targets, tree, node), 0), choices
    )
    return tree, verdict.nodes, verdict.token


def draft_row(rows: torch.Tensor, tree: TokenTree, node: int) -> torch.Tensor:
    depth, token = (0, 0) if node == ROOT else (tree.depths[node], tree.tokens[node])
    return rows[depth].roll(token)


def step_on_device(
    rule: DeviceRule, drafts: torch.Tensor, targets: torch.Tensor, seed: int, beyond: torch.Tensor | None = None
) -> tuple[list[int], list[int], list[int]]:
    """Returns the tree's tokens, the committed tokens and their rows.

    Args:
        beyond: rows by depth of nodes that the target cannot draw, and of all below them, in place of `targets`.
    """
    shape, place = rule.shape, rule.drawn.device
    tokens = torch.zeros(len(shape.parents), dtype=torch.int64)
    rule.begin(torch.tensor([seed], device=place))
    for depth in range(1, shape.depth + 1):
        rows = [drafts[depth - 1].roll(0 if n == ROOT else int(tokens[n])) for n in shape.with_children(depth - 1)]
        failed = torch.tensor([int(row.max() == -torch.inf) for row in rows], dtype=torch.int32)
        found = rule.propose(depth, torch.stack(rows).to(place), failed.to(place))
        tokens[shape.level(depth)] = found.cpu()
    rows, reached = [targets[0]], {ROOT: True}
    for node, (depth, token) in enumerate(zip(shape.depths, tokens.tolist(), strict=True)):
        above = shape.parents[node]
        reached[node] = reached[above] and bool(rows[above + 1][token] > -torch.inf)
        rows.append((targets if reached[node] or beyond is None else beyond)[depth].roll(token))
    drawn, marked = rule.judge(torch.stack(rows).to(place))
    path, committed = torch.zeros(1, 9, dtype=torch.int64), torch.zeros(1, 9, dtype=torch.int64)
    record = torch.zeros(1, commit.record_size(9), dtype=torch.int32)
    parents = torch.tensor([-1, *(parent + 1 for parent in shape.parents)], dtype=torch.int32)
    failed = torch.zeros(len(rows), dtype=torch.int32)
    commit.accept(drawn.cpu(), failed, marked.cpu(), parents, path, committed, record)
    count = int(record[0, commit.COUNT])
    return tokens.tolist(), committed[0, :count].tolist(), path[0, :count].tolist()


def logits(generator: torch.Generator, depth: int, kind: str) -> torch.Tensor:
    rows = torch.randn(depth + 1, VOCAB, generator=generator) * 2
    if kind == "truncated":  # distributions with fewer tokens than a tree has children
        keep = torch.rand(depth + 1, VOCAB, generator=generator).argsort(-1) < 2
        rows = rows.masked_fill(~keep, -torch.inf)
    if kind == "empty":  # no draft follows a draft
        rows[1:] = -torch.inf
    return rows


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", ["full", "truncated", "empty", "greedy", "itself"])
def test_same_path_as_the_rule(name: str, kind: str) -> None:
    compare(name, kind, "cpu")


def trees_of(name: str) -> Iterator[tuple[tuple[int, ...], TreeShape, torch.Generator]]:
    """Yields the trees that a rule takes, each with random numbers of its own."""
    for number, branching in enumerate(SHAPES):
        if not RULES[name].chains_only or max(branching) == 1:
            shape = TreeShape.of(Speculation(branching=branching, acceptance=name))
            yield branching, shape, torch.Generator().manual_seed(number)


def compare(name: str, kind: str, place: str) -> None:
    """Takes random steps by a rule and by its captured form, on random rows."""
    accepted = 0
    for branching, shape, generator in trees_of(name):
        for seed in range(12):
            choices, drawn = SeededChoices(seed), torch.zeros(1, dtype=torch.int64, device=place)
            rule = DeviceRule(name, shape, kind == "greedy", drawn)
            for _ in range(3):  # one step after another draws from the same numbers
                drafts = logits(generator, len(branching), kind)
                targets = logits(generator, len(branching), "full")
                if kind != "empty":
                    targets = drafts if kind == "itself" else drafts + targets
                tree, nodes, token = step_by_rule(name, branching, drafts, targets, kind == "greedy", seed, choices)
                tokens, committed, path = step_on_device(rule, drafts, targets, seed)
                assert committed == [*(tree.tokens[node] for node in nodes), token]
                assert [tokens[row - 1] for row in path[1:]] == committed[:-1]
                accepted += len(nodes)
            # both have used as many random numbers
            assert choices._generator.random() == float(uniforms(torch.tensor([seed], device=place), drawn, 1))
    assert accepted > 0


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("beyond", ["full", "nothing"])
def test_guided_targets(name: str, beyond: str) -> None:
    """Most drafts have no probability under a guided target, and what stands in rows beyond these is of no matter."""
    accepted = 0
    for branching, shape, generator in trees_of(name):
        for seed in range(12):
            choices = SeededChoices(seed)
            rule = DeviceRule(name, shape, False, torch.zeros(1, dtype=torch.int64))
            for _ in range(3):
                drafts = logits(generator, len(branching), "full")
                keep = torch.rand(drafts.shape, generator=generator).argsort(-1) < 4
                targets = (drafts + logits(generator, len(branching), "full")).masked_fill(~keep, -torch.inf)
                others = logits(generator, len(branching), "full")
                others = others if beyond == "full" else torch.full_like(others, -torch.inf)
                tree, nodes, token = step_by_rule(name, branching, drafts, targets, False, seed, choices)
                _, committed, _ = step_on_device(rule, drafts, targets, seed, others)
                assert committed == [*(tree.tokens[node] for node in nodes), token]
                accepted += len(nodes)
    assert accepted > 0


@pytest.mark.parametrize("name", ["typical", "relaxed"])
def test_pruned_trees(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    speculation = Speculation(branching=(4, 3, 2), budget=9, acceptance=name)
    for seed in range(30):
        drafts, targets = logits(generator, 3, "full"), logits(generator, 3, "full")
        choices, drawn = SeededChoices(seed), torch.zeros(1, dtype=torch.int64)
        rule = DeviceRule(name, TreeShape.of(speculation), False, drawn)
        tree, nodes, token = step_by_rule(name, (4, 3, 2), drafts, targets, False, seed, choices, budget=9)
        assert step_on_device(rule, drafts, targets, seed)[1] == [*(tree.tokens[node] for node in nodes), token]


@pytest.mark.parametrize(("name", "branching"), [("rejection", (2, 1)), ("hybrid", (2, 1)), ("traversal", (2, 1))])
@pytest.mark.parametrize("guided", [False, True])
def test_first_tokens_have_the_targets_law(name: str, branching: tuple[int, ...], guided: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    drafts, targets = logits(generator, 2, "full")[:, :4], logits(generator, 2, "full")[:, :4]
    if guided:  # a token that the drafts like may not follow
        targets[0, int(drafts[0].argmax())] = -torch.inf
    shape = TreeShape.of(Speculation(branching=branching, acceptance=name))
    rule = DeviceRule(name, shape, False, torch.zeros(1).long())
    number = 3000
    counts = np.zeros(4)
    for _ in range(number):
        counts[step_on_device(rule, drafts, targets, 5)[1][0]] += 1
    expected = targets[0].double().softmax(-1).numpy() * number
    assert counts[expected == 0].sum() == 0
    assert chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-4


@pytest.fixture(scope="module")
def lm() -> LM:
    return device_lm()


def texts(lm: LM, name: str, count: int) -> None:
    shape = Speculation(branching=(1, 1) if RULES[name].chains_only else (2, 2), acceptance=name)
    options: dict[str, Any] = {"max_new_tokens": count, "seed": 3, "logprobs": 1, "speculation": shape}
    first, again = (lm.generate("One day a fox", **options, **SAMPLING[2]) for _ in range(2))
    assert first.token_ids == again.token_ids
    greedy = lm.generate("One day a fox", **options, temperature=0)
    assert greedy.stats.tokens_per_step > 1
    if RULES[name].lossless:
        options["speculation"] = None
        assert greedy.token_ids == lm.generate("One day a fox", **options, temperature=0).token_ids


@pytest.mark.parametrize("name", RULES)
def test_texts_by_rule(lm: LM, name: str) -> None:
    texts(lm, name, 12)


@pytest.mark.gpu
@pytest.mark.parametrize("name", RULES)
def test_rules_on_the_gpu(name: str) -> None:
    for kind in ("full", "truncated", "greedy"):
        compare(name, kind, "cuda")
    texts(mtp_spec.load(device="cuda"), name, 48)
