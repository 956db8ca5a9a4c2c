"""Plans trees node by node: what "auto" and `Speculation(adaptive=True)` do on a CPU.

Trees grow while they are drafted (`node_plan`), guided by the drafts' estimated acceptance (`confidence`) and the times
of passes on this machine (`costs`). The governor decides whether a step drafts at all (`governor`). Tokens and times of
steps are learned here, for each sequence and for all sequences of a model. Nothing here changes the generated text.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from mtp_spec.planning.base import Outcome, Seconds
from mtp_spec.planning.confidence import Confidence, Judged
from mtp_spec.planning.costs import StepTimes
from mtp_spec.planning.fixed_plan import FixedPlan, Standing, TreeBatch, TreePlan
from mtp_spec.planning.governor import Pace
from mtp_spec.planning.node_plan import ALONE, NEWER, SLOWER, Company, NodePlan, Speed
from mtp_spec.planning.sequence_memory import SequenceMemory
from mtp_spec.speculation import MAX_DEPTH
from mtp_spec.tree import MODULES, ROOT

# priors: tokens in the time of a plain step, the probability of the best child, and what drafts gain before the time of
# drafting, in tokens
FIRST_RATE, FIRST_CHANCE, FIRST_WORTH = 1.3, 0.7, 0.6
# in a batch: how much faster than plain decoding drafting must seem, as times are extrapolated from fewer rows; the
# deepest chain considered for that; and the steps within which catching up must pay off
CLEAR_GAIN, TRIED_DEPTH, SOON = 1.05, 4, 32
# While drafting is paused, one plain step in LOOKED is timed. Otherwise one step in PROBED, times the fourth power of
# the rate, is made plain in order to time it, the first one after FIRST_PROBE steps.
LOOKED, PROBED, FIRST_PROBE = 16, 16, 3


class NodePlanner:
    """Plans for all sequences of a loaded model and learns from them; see `base.Planner`.

    Args:
        times: measured times of the passes on this machine.
    Attributes:
        rate: tokens that drafted steps yield in the time of a plain step.
        debt: what drafting had lost to plain decoding after the last drafted step.
        saved: what has been saved for tries while drafting is paused.
        unseen: drafted steps since a plain step was timed.
        best: running mean of the best child's probability.
        worth: running mean of what the MTP modules' drafts gain before the time of drafting.
    """

    def __init__(self, times: StepTimes) -> None:
        self.times, self.speed, self.confidence = times, Speed(), Confidence()
        self.rate, self.debt, self.saved, self.best = FIRST_RATE, 0.0, inf, FIRST_CHANCE
        self.worth = FIRST_WORTH
        self.unseen = round(PROBED * FIRST_RATE**4) - FIRST_PROBE

    def begin(self) -> SequenceMemory:
        """Returns the initial memory of a new sequence."""
        # savings for tries are shared by all sequences: a short one could not pay for a try of its own
        pace, plain = Pace(self.debt, saved=self.saved), self.times.verify(1, 0) * self.speed.factor("plain")
        return SequenceMemory(pace, self.confidence.for_sequence(), self.rate, self.best, plain, self.worth)

    # what to draft

    def plan(self, batch: TreeBatch) -> list[TreePlan]:
        """Returns a plan for each sequence."""
        sequences = batch.sequences
        if batch.alone:  # each step of a single text: what this takes is lost while drafting does not pay
            return [self._one(one, ALONE, False) for one in sequences]
        count, rows = len(sequences), sum(one.rows for one in sequences)
        hopeless = count > 1 and not self._pays(sequences)
        drafting = sum(one.limits is not None and (one.memory is None or not one.memory.pace.paused)
                       for one in sequences)  # fmt: skip
        return [self._one(one, Company(count, rows - one.rows, max(1, drafting)), hopeless) for one in sequences]

    def _one(self, one: Standing, beside: Company, hopeless: bool) -> TreePlan:
        if one.planned is not None:
            return one.planned
        if one.memory is None:
            return FixedPlan(one, one.may_draft)
        if not one.may_draft or ((hopeless or not one.modules) and not one.given):
            return FixedPlan(one, False, one.memory.plain)
        return self._plan(one, one.memory, beside, one.modules and not hopeless)

    def _pays(self, sequences: Sequence[Standing]) -> bool:
        """Returns whether a batch gains if every sequence drafts the best chain, at the mean probability so far."""
        times, best, count, context = self.times, self.best, len(sequences), _context(sequences)
        pending = sum(one.pending for one in sequences if one.limits is not None)
        verify, draft = self.speed.factor("verify"), self.speed.factor("beside")
        plain = times.verify(count, context) * verify
        tokens, drafting = 1.0, 0.0
        if pending > count * MAX_DEPTH:  # after plain steps the modules must catch up, which has to pay off soon
            drafting = draft * times.extend(pending, context) / SOON
        for depth in range(1, TRIED_DEPTH + 1):
            tokens += best**depth
            drafting += times.level(count, context) * draft
            extra = times.extend(round(count * tokens), context) - times.extend(count, context)
            time = drafting + extra * draft + times.verify(count * (depth + 1), context) * verify
            if tokens * plain > CLEAR_GAIN * time:
                return True
        return False

    def _plan(self, one: Standing, memory: SequenceMemory, beside: Company, modules: bool) -> TreePlan:
        """Returns the plan of one sequence's step; a `FixedPlan` if nothing is to be learned from it."""
        pace = memory.pace
        memory.steps += 1
        plan = NodePlan(one, memory, beside, self.times, self.speed) if one.given else None
        if plan is not None and plan.without_modules(modules):
            memory.plain = plan.plain
            return plan
        if not modules:
            return FixedPlan(one, False, memory.plain)
        idle = memory.steps % LOOKED > 0 and pace.saving()
        self.saved = pace.saved
        if idle:
            return FixedPlan(one, False, memory.plain)
        plan = plan or NodePlan(one, memory, beside, self.times, self.speed)
        memory.plain = plan.plain
        if pace.paused:
            memory.rate = 1.0  # the alternative use of the time is plain decoding
        drafts = pace.drafts(plan.catching_up)
        self.saved = pace.saved
        plan.probing = drafts and self._probes(plan)
        plan.drafts = drafts and not plan.probing
        return plan

    def _probes(self, plan: NodePlan) -> bool:
        """Returns whether a step is made plain in order to time it, although drafting seems to pay.

        Otherwise plain steps that were once measured as slow would be thought slow forever.
        """
        if plan.beside is not ALONE or plan.memory.pace.paused:
            return False
        self.unseen += 1
        if self.unseen < PROBED * plan.memory.rate**4:
            return False
        self.unseen = 0
        return True

    # learning

    def learn(self, plan: Sequence[TreePlan], outcome: Outcome) -> None:
        """Learns from the outcome of a step with these plans."""
        seconds = outcome.seconds
        for one, path in zip(plan, outcome.paths, strict=True):
            if isinstance(one, NodePlan) and path is not None:
                self._learn_sequence(one, path, seconds if one.beside is ALONE else None)
        if len(plan) > 1 and seconds is not None and seconds.verifying > 0:
            self._learn_times(plan, seconds)

    def _learn_sequence(self, plan: NodePlan, path: Sequence[int], seconds: Seconds | None) -> None:
        """Learns from one sequence's outcome; `seconds` are given if it ran alone."""
        if plan.levels:
            if seconds is not None:
                self.speed.learn("draft", seconds.drafting, plan.drafting * plan.plain)
            self._judge(plan, path)
        elif len(plan.given):
            self._judge_others(plan, path)
        if seconds is None:
            return
        rest, expected = seconds.step - seconds.drafting, plan.seconds - plan.drafting * plan.plain
        if plan.probing:
            self.speed.learn_probe(rest, expected)
        else:
            self.speed.learn("verify" if plan.nodes else "plain", rest, expected)

    def _judge(self, plan: NodePlan, path: Sequence[int]) -> None:
        """Learns acceptance probabilities, and whether drafting pays."""
        memory, tree, judged = plan.memory, plan.tree, list[Judged]()
        for node in (ROOT, *path):
            children = [child for child in tree.children(node) if tree.sources[child] == MODULES]
            if children and node in plan.leads:
                ranks = [tree.ranks[child] for child in children if child in path]
                judged.append(Judged(*plan.leads[node], len(children), ranks[0] if ranks else None))
        memory.confidence.learn(judged)
        self.confidence.learn(judged)
        if any(source != MODULES for source in tree.sources):  # says nothing of what the modules gain alone
            return
        time, promised = plan.seconds / plan.plain, plan.tokens - 1.0
        memory.promised += promised - NEWER * memory.promised
        memory.kept += len(path) - NEWER * memory.kept
        tokens = 1.0 + promised * memory.kept / memory.promised
        # actual tokens are noisier than expected ones, but they count while the expectations are in doubt
        memory.pace.record((1.0 + len(path) if plan.doubted else tokens) - (time - plan.catching_up))
        self.debt = memory.pace.debt
        rate = max(1.0, tokens / time)
        memory.rate, self.rate = _mean(memory.rate, rate, NEWER), _mean(self.rate, rate, SLOWER)
        self.best = _mean(self.best, memory.best, SLOWER)
        worth = tokens - 1.0 - rate * (time - 1.0 - plan.drafting)
        memory.worth, self.worth = _mean(memory.worth, worth, NEWER), _mean(self.worth, worth, SLOWER)

    def _judge_others(self, plan: NodePlan, path: Sequence[int]) -> None:
        """Learns whether the other drafters' proposals are worth the time that verifying them takes."""
        memory, trust = plan.memory, plan.memory.other_kept / plan.memory.other_promised
        promised = (plan.tokens - 1.0) / trust
        memory.other_promised += promised - NEWER * memory.other_promised
        memory.other_kept += len(path) - NEWER * memory.other_kept
        trust = memory.other_kept / memory.other_promised
        memory.others.record(1.0 + promised * trust - plan.seconds / plan.plain)

    def _learn_times(self, plans: Sequence[TreePlan], seconds: Seconds) -> None:
        """Learns from the times of a batch's step."""
        context, times = _context([plan.standing for plan in plans]), self.times
        rows, verify = sum(plan.nodes + 1 for plan in plans), self.speed.factor("verify")
        self.speed.learn("verify", seconds.verifying, times.verify(rows, context) * verify)
        drafting = [plan for plan in plans if plan.levels]
        if not drafting:
            self.speed.fade("beside")
            return
        pending, depth = sum(plan.standing.pending for plan in drafting), max(len(plan.levels) for plan in drafting)
        expected = times.extend(pending, context) - times.extend(len(drafting), context)
        for level in range(depth):
            leaves = sum(plan.levels[level] for plan in drafting if level < len(plan.levels))
            expected += times.level(leaves, context)
        self.speed.learn("beside", seconds.step - seconds.verifying, expected * self.speed.factor("beside"))


def _context(sequences: Sequence[Standing]) -> int:
    return sum(one.context for one in sequences) // len(sequences)


def _mean(old: float, new: float, weight: float) -> float:
    return old + weight * (new - old)
