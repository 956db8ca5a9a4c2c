"""The planner of adaptive trees: what it learns, what it chooses, what it costs where drafting does not pay."""

from __future__ import annotations

import random
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

import mtp_spec
import tiny
from lms import host
from mtp_spec.drafting import Continuation
from mtp_spec.planning.confidence import Confidence, Judged
from mtp_spec.planning.costs import Curve, StepTimes
from mtp_spec.planning.fixed_plan import Standing, TreeBatch
from mtp_spec.planning.given import graft
from mtp_spec.planning.governor import ALLOWED, MOST_DEBT, Pace
from mtp_spec.planning.node_plan import NodePlan, Speed
from mtp_spec.planning.node_planner import NodePlanner
from mtp_spec.tree import ROOT, TokenTree
from simulated import CHEAP_ROWS, CONTEXT, DEAR_ROWS, LIMITS, MACHINES, PROCESSES, Process, fixed, flat, run


def test_curves_pass_through_their_points_and_never_fall() -> None:
    curve = Curve.rising((32, 512), {1: (1.0, 2.0), 4: (0.9, 3.0), 8: (2.0, 5.0)})
    assert [curve(1, 32), curve(1, 512), curve(4, 32), curve(8, 512)] == [1.0, 2.0, 1.0, 5.0]
    assert curve(6, 512) == pytest.approx(4.0)
    assert curve(1, 272) == pytest.approx(1.5)
    assert curve(12, 512) == pytest.approx(7.0)  # beyond what was measured
    for context in (32, 100, 512):
        values = [curve(rows, context) for rows in range(1, 20)]
        assert values == sorted(values)


def test_confidence_learns_leads_depths_and_siblings() -> None:
    model, draws = Confidence(), random.Random(0)
    before = [model.chance(lead, 1) for lead in (0.0, 1.0, 3.0, 9.0)]
    assert before == sorted(before)
    assert model.chance(9.0, 1) == model.chance(float("inf"), 1)
    for _ in range(1500):
        lead, depth = draws.choice((0.2, 2.0)), draws.choice((1, 3))
        best = {0.2: 0.3, 2.0: 0.9}[lead] - (0.2 if depth == 3 else 0.0)
        draw = draws.random()
        rank = 0 if draw < best else 1 if draw < best + (1 - best) * 0.7 else None
        model.learn([Judged(lead, depth, 2, rank)])
    for estimate in (model, model.for_sequence()):
        assert estimate.chance(0.2, 1) == pytest.approx(0.3, abs=0.12)
        assert estimate.chance(2.0, 1) == pytest.approx(0.9, abs=0.06)
        assert estimate.chance(2.0, 3) == pytest.approx(0.7, abs=0.1)
        assert estimate.share(1) == pytest.approx(0.7, abs=0.1)
    text = model.for_sequence()
    for _ in range(40):  # a text that differs is soon known to
        text.learn([Judged(2.0, 1, 1, None)])
    assert text.chance(2.0, 1) < 0.35 < model.chance(2.0, 1)


def test_pace_bounds_what_drafting_loses() -> None:
    loss, debt = 0.35, 0.0
    for text in range(5):
        pace, lost = Pace(debt), 0.0
        for _ in range(1000):
            if pace.drafts():
                lost += loss
                pace.record(-loss)
        debt = pace.debt
        # the first text finds out; each later one tries at once, and then as often as is allowed
        assert lost <= (MOST_DEBT if text == 0 else 0.0) + 2 * loss + ALLOWED * 1000


def test_pace_tries_again_when_the_text_changes() -> None:
    pace, drafted = Pace(), [0, 0]
    for half, gain in enumerate((-0.3, 0.9)):
        for _ in range(400):
            if pace.drafts():
                pace.record(gain)
                drafted[half] += 1
    assert drafted[0] < 12
    assert drafted[1] > 300


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("kind", PROCESSES)
def test_never_far_from_the_best_fixed_chain(machine: str, kind: str) -> None:
    times, process = MACHINES[machine], PROCESSES[kind]
    best = max(fixed(depth, times, process, 20_000) for depth in range(9))
    found = run(NodePlanner(times), times, lambda _: process, texts=40, length=200)
    assert found.rate >= 0.98 * best


@pytest.mark.parametrize("machine", ["typical", "dear drafts"])
def test_leads_bring_more_than_any_fixed_chain(machine: str) -> None:
    """What a planner that grows trees node by node is for: a choice among shapes ends at the best of them."""
    times, process = MACHINES[machine], Process(-0.5)
    best = max(fixed(depth, times, process, 20_000) for depth in range(9))
    assert run(NodePlanner(times), times, lambda _: process, texts=20, length=200).rate >= 1.03 * best


@pytest.mark.parametrize("machine", MACHINES)
def test_never_slower_than_plain_where_no_draft_is_right(machine: str) -> None:
    times = MACHINES[machine]
    plain = fixed(0, times, PROCESSES["good"], 20_000)
    planner = NodePlanner(times)
    wrong = Process(-50.0, share=0.0)
    assert run(planner, times, lambda _: wrong, texts=8, length=256).rate >= 0.985 * plain
    assert run(planner, times, lambda _: wrong, texts=8, length=256).rate >= 0.99 * plain
    # and it comes back
    run(planner, times, lambda _: PROCESSES["sure"], texts=8, length=256)
    again = run(planner, times, lambda _: PROCESSES["sure"], texts=8, length=256).rate
    assert again >= 0.97 * max(fixed(depth, times, PROCESSES["sure"], 20_000) for depth in range(9))


def test_a_plain_step_that_seemed_slow_is_seen_to_be_fast() -> None:
    """While drafting seems to pay no step is plain, unless one is looked at now and then."""
    parts: dict[str, dict[int, float]]
    parts = {"tree": {3: 1.1, 16: 1.5}, "level": {1: 0.1, 4: 0.12}, "extend": {1: 0.05, 32: 0.1}}
    believed = flat(verify={1: 1.0, 2: 1.02, 16: 1.4}, **parts)
    real = flat(verify={1: 0.5, 2: 1.02, 16: 1.4}, **parts)
    planner = NodePlanner(believed)
    run(planner, real, lambda _: PROCESSES["poor"], texts=4, length=200)
    found = run(planner, real, lambda _: PROCESSES["poor"], texts=8, length=200)
    assert found.rate >= 0.97 * fixed(0, real, PROCESSES["poor"], 20_000)


def test_a_changing_text_is_followed() -> None:
    times = MACHINES["typical"]
    kinds = [PROCESSES["sure"], Process(-50.0, share=0.0)]
    found = run(NodePlanner(times), times, lambda number: kinds[number % 2], texts=20, length=200)
    plain = fixed(0, times, kinds[0], 20_000)
    best = max(fixed(depth, times, kinds[0], 20_000) for depth in range(9))
    assert found.rate >= 0.92 * 2 / (1 / plain + 1 / best)


def test_the_chosen_nodes_gain_most() -> None:
    draws = random.Random(1)
    for _ in range(60):
        planner = NodePlanner(MACHINES[draws.choice(list(MACHINES))])
        planner.rate = draws.uniform(1.0, 3.0)
        plan = planned(planner)
        plan.expand([1.0], 0)
        tree, chances = TokenTree(), list[float]()
        for node in range(7):
            parent = draws.randrange(-1, node)
            above = 1.0 if parent == ROOT else chances[parent]
            chances.append(above * draws.uniform(0.1, 1.0))
            tree.add(parent, node, len(tree.children(parent)))

        trees = [nodes for size in range(8) for nodes in combinations(range(7), size)
                 if all(tree.parents[node] == ROOT or tree.parents[node] in nodes for node in nodes)]  # fmt: skip
        best = max(worth(nodes, tree, chances, planner) for nodes in trees)
        assert worth(tuple(plan.choose(tree, chances)), tree, chances, planner) >= best - 1e-9


def planned(planner: NodePlanner, left: int = 100) -> NodePlan:
    """Plans the first step of a text, alone."""
    (plan,) = planner.plan(TreeBatch([Standing(LIMITS, planner.begin(), CONTEXT, 1, left)], alone=True))
    assert isinstance(plan, NodePlan)
    return plan


def worth(nodes: tuple[int, ...], tree: TokenTree, chances: list[float], planner: NodePlanner) -> float:
    """What a tree of these nodes gains over doing something else with its time."""
    curve = planner.times.tree if any(tree.ranks[node] for node in nodes) else planner.times.verify
    time = curve(len(nodes) + 1, CONTEXT) / planner.times.verify(1, CONTEXT)
    return 1.0 + sum(chances[node] for node in nodes) - planner.rate * time


@pytest.mark.usefixtures("auto_drafts")
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0, "repetition_penalty": 1.2}], ids=str)
@pytest.mark.parametrize("machine", MACHINES)
def test_the_text_does_not_depend_on_the_plan(machine: str, sampling: dict[str, Any]) -> None:
    lm = mtp_spec.load()
    options = {"max_new_tokens": 30, "seed": 4, **sampling}
    plain = lm.generate("One day a fox", speculation=None, **options)
    host(lm).planners._planners[torch.get_num_threads()] = NodePlanner(MACHINES[machine])
    for speculation in ("auto", mtp_spec.Speculation(4, (3, 2), budget=6, adaptive=True)):
        out = lm.generate("One day a fox", speculation=speculation, **options)
        assert out.token_ids == plain.token_ids
        planned = out.stats.planned
        assert (planned.steps, planned.tokens) == (out.stats.steps, out.stats.step_tokens)
        assert planned.expected_tokens > 0 < planned.expected_seconds


@pytest.mark.usefixtures("auto_drafts")
def test_drafts_are_accepted_after_a_long_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of the pause that the modules have not seen are left out; the text stays, and drafts are right again."""
    lm = mtp_spec.load()
    options = {"max_new_tokens": 150, "temperature": 0.0}
    prompt = [{"role": "user", "content": "Tell me a story about a fox"}]
    plain = lm.chat(prompt, speculation=None, seed=0, **options)
    monkeypatch.setattr(Speed, "learn", lambda *_: None)  # planned from typical times, however busy the machine is
    steps = iter([*[True] * 3, *[False] * 90, *[True] * 100])
    monkeypatch.setattr(Pace, "drafts", lambda *_: next(steps))
    out = lm.chat(prompt, speculation="auto", seed=0, **options)
    assert out.token_ids == plain.token_ids
    assert out.stats.histogram[0] >= 90
    # of first drafts: how wide and deep trees are depends on how sure the modules are of this very text
    assert out.stats.accepted_per_depth["conditional"][0] > 0.6
    assert out.stats.drafted > out.stats.accepted > 20


def test_auto_drafts_nothing_where_rows_run_one_by_one(tmp_path: Path) -> None:
    lm = mtp_spec.load(tiny.make(tmp_path / "model").folder, dtype="float32", measure=False)
    lm.backend.technique = "single"
    assert lm.speculation_for("auto") is None
    assert lm.generate([1, 2, 3], max_new_tokens=4, seed=0).stats.drafted == 0
    assert lm.generate([1, 2, 3], max_new_tokens=4, speculation=2, seed=0).stats.drafted > 0


def test_times_are_positive_wherever_they_are_asked_for() -> None:
    falling = {1: (1.0, 0.7), 4: (1.2, 0.9), 16: (9.0, 1.0)}
    times = StepTimes(**dict.fromkeys(("verify", "tree", "level", "extend"), Curve.rising((32, 512), falling)))
    for curve in (times.verify, StepTimes.from_json(times.to_json()).level):
        for context in (0, 1, 32, 512, 2048, 163840):
            seconds = [curve(rows, context) for rows in range(65)]
            assert min(seconds) > 0
            assert seconds == sorted(seconds)
            assert seconds[1] >= 1.0 or context < 32


def given_alone(times: StepTimes, chance: float, tokens: int = 40, modules: bool = True) -> NodePlan | None:
    """Plans a step in which another drafter proposes a chain; None if the modules are to draft, or nobody."""
    planner, given = NodePlanner(times), [Continuation(list(range(tokens)), [chance], "text")]
    standing = Standing(LIMITS, planner.begin(), CONTEXT, 1, 100, modules=modules, given=given)
    (plan,) = planner.plan(TreeBatch([standing], alone=True))
    return plan if isinstance(plan, NodePlan) and len(plan.given) else None


def test_proposals_are_verified_as_far_as_they_pay() -> None:
    for modules in (True, False):
        cheap, dear = given_alone(CHEAP_ROWS, 0.95, modules=modules), given_alone(DEAR_ROWS, 0.95, modules=modules)
        assert cheap is not None
        assert not cheap.drafts
        assert len(cheap.given) > 12
        assert cheap.tokens == pytest.approx(1 + sum(0.95**depth for depth in range(1, len(cheap.given) + 1)))
        assert dear is None or len(dear.given) < len(cheap.given)
        assert given_alone(DEAR_ROWS, 0.1, modules=modules) is None
    assert given_alone(CHEAP_ROWS, 0.3) is None  # the modules promise more
    alone = given_alone(CHEAP_ROWS, 0.3, modules=False)
    assert alone is not None
    assert 1 <= len(alone.given) < 8


def test_proposals_join_the_modules_tree() -> None:
    tree, chances = TokenTree(), [0.6, 0.3, 0.3]
    for parent, token in ((ROOT, 5), (ROOT, 6), (0, 7)):
        tree.add(parent, token, len(tree.children(parent)))
    graft(tree, chances, ROOT, [Continuation([5, 7, 8, 9], [0.5, 0.9], "text"), Continuation([4], [0.2], "text")], 64)
    assert tree.path_tokens(len(tree) - 2) == [5, 7, 8, 9]
    assert tree.sources == ["mtp"] * 3 + ["text"] * 3
    assert chances[0] > 0.6  # two drafters agree
    assert chances[-1] < 0.2  # and here they contradict each other
    assert all(chances[node] <= (1.0 if parent == ROOT else chances[parent])
               for node, parent in enumerate(tree.parents))  # fmt: skip
    graft(tree, chances, 1, [Continuation(list(range(20, 60)), [0.9], "text")], 12)
    assert len(tree) == len(chances) == 12
