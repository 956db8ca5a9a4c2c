"""What every planner offers: two calls a step.

`Planner.plan` says what the sequences of a batch draft in their next step, `Planner.learn` takes what came of it. There
are three: fixed trees (`fixed_plan`); trees grown node by node while they are drafted, on a CPU (`node_planner`); and a
choice among captured shapes, on a GPU (`shape_planner`). Whatever is planned, the text is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

Batch = TypeVar("Batch", contravariant=True)
Plan = TypeVar("Plan")


@dataclass(frozen=True, slots=True)
class Seconds:
    """What a step took.

    Attributes:
        step: all of it.
        drafting: from its beginning to the end of drafting.
        verifying: in the pass that verifies; both are parts of it, and 0 where the step is one piece.
    """

    step: float
    drafting: float = 0.0
    verifying: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a step.

    Attributes:
        paths: of each sequence the accepted nodes, depth 1 first; None where its text ended, as that cuts paths short.
        seconds: None where the step was not measured, or held other work too.
    """

    paths: Sequence[Sequence[int] | None]
    seconds: Seconds | None = None


class Planner(Protocol[Batch, Plan]):
    """Plans the steps of sequences that take them together.

    Steps may be planned before the outcomes of those before are known.
    """

    def plan(self, batch: Batch, /) -> Plan:
        """Returns what the next step of a batch drafts."""
        ...

    def learn(self, plan: Plan, outcome: Outcome, /) -> None:
        """Takes what came of a planned step."""
        ...
