"""Batch context for the planner: who shares a pass, and how its time is attributed."""

from __future__ import annotations

from collections.abc import Sequence

from mtp_spec.cpu.state import HostState
from mtp_spec.cpu.untold import Untold
from mtp_spec.planning.node_planner import ALONE, Beside, TextPlanner


def introduce(stepping: Sequence[HostState], alone: bool) -> None:
    """Tells planners who shares the coming step.

    Args:
        stepping: the sequences that take it.
        alone: whether there are no others at all, such as those whose prompts are read meanwhile.
    """
    planners = [state.planner for state in stepping if state.planner is not None]
    if not planners:
        return
    if alone:
        planners[0].beside = ALONE
        return
    texts, rows = len(stepping), sum(state.rows for state in stepping)
    pending = sum(state.drafter.pending for state in stepping if state.drafter is not None)
    hopeless = texts > 1 and not planners[0].planner.pays(texts, _context(stepping), pending)
    drafting = sum(_drafts(state) for state in stepping)
    for state in stepping:
        if state.planner is not None:
            state.planner.beside = Beside(texts, rows - state.rows, max(1, drafting), hopeless)


def foresee(batch: Sequence[HostState], rows: Sequence[int], first: bool) -> float:
    """Returns the seconds of a joint pass through an MTP module, with drawing from it, by what was measured alone.

    Args:
        rows: of each sequence that takes part.
        first: of the step, which takes in the tokens that the step before has committed.
    """
    planner = _planner(batch)
    if planner is None:
        return 0.0
    times, total, context = planner.planner.times, sum(rows), _context(batch)
    if not first:
        return times.level(total, context)
    return times.level(len(rows), context) + times.extend(total, context) - times.extend(len(rows), context)


def learn(verified: Sequence[HostState], verifying: float, drafted: float, others: float, untold: Untold) -> None:
    """Takes the times of a step of several sequences; arguments as `Planner.learn_round`.

    Args:
        untold: takes the times.
    """
    planner = _planner(verified)
    if planner is not None and len(verified) > 1 and verifying > 0:
        rows, context = sum(state.rows for state in verified), _context(verified)
        learn = planner.planner.learn_round
        untold.add((verifying, others), lambda verifying, others: learn(rows, context, verifying, drafted, others))


def _planner(states: Sequence[HostState]) -> TextPlanner | None:
    return next((state.planner for state in states if state.planner is not None), None)


def _drafts(state: HostState) -> bool:
    return state.drafter is not None and (state.planner is None or not state.planner.paused)


def _context(states: Sequence[HostState]) -> int:
    return sum(len(state.tokens) for state in states) // len(states)
