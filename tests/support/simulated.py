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
from mtp_spec.planning.costs import Curve, StepTimes
from mtp_spec.planning.node_planner import Planner, TextPlanner
from mtp_spec.speculation import MAX_DEPTH
from mtp_spec.tree import ROOT, TokenTree

WIDTH = 2
CONTEXT = 100


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


def run(
    planner: Planner, times: StepTimes, process: Callable[[int], Process], texts: int, length: int, seed: int = 0
) -> Spent:
    """Lets the planner write texts of so many tokens; `process` says how a text's drafts are accepted."""
    spent, noise = Spent(), random.Random(seed)
    for number in range(texts):
        text, made, pending = TextPlanner(planner), 0, 1
        while made < length:
            tree, accepted, drafting = TokenTree(), list[int](), 0.0
            if text.drafts(CONTEXT + made, pending):
                whole, path, drafting = _draft(text, times, process(number), noise, CONTEXT + made, pending)
                chances = [chance for _, chance in path]
                kept = text.choose(whole, chances)
                places = {node: place for place, node in enumerate(kept)}
                tree = whole.part(kept)
                accepted = [places[node] for node, (accepts, _) in enumerate(path) if accepts and node in places]
            verify = (times.verify if tree.is_chain() else times.tree)(len(tree) + 1, CONTEXT + made)
            rest = verify * noise.uniform(0.85, 1.15)
            pending = len(accepted) + 1 if drafting else pending + 1
            pending = KEPT_BEHIND if pending > MOST_BEHIND else pending
            spent.seconds += drafting + rest
            spent.tokens += len(accepted) + 1
            spent.drafted, spent.steps = spent.drafted + len(tree), spent.steps + 1
            made += len(accepted) + 1
            text.learn(tree, accepted, drafting, rest)
    return spent


def _draft(
    text: TextPlanner, times: StepTimes, process: Process, noise: random.Random, context: int, pending: int
) -> tuple[TokenTree, list[tuple[bool, float]], float]:
    """Returns the drafted tree, for each node whether it would be accepted and its chance, and the seconds."""
    tree, nodes = TokenTree(), list[tuple[bool, float]]()
    leaves = [(ROOT, True, 1.0)]
    seconds = times.extend(pending, context) - times.extend(1, context)
    for depth in range(1, MAX_DEPTH + 1):
        leaves = [leaves[i] for i in text.deeper([chance for *_, chance in leaves], len(tree))]
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
            for rank, own in enumerate(text.children(node, chance, lead, depth, WIDTH)):
                child = tree.add(node, rank, rank)
                nodes.append((accepted and rank == right, own))
                grown.append((child, nodes[-1][0], own))
        leaves = grown
    return tree, nodes, seconds * noise.uniform(0.85, 1.15)


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
