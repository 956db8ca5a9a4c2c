"""The step on a CPU: a batch drafts, verifies, accepts and commits together, along with the prefill of other sequences.

The sequences that draft share the modules' passes, level by level. One pass verifies all trees; it also includes the
next prefill chunks, whose rows then cost less than in a pass of their own. A sequence's text is the same as if it ran
alone: its rows have the same bits (`cpu.passes`), and everything else is computed for each sequence separately.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial
from time import perf_counter

from mtp_spec.acceptance.accept import Accepted
from mtp_spec.cpu.passes import Failed, MainRows, Passes
from mtp_spec.cpu.pending_times import PendingTimes
from mtp_spec.cpu.state import HostState
from mtp_spec.planning.base import Outcome, Planner, Seconds
from mtp_spec.planning.fixed_plan import TreeBatch, TreePlan
from mtp_spec.sequence import Sequence
from mtp_spec.tree import TokenTree

TreePlanner = Planner[TreeBatch, Seq[TreePlan]]


class HostStep:
    """One step, see `mtp_spec.step`.

    Args:
        batch: the sequences that take the step, each with its plan.
        reading: the sequences in prefill that join its pass.
        planner: the one that made the plans.
        pending: takes the times that the planner learns.
    """

    def __init__(
        self,
        passes: Passes,
        batch: list[HostState],
        reading: list[HostState],
        planner: TreePlanner,
        pending: PendingTimes,
    ) -> None:
        self._passes, self._batch, self._reading, self._pending = passes, batch, reading, pending
        self._planner, self._alone = planner, len(batch) == 1 and not reading
        self._timed = not reading and any(state.memory is not None for state in batch)
        self._start = self._drafted = perf_counter()
        self._verifying = 0.0
        self._changed = list[Sequence]()

    def draft(self) -> list[TokenTree]:
        """Returns a tree for each sequence; sequences that fail leave the step."""
        trees, batch = list[TokenTree](), list[HostState]()
        works = [state.draft() for state in self._batch]
        drafted = self._passes.together(works, lambda number, error: self._fail(self._batch[number], error))
        for state, tree in zip(self._batch, drafted, strict=True):
            if not isinstance(tree, Failed):
                trees.append(tree)
                batch.append(state)
        self._batch, self._drafted = batch, perf_counter()
        return trees

    def verify(self, trees: list[TokenTree]) -> list[MainRows]:
        """Returns the passes with their results."""
        verified = [state.verify(tree) for state, tree in zip(self._batch, trees, strict=True)]
        start = perf_counter()
        self._passes.run([*verified, *(state.wanted for state in self._reading if state.wanted is not None)])
        self._verifying = perf_counter() - start
        for state in self._batch:
            state.stats.add_seconds("verify", self._verifying)
        return verified

    def accept(self, trees: list[TokenTree], rows: list[MainRows]) -> list[tuple[TokenTree, MainRows, Accepted | None]]:
        """Returns what is accepted of each tree; None for a sequence that failed."""
        verdicts = []
        for state, tree, verified in zip(self._batch, trees, rows, strict=True):
            accepted = self._own(state, partial(state.accept, tree, verified.hidden, verified.logits))
            verdicts.append((tree, verified, accepted))
        return verdicts

    def commit(self, verdicts: list[tuple[TokenTree, MainRows, Accepted | None]]) -> list[Sequence]:
        """Returns the sequences that have new tokens or have failed."""
        plans, paths = list[TreePlan](), list[Seq[int] | None]()
        for state, (tree, verified, accepted) in zip(self._batch, verdicts, strict=True):
            if state.plan is not None:
                plans.append(state.plan)
                paths.append(None if accepted is None or accepted.stopped else accepted.nodes)
            if accepted is None:
                continue
            state.commit_step(tree, verified.hidden, accepted)
            if self._alone and state.plan is not None and state.memory is not None:
                expected = state.plan.tokens, state.plan.seconds
                state.stats.record_plan(*expected, len(accepted.drawn), perf_counter() - self._start)
            state.plan = None
            state.take(accepted)
            self._changed.append(state.sequence)
        self._read_on()
        if len(plans) == 1 and not plans[0].learns:
            return self._changed
        if self._timed:
            taken = (perf_counter() - self._start, self._drafted - self._start, self._verifying)
            self._pending.add(taken, partial(_learn, self._planner, plans, paths))
        else:
            self._planner.learn(plans, Outcome(paths))
        return self._changed

    def _read_on(self) -> None:
        for state in self._reading:
            first = self._own(state, state.go_on)
            if first is not None:
                state.take(first)
                self._changed.append(state.sequence)

    def _own(self, state: HostState, work: Callable[[], Accepted | None]) -> Accepted | None:
        """Returns the result of one sequence's work; None if it fails, which does not affect the others."""
        try:
            return work()
        except Exception as error:
            self._fail(state, error)
            return None

    def _fail(self, state: HostState, error: Exception) -> None:
        state.sequence.fail(error)
        self._changed.append(state.sequence)


def _learn(planner: TreePlanner, plans: list[TreePlan], paths: list[Seq[int] | None], *seconds: float) -> None:
    planner.learn(plans, Outcome(paths, Seconds(*seconds)))
