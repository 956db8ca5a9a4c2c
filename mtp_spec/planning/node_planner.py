"""Which tree to draft and verify, node by node: what "auto" and `Speculation(adaptive=True)` do on a CPU.

A step gains the tokens it commits and costs the time of its passes. Tokens per second are most when whatever brings
more tokens than its time would bring elsewhere is done, and nothing else: a node v belongs to the tree if
value(v) > rate * dT(v), with value(v) the probability that it is accepted (the product of the chances along its path),
dT(v) the time it adds, and rate the tokens per second of such steps (as EVICT, 2605.00342, and DSpark's scheduler,
2607.05147, choose). Times are those measured on this machine (`times`), chances those of `confidence`. A pass's time
does not grow evenly with its rows, so all prefixes of the nodes in order of value are compared.

The unit of time is a plain step at the same context. Nothing here ever changes the text.

Beside other texts a plain step is a pass of one row each. What a text adds to it delays all of them, so it has to bring
as much as that time would bring to all: with more texts, nodes join less and less, and in the end none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, log

from mtp_spec.planning.confidence import Confidence, Outcome
from mtp_spec.planning.costs import StepTimes
from mtp_spec.planning.governor import Pace
from mtp_spec.speculation import MAX_DEPTH
from mtp_spec.tree import ROOT, TokenTree

# before anything was seen: tokens in the time of a plain step, and the chance of a best child
FIRST_RATE, FIRST_CHANCE = 1.3, 0.7
# weight of a step in the running means of a text, and of a model's texts
NEWER, SLOWER = 0.1, 0.02
# accepted tokens that the promise of the chances counts for before a text has shown whether it is kept
TRUSTED = 3.0
# a time is taken to be at most this far from the expected one: a neighbour's burst is no news
MOST_SURPRISE = log(2.0)
# beside others drafting must promise so much more than plain decoding, as their times are guessed from fewer rows;
# chains that are tried for that; and in how many steps
CLEAR_GAIN, TRIED_DEPTH, SOON = 1.05, 4, 32
# while drafting is paused the time of one plain step in so many is looked at; while it is not, one step in so many,
# times the fourth power of the rate, is plain to be looked at, the first soon; and for how many measurements what was
# measured before counts
LOOKED, PROBED, FIRST_PROBE, KNOWN = 16, 16, 3, 3
# what drafting costs several texts beyond its passes, as the logarithm of a factor, before anything was seen; so slowly
# it is forgotten while none drafts, for it to be tried again
FIRST_BESIDE, FADING = 0.2, 0.0002


@dataclass(frozen=True, slots=True)
class Beside:
    """Who shares a text's passes.

    Attributes:
        texts: that take a step now, this one included.
        rows: of the others in the pass that verifies.
        drafting: of the texts, this one included, those that draft.
        hopeless: whether drafting would lose whatever the text.
    """

    texts: int = 1
    rows: int = 0
    drafting: int = 1
    hopeless: bool = False


ALONE = Beside()


class Speed:
    """How the times of now differ from those measured before: a factor for verifying, ratios to it for the others."""

    def __init__(self) -> None:
        self._logs = {"verify": 0.0, "plain": 0.0, "draft": 0.0, "beside": FIRST_BESIDE}
        self._probes = 0

    def factor(self, kind: str) -> float:
        """Returns the factor of passes of several rows ("verify"), of one ("plain"), of drafting ("draft"), or of
        everything that drafting costs besides verifying where several texts do ("beside")."""
        return exp(self._logs["verify"] + (self._logs[kind] if kind != "verify" else 0.0))

    def learn(self, kind: str, measured: float, expected: float) -> None:
        """Takes a time beside the expected one, which includes the factor."""
        surprise = max(-MOST_SURPRISE, min(MOST_SURPRISE, log(measured / expected)))
        if kind != "verify":
            self._logs[kind] += (NEWER if kind == "beside" else SLOWER) * surprise
        if kind in ("verify", "plain"):
            self._logs["verify"] += NEWER * surprise

    def learn_probe(self, measured: float, expected: float) -> None:
        """Takes the time of a plain step among drafted ones: how it differs from theirs, which are known."""
        self._probes += 1
        surprise = max(-MOST_SURPRISE, min(MOST_SURPRISE, log(measured / expected)))
        self._logs["plain"] += max(NEWER, 1.0 / (KNOWN + self._probes)) * surprise

    def fade(self, kind: str) -> None:
        """Forgets a little of a ratio that cannot be learned now."""
        self._logs[kind] *= 1.0 - FADING


class Planner:
    """What the texts of a loaded model have taught.

    Args:
        times: of the passes on this machine.
    Attributes:
        rate: tokens in the time of a plain step, of drafted steps.
        debt: what drafting lost to plain decoding at the end of the last text.
        saved: what was saved for tries since drafting is paused.
        unseen: drafted steps since a plain step was looked at.
        best: the chance of a best child.
    """

    def __init__(self, times: StepTimes) -> None:
        self.times, self.speed, self.confidence = times, Speed(), Confidence()
        self.rate, self.debt, self.saved, self.best = FIRST_RATE, 0.0, inf, FIRST_CHANCE
        self.unseen = round(PROBED * FIRST_RATE**4) - FIRST_PROBE

    def pays(self, texts: int, context: int, pending: int) -> bool:
        """Returns whether so many texts would gain if each drafted the best chain, with chances as they were so far.

        Args:
            pending: tokens of all of them that the MTP module has not seen.
        """
        times, best = self.times, self.best
        verify, draft = self.speed.factor("verify"), self.speed.factor("beside")
        plain = times.verify(texts, context) * verify
        tokens, drafting = 1.0, 0.0
        if pending > texts * MAX_DEPTH:  # after plain steps: catching up has to pay soon
            drafting = draft * times.extend(pending, context) / SOON
        for depth in range(1, TRIED_DEPTH + 1):
            tokens += best**depth
            drafting += times.level(texts, context) * draft
            extra = times.extend(round(texts * tokens), context) - times.extend(texts, context)
            time = drafting + extra * draft + times.verify(texts * (depth + 1), context) * verify
            if tokens * plain > CLEAR_GAIN * time:
                return True
        return False

    def learn_round(self, rows: int, context: int, verifying: float, drafted: float, others: float) -> None:
        """Takes the times of a step of several texts.

        Args:
            rows: that were verified.
            verifying: seconds of that.
            drafted: seconds that drafting should have taken by what was measured alone.
            others: those of all the rest.
        """
        expected = self.times.verify(rows, context) * self.speed.factor("verify")
        self.speed.learn("verify", verifying, expected)
        if drafted:
            self.speed.learn("beside", others, drafted * self.speed.factor("beside"))
        else:
            self.speed.fade("beside")


class TextPlanner:
    """Plans the steps of one text; call its methods in the order of a step.

    Attributes:
        tokens, seconds: expected of the step.
        beside: who shares the step's passes.
    """

    def __init__(self, planner: Planner) -> None:
        self.beside = ALONE
        self.planner, self._times, self._speed = planner, planner.times, planner.speed
        # what texts save for tries is theirs together: short ones could not pay for one each
        self._pace, self._confidence = Pace(planner.debt, saved=planner.saved), planner.confidence.for_text()
        self._rate, self._best = planner.rate, planner.best
        self._promised = self._kept = TRUSTED
        self.tokens, self.seconds, self._doubted = 1.0, 0.0, False
        self._steps, self._idle, self._probing = 0, False, False
        self._start(0, 1)

    @property
    def paused(self) -> bool:
        """Whether steps are plain now, but for tries."""
        return self._pace.paused

    def drafts(self, context: int, pending: int) -> bool:
        """Returns whether the next step should draft.

        Args:
            context: committed tokens.
            pending: those of them that the MTP module has not seen.
        """
        if self.beside.hopeless:
            return False
        self._steps += 1
        self._idle = self._steps % LOOKED > 0 and self._pace.saving()
        self.planner.saved = self._pace.saved
        if self._idle:
            self._drafting, self.tokens, self.seconds = 0.0, 1.0, self._plain
            return False
        self._start(context, pending)
        self._doubted = self._pace.doubted
        if self._pace.paused:
            self._rate = 1.0  # what the time would bring elsewhere is plain decoding
        drafts = self._pace.drafts(self._catching_up)
        self.planner.saved = self._pace.saved
        self._probing = drafts and self._probes()
        return drafts and not self._probing

    def _probes(self) -> bool:
        """Returns whether this step is plain so that its time is seen, though drafting is thought to pay.

        Otherwise a plain step that seemed slow once would seem so for good.
        """
        if self.beside is not ALONE or self._pace.paused:
            return False
        self.planner.unseen += 1
        if self.planner.unseen < PROBED * self._rate**4:
            return False
        self.planner.unseen = 0
        return True

    def _start(self, context: int, pending: int) -> None:
        self._context, beside = context, self.beside
        self._plain = self._times.verify(beside.texts, context) * self._speed.factor(
            "plain" if beside.texts == 1 else "verify"
        )
        # its own row and the others' are there in any case
        self._given = self._plain
        if beside.texts > 1:
            self._given = self._times.verify(beside.rows + 1, context) * self._speed.factor("verify")
        several, extend = beside.drafting, self._times.extend
        factor = self._drafts_share()
        self._extending = (extend(several * pending, context) - extend(several, context)) * factor
        self._catching_up = factor * max(0.0, extend(several * pending, context) - extend(several * MAX_DEPTH, context))
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
            chance: of the node.
            lead: of its best child over the next.
            depth: of the children.
            width: most of them.
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
        if self._doubted and chain and not kept:  # only a verified draft tells, and the best child tells most
            kept, self.tokens, time = chain[:1], 1.0 + chances[chain[0]], self._drafting + self._pass(2)
        self.seconds = time * self._plain
        numbers = {ROOT: ROOT, **{node: number for number, node in enumerate(sorted(kept))}}
        self._leads = {numbers[node]: lead for node, lead in self._leads.items() if node in numbers}
        return sorted(kept)

    def _prefix(
        self, nodes: list[int], chances: Sequence[float], chain: Sequence[int]
    ) -> tuple[list[int], float, float]:
        """Returns the first so many nodes that gain most, with tokens and time of their step."""
        tokens, found, tree = 1.0, (list[int](), 1.0, 1.0 + self._drafting), False
        for count, node in enumerate(nodes, start=1):
            tree = tree or node not in chain
            tokens += chances[node]
            time = self._drafting + self._pass(count + 1, tree)
            if tokens - self._rate * time > found[1] - self._rate * found[2]:
                found = (nodes[:count], tokens, time)
        return found

    def learn(self, tree: TokenTree, accepted: Sequence[int], drafting: float, rest: float) -> None:
        """Takes what was accepted of the verified tree, and the seconds of drafting it and of the rest of the step."""
        if self.beside.hopeless or self._idle:
            return
        if self._drafting:
            if self.beside is ALONE:
                self._speed.learn("draft", drafting, self._drafting * self._plain)
            self._judge(tree, accepted)
        if self.beside is not ALONE:  # the times are those of all: `Planner.learn_round`
            return
        expected = self.seconds - self._drafting * self._plain
        if self._probing:
            self._speed.learn_probe(rest, expected)
        else:
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

    def _pass(self, rows: int, tree: bool = False) -> float:
        """Returns the time of a step whose pass has so many rows of this text."""
        context, beside = self._context, self.beside
        seconds = self._times.verify(beside.rows + rows, context)
        if tree:
            seconds += self._times.tree(rows, context) - self._times.verify(rows, context)
        return 1.0 + beside.texts * (seconds * self._speed.factor("verify") - self._given) / self._plain

    def _drafts_share(self) -> float:
        """Returns the factor from seconds of joint drafting to this text's part of what it costs all."""
        factor = self._speed.factor("draft" if self.beside is ALONE else "beside")
        return factor / self._plain * self.beside.texts / self.beside.drafting

    def _level(self, leaves: int) -> float:
        return self._times.level(self.beside.drafting * leaves, self._context) * self._drafts_share()

    def _row(self, nodes: int) -> float:
        """Returns the time of one more row beside a chain of nodes."""
        return self._pass(nodes + 2) - self._pass(nodes + 1)

    def _branch(self, nodes: int) -> float:
        """Returns the time of one more row that makes the chain a tree."""
        return self._pass(nodes + 2, tree=True) - self._pass(nodes + 1)


def _mean(old: float, new: float, weight: float) -> float:
    return old + weight * (new - old)
