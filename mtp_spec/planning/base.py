"""The interface of every planner: two calls for each step.

`Planner.plan` decides what the sequences of a batch draft in their next step, `Planner.learn` learns from its outcome.
There are three planners: fixed trees (`fixed_plan`); trees grown node by node while they are drafted, on a CPU
(`node_planner`); and a choice among captured shapes, on a GPU (`shape_planner`). No plan changes the generated text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

Batch = TypeVar("Batch", contravariant=True)
Plan = TypeVar("Plan")


@dataclass(frozen=True, slots=True)
class Seconds:
    """Times of a step.

    Attributes:
        step: the whole step.
        drafting: from its beginning to the end of drafting; 0 if the parts of the step are not timed.
        verifying: the pass that verifies; 0 likewise.
    """

    step: float
    drafting: float = 0.0
    verifying: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a step.

    Attributes:
        paths: for each sequence the accepted nodes, depth 1 first; None if it ended, which cuts the path short.
        seconds: None if the step was not timed or included other work.
    """

    paths: Sequence[Sequence[int] | None]
    seconds: Seconds | None = None


class Planner(Protocol[Batch, Plan]):
    """Plans the steps of a batch of sequences.

    A step may be planned before the outcomes of earlier ones are known.
    """

    def plan(self, batch: Batch, /) -> Plan:
        """Returns what the next step of a batch drafts."""
        ...

    def learn(self, plan: Plan, outcome: Outcome, /) -> None:
        """Learns from the outcome of a planned step."""
        ...
