"""What planners of texts side by side are told of one another, and what they learn from a pass that all shared."""

from __future__ import annotations

from collections.abc import Sequence

from mtp_spec.cpu.engine import Decoder
from mtp_spec.model.distributed.group import ALONE as NO_OTHERS
from mtp_spec.model.distributed.group import Ranks
from mtp_spec.planning.node_planner import ALONE, Beside


def introduce(stepping: Sequence[tuple[Decoder, int]], alone: bool) -> None:
    """Tells planners who shares the coming step.

    Args:
        stepping: the texts that take it, and how many rows each had in the last one.
        alone: whether there are no other texts at all, such as those whose prompts are read meanwhile.
    """
    planners = [decoder.planner for decoder, _ in stepping if decoder.planner is not None]
    if not planners:
        return
    if alone:
        planners[0].beside = ALONE
        return
    texts, rows = len(stepping), sum(count for _, count in stepping)
    pending = sum(decoder.drafter.pending for decoder, _ in stepping if decoder.drafter is not None)
    hopeless = texts > 1 and not planners[0].planner.pays(texts, _context(stepping), pending)
    drafting = sum(_drafts(decoder) for decoder, _ in stepping)
    for decoder, own in stepping:
        if decoder.planner is not None:
            decoder.planner.beside = Beside(texts, rows - own, max(1, drafting), hopeless)


def foresee(drafting: Sequence[tuple[Decoder, int]], first: bool) -> float:
    """Returns the seconds of a joint pass through an MTP module, with drawing from it, by what was measured alone.

    Args:
        drafting: the texts and their rows.
        first: of the step, which takes in the tokens that the step before has committed.
    """
    planner = next((decoder.planner for decoder, _ in drafting if decoder.planner is not None), None)
    if planner is None:
        return 0.0
    times, rows, context = planner.planner.times, sum(count for _, count in drafting), _context(drafting)
    if not first:
        return times.level(rows, context)
    return times.level(len(drafting), context) + times.extend(rows, context) - times.extend(len(drafting), context)


def learn(
    verified: Sequence[tuple[Decoder, int]], verifying: float, drafted: float, others: float, ranks: Ranks = NO_OTHERS
) -> None:
    """Takes the times of a step of several texts, with so many rows each; arguments as `Planner.learn_round`.

    Args:
        ranks: of which the first one's times count.
    """
    planners = [decoder.planner for decoder, _ in verified if decoder.planner is not None]
    if planners and len(verified) > 1 and verifying > 0:
        rows, context = sum(rows for _, rows in verified), _context(verified)
        verifying, others = ranks.first((verifying, others))
        planners[0].planner.learn_round(rows, context, verifying, drafted, others)


def _drafts(decoder: Decoder) -> bool:
    return decoder.drafter is not None and (decoder.planner is None or not decoder.planner.paused)


def _context(texts: Sequence[tuple[Decoder, int]]) -> int:
    return sum(len(decoder.tokens) for decoder, _ in texts) // len(texts)
