"""A drafter and a target of which only the chances are simulated, to see what a policy makes of them.

A node whose parent is accepted has a lead; the higher, the likelier its best child is the accepted one. Seconds are
those of `StepTimes`, with noise. Everything is drawn in advance for each step, so that all policies meet the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from math import exp

from mtp_spec.cpu.draft import KEPT_BEHIND, MOST_BEHIND
from mtp_spec.planning.base import Outcome, Seconds
from mtp_spec.planning.costs import Curve, StepTimes
from mtp_spec.planning.fixed_plan import Standing, TreeBatch, TreePlan
from mtp_spec.planning.node_planner import NodePlanner
from mtp_spec.speculation import MAX_DEPTH, Speculation
from mtp_spec.tree import ROOT, TokenTree

WIDTH = 2
CONTEXT = 100
LIMITS = Speculation(branching=(WIDTH,) * MAX_DEPTH, budget=64, adaptive=True)
ENDLESS = 1000


@dataclass(frozen=True)
class Process:
    """Acceptance: sigmoid(start + slope * lead - fall * (depth - 1)); leads are exponential with this mean.

    A share of what the best child leaves goes to its sibling.
    """

    start: float
    slope: float = 1.2
    lead: float = 2.0
    fall: float = 0.0
    share: float = 0.5

    def best(self, lead: float, depth: int) -> float:
        return 1.0 / (1.0 + exp(-(self.start + self.slope * lead - self.fall * (depth - 1))))


def flat(**rows: dict[int, float]) -> StepTimes:
    """Times that do not depend on the context."""
    return StepTimes(**{name: Curve.rising((32, 512), {r: (s, s) for r, s in points.items()})
                        for name, points in rows.items()})  # fmt: skip


CHEAP_ROWS = flat(verify={1: 1, 16: 1.05}, tree={3: 1.02, 16: 1.07}, level={1: 0.1, 4: 0.11}, extend={1: 0.05, 32: 0.1})
DEAR_ROWS = flat(verify={1: 1, 16: 6}, tree={3: 1.8, 16: 7}, level={1: 0.05, 4: 0.2}, extend={1: 0.05, 32: 0.8})
DEAR_DRAFTS = flat(verify={1: 1, 16: 1.5}, tree={3: 1.1, 16: 1.7}, level={1: 0.5, 4: 0.7}, extend={1: 0.4, 32: 0.9})
MACHINES = {
    "typical": StepTimes.typical(), "cheap rows": CHEAP_ROWS, "dear rows": DEAR_ROWS, "dear drafts": DEAR_DRAFTS
}  # fmt: skip
PROCESSES = {
    "good": Process(0.0), "falling": Process(0.3, fall=0.5), "poor": Process(-1.5, lead=1.0), "sure": Process(2.5),
}  # fmt: skip


@dataclass
class Spent:
    seconds: float = 0.0
    tokens: int = 0
    drafted: int = 0
    steps: int = 0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Children:
    """A node's best children, of which only the lead is known."""

    count: int
    ahead: float

    def lead(self) -> float:
        return self.ahead

    def logprobs(self) -> list[float]:
        raise NotImplementedError


def run(
    planner: NodePlanner, times: StepTimes, process: Callable[[int], Process], texts: int, length: int, seed: int = 0
) -> Spent:
    """Lets the planner write texts of so many tokens; `process` says how a text's drafts are accepted."""
    spent, noise = Spent(), random.Random(seed)
    for number in range(texts):
        memory, made, pending = planner.begin(), 0, 1
        while made < length:
            tree, accepted, drafting = TokenTree(), list[int](), 0.0
            (plan,) = planner.plan(TreeBatch([Standing(LIMITS, memory, CONTEXT + made, pending, ENDLESS)], alone=True))
            if plan.drafts:
                tree, accepted, drafting = draft(plan, times, process(number), noise)
            verify = (times.verify if tree.is_chain() else times.tree)(len(tree) + 1, CONTEXT + made)
            rest = verify * noise.uniform(0.85, 1.15)
            pending = len(accepted) + 1 if drafting else pending + 1
            pending = KEPT_BEHIND if pending > MOST_BEHIND else pending
            spent.seconds += drafting + rest
            spent.tokens += len(accepted) + 1
            spent.drafted, spent.steps = spent.drafted + len(tree), spent.steps + 1
            made += len(accepted) + 1
            planner.learn([plan], Outcome([accepted], Seconds(drafting + rest, drafting, rest)))
    return spent


def draft(
    plan: TreePlan, times: StepTimes, process: Process, noise: random.Random
) -> tuple[TokenTree, list[int], float]:
    """Returns the tree that is verified, the nodes of it that are accepted, and the seconds."""
    tree, nodes, context = TokenTree(), list[tuple[bool, float]](), plan.standing.context
    leaves = [(ROOT, True, plan.root)]
    seconds = times.extend(plan.standing.pending, context) - times.extend(1, context)
    for depth in range(1, MAX_DEPTH + 1):
        leaves = [leaves[i] for i in plan.expand([chance for *_, chance in leaves], len(tree))] if leaves else []
        if not leaves:
            break
        seconds += times.level(len(leaves), context)
        grown = []
        for node, accepted, chance in leaves:
            lead = noise.expovariate(1.0 / process.lead)
            draw = noise.random()
            best = process.best(lead, depth)
            edges = (best, best + (1.0 - best) * process.share)
            right = next((rank for rank, edge in enumerate(edges) if draw < edge), None)
            for rank, own in enumerate(plan.score(node, chance, Children(WIDTH, lead), depth)):
                child = tree.add(node, rank, rank)
                nodes.append((accepted and rank == right, own))
                grown.append((child, nodes[-1][0], own))
        leaves = grown
    kept = plan.choose(tree, [chance for _, chance in nodes])
    places = {node: place for place, node in enumerate(kept)}
    path = [places[node] for node, (accepts, _) in enumerate(nodes) if accepts and node in places]
    return tree.part(kept), path, seconds * noise.uniform(0.85, 1.15)


def fixed(depth: int, times: StepTimes, process: Process, length: int, seed: int = 0) -> float:
    """Returns tokens per second of a chain of this depth; 0 is plain decoding."""
    noise, seconds, made, pending = random.Random(seed), 0.0, 0, 1
    while made < length:
        context = CONTEXT + made % 128
        seconds += times.verify(depth + 1, context)
        if depth:
            seconds += times.extend(pending, context) - times.extend(1, context) + depth * times.level(1, context)
        count = 0
        while count < depth and noise.random() < process.best(noise.expovariate(1.0 / process.lead), count + 1):
            count += 1
        made, pending = made + count + 1, count + 1
    return made / seconds
