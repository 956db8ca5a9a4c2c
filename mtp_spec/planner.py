"""Which tree to draft and verify, node by node: what "auto" and `Speculation(adaptive=True)` do on a CPU.

A step gains the tokens it commits and costs the time of its passes. Tokens per second are most when whatever brings
more tokens than its time would bring elsewhere is done, and nothing else: a node v belongs to the tree if
value(v) > rate * dT(v), with value(v) the probability that it is accepted (the product of the chances along its path),
dT(v) the time it adds, and rate the tokens per second of such steps (as EVICT, 2605.00342, and DSpark's scheduler,
2607.05147, choose). Times are those measured on this machine (`times`), chances those of `confidence`. A pass's time
does not grow evenly with its rows, so all prefixes of the nodes in order of value are compared.

The unit of time is a plain step at the same context. Nothing here ever changes the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log

from mtp_spec.confidence import Confidence, Outcome
from mtp_spec.options import MAX_DEPTH
from mtp_spec.pace import Pace
from mtp_spec.times import Curve, StepTimes
from mtp_spec.tree import ROOT, TokenTree

# before anything was seen: tokens in the time of a plain step, and the chance of a best child
FIRST_RATE, FIRST_CHANCE = 1.3, 0.7
# weight of a step in the running means of a text, and of a model's texts
NEWER, SLOWER = 0.1, 0.02
# accepted tokens that the promise of the chances counts for before a text has shown whether it is kept
TRUSTED = 3.0
# a time is taken to be at most this far from the expected one: a neighbour's burst is no news
MOST_SURPRISE = log(2.0)


class Speed:
    """How the times of now differ from those measured before: a factor for verifying, ratios to it for the others."""

    def __init__(self) -> None:
        self._logs = {"verify": 0.0, "plain": 0.0, "draft": 0.0}

    def factor(self, kind: str) -> float:
        """Returns the factor of passes of several rows ("verify"), of one ("plain") or of drafting ("draft")."""
        return exp(self._logs["verify"] + (self._logs[kind] if kind != "verify" else 0.0))

    def learn(self, kind: str, measured: float, expected: float) -> None:
        """Takes a time beside the expected one, which includes the factor."""
        surprise = max(-MOST_SURPRISE, min(MOST_SURPRISE, log(measured / expected)))
        if kind != "verify":
            self._logs[kind] += SLOWER * surprise
        if kind != "draft":
            self._logs["verify"] += NEWER * surprise


class Planner:
    """What the texts of a loaded model have taught.

    Args:
        times: of the passes on this machine.
    Attributes:
        rate: tokens in the time of a plain step, of drafted steps.
        debt: what drafting lost to plain decoding at the end of the last text.
        best: the chance of a best child.
    """

    def __init__(self, times: StepTimes) -> None:
        self.times, self.speed, self.confidence = times, Speed(), Confidence()
        self.rate, self.debt, self.best = FIRST_RATE, 0.0, FIRST_CHANCE


class TextPlanner:
    """Plans the steps of one text; call its methods in the order of a step.

    Attributes:
        tokens, seconds: expected of the step.
    """

    def __init__(self, planner: Planner) -> None:
        self.planner, self._times, self._speed = planner, planner.times, planner.speed
        self._pace, self._confidence = Pace(planner.debt), planner.confidence.for_text()
        self._rate, self._best = planner.rate, planner.best
        self._promised = self._kept = TRUSTED
        self.tokens, self.seconds, self._doubted = 1.0, 0.0, False
        self._start(0, 1)

    def drafts(self, context: int, pending: int) -> bool:
        """Returns whether the next step should draft.

        Args:
            context: committed tokens.
            pending: those of them that the MTP module has not seen.
        """
        self._start(context, pending)
        self._doubted = self._pace.doubted
        if self._pace.paused:
            self._rate = 1.0  # what the time would bring elsewhere is plain decoding
        return self._pace.drafts(self._catching_up)

    def _start(self, context: int, pending: int) -> None:
        self._context = context
        self._plain = self._times.verify(1, context) * self._speed.factor("plain")
        factor, extend = self._speed.factor("draft") / self._plain, self._times.extend
        self._extending = (extend(pending, context) - extend(1, context)) * factor
        self._catching_up = max(0.0, extend(pending, context) - extend(MAX_DEPTH, context)) * factor
        self._drafting, self._leads = 0.0, dict[int, tuple[float, int]]()
        self.tokens, self.seconds = 1.0, self._plain

    def deeper(self, chances: Sequence[float], nodes: int) -> list[int]:
        """Returns which of the leaves that have these chances should get children.

        Args:
            nodes: of the tree so far; without any the root gets children, as `drafts` has decided.
        """
        if nodes == 0:
            self._drafting = self._level(1) + self._extending
            return [0]
        order = sorted(range(len(chances)), key=lambda leaf: (-chances[leaf], leaf))
        gain, found = 0.0, (0.0, 0)
        for count, leaf in enumerate(order, start=1):
            row = self._row(nodes) if count == 1 else self._branch(nodes)
            gain += max(0.0, chances[leaf] * self._best - self._rate * row)
            found = max(found, (gain - self._rate * self._level(count), count))
        self._drafting += self._level(found[1]) if found[1] else 0.0
        return sorted(order[: found[1]])

    def children(self, node: int, chance: float, lead: float, depth: int, width: int) -> list[float]:
        """Returns the chances of a node's children, best first, without those that cannot pay.

        Args:
            chance: of the node.  lead: of its best child over the next.  depth: of the children.  width: most of them.
        """
        best = self._confidence.chance(lead, depth)
        self._leads[node] = (lead, depth)
        self._best += NEWER * chance * (best - self._best)
        chances, left = [chance * best], chance * (1.0 - best)
        least = self._rate * self._branch(len(self._leads))
        for rank in range(1, width):
            share = self._confidence.share(rank)
            if left * share < least:
                break
            chances.append(left * share)
            left *= 1.0 - share
        return chances

    def choose(self, tree: TokenTree, chances: Sequence[float]) -> list[int]:
        """Returns the nodes worth verifying, ascending, and settles what is expected of the step."""
        order = sorted(range(len(tree)), key=lambda node: (-chances[node], node))
        chain = [node for node in order if not any(tree.ranks[step] for step in tree.path(node))]
        found = [self._prefix(nodes, chances, chain) for nodes in (chain, order)]
        kept, self.tokens, time = max(found, key=lambda one: one[1] - self._rate * one[2])
        if self._doubted and not kept:  # only a verified draft tells
            kept, self.tokens, time = order[:1], 1.0 + chances[order[0]], self._drafting + self._chain(2)
        self.seconds = time * self._plain
        numbers = {ROOT: ROOT, **{node: number for number, node in enumerate(sorted(kept))}}
        self._leads = {numbers[node]: lead for node, lead in self._leads.items() if node in numbers}
        return sorted(kept)

    def _prefix(
        self, nodes: list[int], chances: Sequence[float], chain: Sequence[int]
    ) -> tuple[list[int], float, float]:
        """Returns the first so many nodes that gain most, with tokens and time of their step."""
        tokens, found, curve = 1.0, (list[int](), 1.0, 1.0 + self._drafting), self._times.verify
        for count, node in enumerate(nodes, start=1):
            if node not in chain:
                curve = self._times.tree
            tokens += chances[node]
            time = self._drafting + self._unit("verify", curve, count + 1)
            if tokens - self._rate * time > found[1] - self._rate * found[2]:
                found = (nodes[:count], tokens, time)
        return found

    def learn(self, tree: TokenTree, accepted: Sequence[int], drafting: float, rest: float) -> None:
        """Takes what was accepted of the verified tree, and the seconds of drafting it and of the rest of the step."""
        if self._drafting:
            self._speed.learn("draft", drafting, self._drafting * self._plain)
            self._judge(tree, accepted)
        expected = self.seconds - self._drafting * self._plain
        self._speed.learn("verify" if len(tree) else "plain", rest, expected)

    def _judge(self, tree: TokenTree, accepted: Sequence[int]) -> None:
        outcomes, planner = list[Outcome](), self.planner
        for node in (ROOT, *accepted):
            children = tree.children(node)
            if children and node in self._leads:
                ranks = [tree.ranks[child] for child in children if child in accepted]
                outcomes.append(Outcome(*self._leads[node], len(children), ranks[0] if ranks else None))
        self._confidence.learn(outcomes)
        planner.confidence.learn(outcomes)
        time, promised = self.seconds / self._plain, self.tokens - 1.0
        self._promised += promised - NEWER * self._promised
        self._kept += len(accepted) - NEWER * self._kept
        tokens = 1.0 + promised * self._kept / self._promised
        # what came is less certain than what was expected, but it counts where expectations are in doubt
        self._pace.record((1.0 + len(accepted) if self._doubted else tokens) - (time - self._catching_up))
        planner.debt = self._pace.debt
        rate = max(1.0, tokens / time)
        self._rate, planner.rate = _mean(self._rate, rate, NEWER), _mean(planner.rate, rate, SLOWER)
        planner.best = _mean(planner.best, self._best, SLOWER)

    def _unit(self, kind: str, curve: Curve, rows: int) -> float:
        return curve(rows, self._context) * self._speed.factor(kind) / self._plain

    def _level(self, leaves: int) -> float:
        return self._unit("draft", self._times.level, leaves)

    def _row(self, nodes: int) -> float:
        """Returns the time of one more row beside a chain of nodes."""
        return self._chain(nodes + 2) - self._chain(nodes + 1)

    def _branch(self, nodes: int) -> float:
        """Returns the time of one more row that makes the chain a tree."""
        return self._unit("verify", self._times.tree, nodes + 2) - self._chain(nodes + 1)

    def _chain(self, rows: int) -> float:
        return self._unit("verify", self._times.verify, rows)


def _mean(old: float, new: float, weight: float) -> float:
    return old + weight * (new - old)
