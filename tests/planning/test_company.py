"""Planners of texts side by side, in simulated time: they gain where drafting pays for all, and never lose for long."""

from __future__ import annotations

import random
from itertools import zip_longest

import pytest

import mtp_spec
import tiny
from lms import host
from mtp_spec.cpu.draft import KEPT_BEHIND, MOST_BEHIND
from mtp_spec.planning.base import Outcome, Seconds
from mtp_spec.planning.costs import StepTimes
from mtp_spec.planning.fixed_plan import Standing, TreeBatch
from mtp_spec.planning.node_plan import ALONE, Company, NodePlan, Speed
from mtp_spec.planning.node_planner import NodePlanner
from mtp_spec.tree import TokenTree
from simulated import CHEAP_ROWS, CONTEXT, ENDLESS, LIMITS, MACHINES, PROCESSES, Process, draft


class Text:
    """One text: as much of a sequence as planning looks at."""

    def __init__(self, planner: NodePlanner) -> None:
        self.memory, self.length, self.rows, self.pending = planner.begin(), CONTEXT, 1, 1

    def standing(self) -> Standing:
        return Standing(LIMITS, self.memory, self.length, self.pending, ENDLESS, self.rows)


def simulate(
    planner: NodePlanner, times: StepTimes, processes: list[Process], length: int, seed: int = 0, dearer: float = 1.0
) -> tuple[float, float, float]:
    """Lets one text for each process write in company, one text after another; drafting is dearer than measured alone.

    Returns tokens a second, those of plain decoding, and drafted nodes a step.
    """
    noise, texts = random.Random(seed), [Text(planner) for _ in processes]
    seconds, tokens, steps, nodes = 0.0, 0, 0, 0
    while steps < length * len(texts):
        plans = planner.plan(TreeBatch([text.standing() for text in texts], alone=len(texts) == 1))
        levels, pending, drafting, trees = list[int](), 0, 0, []
        for text, plan, process in zip(texts, plans, processes, strict=True):
            tree, accepted = TokenTree(), list[int]()
            if plan.drafts:
                tree, accepted, _ = draft(plan, times, process, noise)
                levels = [a + b for a, b in zip_longest(levels, plan.levels, fillvalue=0)]
                drafting, pending, text.pending = drafting + 1, pending + text.pending, 0
            text.pending += len(accepted) + 1
            text.pending = KEPT_BEHIND if text.pending > MOST_BEHIND else text.pending
            text.rows = len(tree) + 1
            trees.append((tree, accepted))
        context = texts[0].length
        verifying = times.verify(sum(text.rows for text in texts), context) * noise.uniform(0.9, 1.1)
        expected = 0.0
        if drafting:
            expected = sum(times.level(count, context) for count in levels if count)
            expected += times.extend(pending, context) - times.extend(drafting, context)
        others = expected * dearer * noise.uniform(0.9, 1.1)
        planner.learn(
            plans, Outcome([accepted for _, accepted in trees], Seconds(verifying + others, others, verifying))
        )
        seconds += verifying + others
        for number, (text, (tree, accepted)) in enumerate(zip(texts, trees, strict=True)):
            tokens, nodes, steps = tokens + len(accepted) + 1, nodes + len(tree), steps + 1
            text.length += len(accepted) + 1
            if text.length > CONTEXT + 128:  # the next text
                texts[number] = Text(planner)
    rate = len(texts) / times.verify(len(texts), CONTEXT + 64)
    return tokens / seconds, rate, nodes / steps


@pytest.mark.parametrize("count", [2, 5, 40])
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("process", PROCESSES)
def test_never_under_plain(machine: str, process: str, count: int) -> None:
    times = MACHINES[machine]
    planner = NodePlanner(times)
    simulate(planner, times, [PROCESSES[process]] * count, 100, seed=1)  # what earlier texts have taught
    together, plain, _ = simulate(planner, times, [PROCESSES[process]] * count, 200)
    assert together > 0.98 * plain


@pytest.mark.parametrize("count", [2, 5, 12])
def test_never_under_plain_where_drafting_takes_longer_than_alone(count: int) -> None:
    times, planner = StepTimes.typical(), NodePlanner(StepTimes.typical())
    simulate(planner, times, [PROCESSES["good"]] * count, 100, seed=1, dearer=3.0)
    together, plain, _ = simulate(planner, times, [PROCESSES["good"]] * count, 200, dearer=3.0)
    assert together > 0.98 * plain


@pytest.mark.parametrize("machine", MACHINES)
def test_never_under_plain_where_texts_differ(machine: str) -> None:
    times, planner = MACHINES[machine], NodePlanner(MACHINES[machine])
    mixed = [PROCESSES["good"], PROCESSES["poor"], PROCESSES["sure"], PROCESSES["poor"]]
    simulate(planner, times, mixed, 100, seed=1)
    together, plain, _ = simulate(planner, times, mixed, 300)
    assert together > 0.98 * plain


def test_few_texts_gain_and_many_are_plain() -> None:
    times = StepTimes.typical()
    found = {}
    for count in (1, 2, 4, 64):
        planner = NodePlanner(times)
        simulate(planner, times, [PROCESSES["sure"]] * count, 60, seed=1)
        together, plain, nodes = simulate(planner, times, [PROCESSES["sure"]] * count, 150)
        found[count] = (together / plain, nodes)
    assert found[1][0] > found[2][0] > 1.2
    assert found[4][0] > 1.05
    assert found[64][1] == 0.0


def test_where_rows_cost_little_many_texts_gain_too() -> None:
    planner = NodePlanner(CHEAP_ROWS)
    together, plain, nodes = simulate(planner, CHEAP_ROWS, [PROCESSES["sure"]] * 16, 150)
    assert together > 1.2 * plain
    assert nodes > 2


def test_a_node_costs_more_beside_more_rows() -> None:
    times = MACHINES["dear rows"]
    memory, costs = NodePlanner(times).begin(), []
    for beside in (ALONE, Company(), Company(4, 3, 4), Company(16, 15, 16), Company(16, 60, 16)):
        plan = NodePlan(Standing(LIMITS, memory, CONTEXT, 1, ENDLESS), memory, beside, times, Speed())
        costs.append(plan.row(1))
    assert costs[0] == pytest.approx(costs[1])
    assert costs[1] <= costs[2] <= costs[3] <= costs[4]


@pytest.mark.usefixtures("auto_drafts")
def test_the_text_is_the_same_whatever_the_company(tmp_path_factory: pytest.TempPathFactory) -> None:
    lm = mtp_spec.load(tiny.make(tmp_path_factory.mktemp("tiny") / "model").folder, dtype="bfloat16", max_batch=6)
    host(lm).planners.here().times = CHEAP_ROWS
    prompts = [[i, i + 1] for i in range(12)]
    texts = lm.generate(prompts, max_new_tokens=30, temperature=0.7, speculation="auto")
    assert sum(text.stats.drafted for text in texts) > 0
    for prompt, text in zip(prompts, texts, strict=True):
        plain = lm.generate(prompt, max_new_tokens=30, temperature=0.7, seed=text.seed, speculation=None)
        assert text.token_ids == plain.token_ids
