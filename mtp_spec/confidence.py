"""How likely a draft is to be accepted, judged from its lead over the runner-up.

Under coupled sampling the target draws the argmax of its own row plus the same noise. If the draft's best score
leads by a wide margin, a target that differs a little picks the same token; if it leads by little, it is a toss-up.
The lead is in units of noise (logits over temperature), so one scale serves every temperature. Drafts never change
the text, so the estimate may learn while running.
"""

from __future__ import annotations

from bisect import bisect_right
from math import exp

# where one class of leads ends and the next begins
EDGES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.5)
# the chance before anything was seen, as this many observations: sigmoid(OFFSET + SLOPE * lead)
OFFSET, SLOPE, PRIOR_WEIGHT = -0.4, 1.1, 6.0


class Confidence:
    """Acceptance rate by lead, of one sequence."""

    def __init__(self) -> None:
        middles = [(a + b) / 2 for a, b in zip((0.0, *EDGES), (*EDGES, EDGES[-1] + 1.5), strict=True)]
        self._accepted = [PRIOR_WEIGHT / (1 + exp(-OFFSET - SLOPE * lead)) for lead in middles]
        self._tried = [PRIOR_WEIGHT] * len(middles)

    def chance(self, lead: float) -> float:
        """Returns the probability that a draft with this lead is accepted, if its parent is."""
        index = bisect_right(EDGES, lead)
        return self._accepted[index] / self._tried[index]

    def observe(self, lead: float, accepted: bool) -> None:
        """Counts a draft whose parent was accepted."""
        index = bisect_right(EDGES, lead)
        self._accepted[index] += accepted
        self._tried[index] += 1
