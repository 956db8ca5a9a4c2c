"""What a planner has learned from the steps of one sequence."""

from __future__ import annotations

from mtp_spec.planning.confidence import Confidence
from mtp_spec.planning.governor import Pace

# prior weight, in accepted tokens, of the assumption that the estimated probabilities are right
TRUSTED = 3.0


class SequenceMemory:
    """Starts from what earlier sequences of the model have taught.

    Args:
        rate: tokens that drafted steps yield in the time of a plain step.
        best: running mean of the best child's probability.
        plain: seconds of a plain step.
    Attributes:
        steps: number of steps planned so far.
        promised: running sum of the expected accepted tokens.
        kept: running sum of the accepted tokens.
        worth: running mean of what the MTP modules' drafts gain, before the time of drafting, in tokens.
        others: whether the other drafters' proposals pay.
        other_promised, other_kept: the same sums for steps without the modules.
    """

    def __init__(
        self, pace: Pace, confidence: Confidence, rate: float, best: float, plain: float, worth: float
    ) -> None:  # fmt: skip
        self.pace, self.confidence, self.rate, self.best, self.plain = pace, confidence, rate, best, plain
        self.promised = self.kept = self.other_promised = self.other_kept = TRUSTED
        self.worth, self.others = worth, Pace()
        self.steps = 0
