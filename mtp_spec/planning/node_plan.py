"""A tree that is grown node by node while it is drafted: what one sequence drafts and verifies in a step on a CPU.

A step gains the tokens that it commits and costs the time of its passes. Tokens per second are maximal if a node joins
exactly when it yields more tokens than its time would yield elsewhere: a node v belongs to the tree if
value(v) > rate * dT(v), with value(v) the probability that it is accepted (the product of the probabilities along its
path), dT(v) the time it adds, and rate the tokens per second of such steps (as in EVICT, 2605.00342, and DSpark's
scheduler, 2607.05147). The time of a pass is not linear in its rows, so all prefixes of the nodes in order of value are
compared.

The unit of time is a plain step at the same context; in a batch that is a pass of one row per sequence. Every sequence
waits for the added rows, so a node's gain is weighed against its time multiplied by the batch size. Large batches
therefore draft nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

from mtp_spec.drafting import Continuation
from mtp_spec.planning.correction import Correction, surprise
from mtp_spec.planning.costs import StepTimes
from mtp_spec.planning.fixed_plan import Children, Propose, Standing
from mtp_spec.planning.given import graft
from mtp_spec.planning.sequence_memory import SequenceMemory
from mtp_spec.speculation import MAX_DEPTH, Speculation
from mtp_spec.tree import MODULES, ROOT, TokenTree

# weight of a step in the running means of a sequence, and of all sequences of a model
NEWER, SLOWER = 0.1, 0.02
# other drafters: how much more than the modules they must promise to draft without them; the least chance of a node
# that is considered; and at how many of the modules' leaves they are asked
CLEARLY, LEAST_CHANCE, SPLICED = 1.02, 0.02, 2
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)  # of chains that are compared
# the log-ratio of measured to expected time is clipped to this
MOST_SURPRISE = log(2.0)
# weight of the initial measurement, in timed plain steps among drafted ones
KNOWN = 3
# prior of the cost of drafting in a batch relative to its passes, as the logarithm of a factor; and the rate at which
# it decays while no sequence drafts, so that drafting is tried again
FIRST_COMPANY, FADING = 0.2, 0.0002


@dataclass(frozen=True, slots=True)
class Company:
    """Batch context: who shares a sequence's passes.

    Attributes:
        sequences: number of sequences in the step, this one included.
        rows: the others' rows in the pass that verifies.
        drafting: number of sequences that draft, this one included.
    """

    sequences: int = 1
    rows: int = 0
    drafting: int = 1


ALONE = Company()


class Speed:
    """Corrects measured times to current ones: by a factor for verifying, and ratios to that factor for the rest."""

    def __init__(self) -> None:
        self._verify = Correction()
        self._ratios = {"plain": Correction(), "draft": Correction(), "beside": Correction(FIRST_COMPANY)}
        self._probes = 0

    def factor(self, kind: str) -> float:
        """Returns the factor of passes with several rows ("verify") or one ("plain"), of drafting ("draft"), or of all
        costs of drafting other than verifying in a batch ("beside")."""
        return self._verify.factor * (self._ratios[kind].factor if kind != "verify" else 1.0)

    def learn(self, kind: str, measured: float, expected: float) -> None:
        """Learns from a measured time and the expected one, which includes the factor."""
        found = surprise(measured, expected, MOST_SURPRISE)
        if kind != "verify":
            self._ratios[kind].follow(found, NEWER if kind == "beside" else SLOWER)
        if kind in ("verify", "plain"):
            self._verify.follow(found, NEWER)

    def learn_probe(self, measured: float, expected: float) -> None:
        """Learns the ratio of plain steps from one among drafted steps, whose own factor is known."""
        self._probes += 1
        weight = max(NEWER, 1.0 / (KNOWN + self._probes))
        self._ratios["plain"].follow(surprise(measured, expected, MOST_SURPRISE), weight)

    def fade(self, kind: str) -> None:
        """Decays a ratio slightly while it cannot be learned."""
        self._ratios[kind].fade(FADING)


class NodePlan:
    """One step of one sequence; see `fixed_plan.TreePlan`. Scores are the nodes' acceptance probabilities.

    Attributes:
        drafts: whether the MTP modules draft.
        given: the tree of other drafters' proposals that is verified if the modules do not draft.
        doubted: whether drafting has to prove that it pays.
        probing: whether the step is plain only in order to time it.
        drafting: time of drafting so far, in plain steps.
        catching_up: the part of it that earlier plain steps have caused.
        plain: seconds of a plain step.
        leads: for each node with children, the lead of the best one and their depth.
        tree: the tree that is verified, once chosen.
    """

    root, mixes, learns = 1.0, False, True

    def __init__(
        self, standing: Standing, memory: SequenceMemory, beside: Company, times: StepTimes, speed: Speed
    ) -> None:  # fmt: skip
        self.standing, self.memory, self.beside, self._times, self._speed = standing, memory, beside, times, speed
        self.drafts = self.probing = False
        self.doubted = memory.pace.doubted
        self._context, pending = standing.context, standing.pending
        self.plain = times.verify(beside.sequences, self._context) * speed.factor(
            "plain" if beside.sequences == 1 else "verify"
        )
        # the time of a pass with this sequence's root and all rows of the others
        self._given = self.plain
        if beside.sequences > 1:
            self._given = times.verify(beside.rows + 1, self._context) * speed.factor("verify")
        several, factor = beside.drafting, self._drafts_share()
        extending = times.extend(several * pending, self._context)
        self._extending = (extending - times.extend(several, self._context)) * factor
        self.catching_up = factor * max(0.0, extending - times.extend(several * MAX_DEPTH, self._context))
        self.drafting, self.leads = 0.0, dict[int, tuple[float, int]]()
        self.tokens, self.seconds = 1.0, self.plain
        self.levels, self.tree, self.given = list[int](), TokenTree(), TokenTree()

    @property
    def limits(self) -> Speculation:
        """The largest tree."""
        assert self.standing.limits is not None
        return self.standing.limits

    @property
    def nodes(self) -> int:
        """Number of nodes that are verified."""
        return len(self.tree)

    def without_modules(self, modules: bool) -> bool:
        """Plans a step without the MTP modules if the other drafters' proposals promise more; returns whether it did.

        They do if their tokens per second are more than the modules' have been, and the modules would add less than
        their own time: they can only be right where the proposals are wrong.

        Args:
            modules: whether the modules could draft.
        """
        memory, given = self.memory, self.standing.given
        modules = modules and not memory.pace.paused
        least = memory.rate if modules else 1.0
        first, row = given[0], self.row(0)
        if first.chances[0] < least * row:
            return False
        trust, sums, chance = memory.other_kept / memory.other_promised, [1.0], 1.0
        for place in range(min(len(first.tokens), self.limits.nodes)):
            chance *= first.chance(place)
            if chance < max(LEAST_CHANCE, least * row / 2):
                break
            sums.append(sums[-1] + trust * chance)
        sizes = [size for size in SIZES if size < len(sums)] + [len(sums) - 1]
        rate, size = max((sums[size] / self._pass(size + 1), size) for size in sizes)
        if not size or rate < CLEARLY * least:
            return False
        missed = 1.0 - trust * sum(one.chances[0] for one in given)
        if modules and missed * memory.worth > memory.rate * (self._level(1) + self._extending):
            return False
        if not memory.others.drafts():
            return False
        chances = list[float]()
        graft(self.tree, chances, ROOT, [first], size)
        if (branch := self._branch(size)) * rate < max((one.chances[0] for one in given[1:]), default=0.0):
            graft(self.tree, chances, ROOT, given[1:], self.limits.nodes, rate * branch)
        self.given, nodes = self.tree, len(self.tree)
        self.tokens = 1.0 + trust * sum(chances)
        self.seconds = self._pass(nodes + 1, nodes > size) * self.plain
        return True

    def graft(self, tree: TokenTree, scores: list[float], propose: Propose) -> None:
        """Adds the other drafters' proposals below the root and below the best drafts at which the modules stopped."""
        memory, limits = self.memory, self.limits
        if memory.others.paused:
            return
        least, most = memory.rate * self.row(0), limits.nodes
        order = sorted(range(len(tree)), key=lambda node: (-scores[node], node))
        leaves = [node for node in order if not tree.children(node) and scores[node] > least][:SPLICED]
        for node in (ROOT, *leaves):
            given = self.standing.given if node == ROOT else propose(tree.path_tokens(node), most - len(tree))
            graft(tree, scores, node, given, most, least / 2)

    def proposed(self, score: float, one: Continuation) -> float:
        """Is not called: proposals join the modules' tree in `graft`."""
        raise NotImplementedError

    def expand(self, scores: Sequence[float], nodes: int) -> list[int]:
        """Returns the leaves whose children are expected to pay."""
        if nodes == 0:
            self.drafting = self._level(1) + self._extending
            self.levels.append(1)
            return [0]
        order = sorted(range(len(scores)), key=lambda leaf: (-scores[leaf], leaf))
        rate, gain, found = self.memory.rate, 0.0, (0.0, 0)
        for count, leaf in enumerate(order, start=1):
            row = self.row(nodes) if count == 1 else self._branch(nodes)
            gain += max(0.0, scores[leaf] * self.memory.best - rate * row)
            found = max(found, (gain - rate * self._level(count), count))
        if found[1]:
            self.drafting += self._level(found[1])
            self.levels.append(found[1])
        return sorted(order[: found[1]])

    def score(self, node: int, score: float, children: Children, depth: int) -> list[float]:
        """Returns the acceptance probabilities of a node's children, without those that cannot pay."""
        memory, lead = self.memory, children.lead()
        best = memory.confidence.chance(lead, depth)
        self.leads[node] = (lead, depth)
        memory.best += NEWER * score * (best - memory.best)
        chances, left = [score * best], score * (1.0 - best)
        least = memory.rate * self._branch(len(self.leads))
        for rank in range(1, children.count):
            share = memory.confidence.share(rank)
            if left * share < least:
                break
            chances.append(left * share)
            left *= 1.0 - share
        return chances

    def choose(self, tree: TokenTree, scores: Sequence[float]) -> list[int]:
        """Returns the nodes worth verifying, and sets the expected tokens and time of the step."""
        kept, self.tokens, time = self._best(tree, scores, self.memory.rate)
        chain = [node for node in range(len(tree)) if not any(tree.ranks[step] for step in tree.path(node))]
        if self.doubted and chain and not kept:  # only a verified draft gives evidence, and the best child gives most
            kept, self.tokens, time = chain[:1], 1.0 + scores[chain[0]], self.drafting + self._pass(2)
        self.seconds, kept = time * self.plain, sorted(kept)
        numbers = {ROOT: ROOT, **{node: number for number, node in enumerate(kept)}}
        self.leads = {numbers[node]: lead for node, lead in self.leads.items() if node in numbers}
        self.tree = tree.part(kept)
        return kept

    def _best(self, tree: TokenTree, chances: Sequence[float], rate: float) -> tuple[list[int], float, float]:
        """Returns the nodes with the largest gain at a rate, and the tokens and time of their step."""
        order = sorted(range(len(tree)), key=lambda node: (-chances[node], node))
        chains = [[node for node in order if not any(tree.ranks[step] for step in tree.path(node))]]
        if any(source != MODULES for source in tree.sources):  # the likeliest path may be another drafter's
            deepest = max(range(len(tree)), key=lambda node: (tree.depths[node], chances[node], -node))
            chains.append(tree.path(deepest))
        found = [self._prefix(nodes, chances, chain, rate) for chain in chains for nodes in (chain, order)]
        return max(found, key=lambda one: one[1] - rate * one[2])

    def _prefix(
        self, nodes: list[int], chances: Sequence[float], chain: Sequence[int], rate: float
    ) -> tuple[list[int], float, float]:
        """Returns the prefix of nodes with the largest gain, and the tokens and time of its step."""
        tokens, found, tree = 1.0, (list[int](), 1.0, 1.0 + self.drafting), False
        for count, node in enumerate(nodes, start=1):
            tree = tree or node not in chain
            tokens += chances[node]
            time = self.drafting + self._pass(count + 1, tree)
            if tokens - rate * time > found[1] - rate * found[2]:
                found = (nodes[:count], tokens, time)
        return found

    def _pass(self, rows: int, tree: bool = False) -> float:
        """Returns the time of a step, without drafting, whose pass has `rows` rows of this sequence."""
        context, beside = self._context, self.beside
        seconds = self._times.verify(beside.rows + rows, context)
        if tree:
            seconds += self._times.tree(rows, context) - self._times.verify(rows, context)
        return 1.0 + beside.sequences * (seconds * self._speed.factor("verify") - self._given) / self.plain

    def _drafts_share(self) -> float:
        """Returns the factor from seconds of joint drafting to this sequence's share of the cost to the batch."""
        factor = self._speed.factor("draft" if self.beside is ALONE else "beside")
        return factor / self.plain * self.beside.sequences / self.beside.drafting

    def _level(self, leaves: int) -> float:
        return self._times.level(self.beside.drafting * leaves, self._context) * self._drafts_share()

    def row(self, nodes: int) -> float:
        """Returns the time of one more row in a chain of nodes."""
        return self._pass(nodes + 2) - self._pass(nodes + 1)

    def _branch(self, nodes: int) -> float:
        """Returns the time of one more row that turns the chain into a tree."""
        return self._pass(nodes + 2, tree=True) - self._pass(nodes + 1)
