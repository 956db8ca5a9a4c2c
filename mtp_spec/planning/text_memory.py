"""What the steps of one text have taught its planner so far."""

from __future__ import annotations

from mtp_spec.planning.confidence import Confidence
from mtp_spec.planning.governor import Pace

# accepted tokens that the promise of the chances counts for before a text has shown whether it is kept
TRUSTED = 3.0


class TextMemory:
    """Begins where earlier texts of the model left off.

    Args:
        rate: tokens in the time of a plain step, of drafted steps.
        best: the chance of a best child.
        plain: seconds of a plain step.
    Attributes:
        steps: planned so far.
        promised, kept: running sums of accepted tokens, expected and found.
    """

    def __init__(self, pace: Pace, confidence: Confidence, rate: float, best: float, plain: float) -> None:
        self.pace, self.confidence, self.rate, self.best, self.plain = pace, confidence, rate, best, plain
        self.promised = self.kept = TRUSTED
        self.steps = 0
