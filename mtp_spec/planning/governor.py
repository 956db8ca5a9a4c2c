"""Whether drafting pays right now, so that "auto" is never slower than plain decoding for long.

Every drafted step gains or loses time against plain decoding. The balance of losses is a debt; once it reaches the time
of one plain step, drafting pauses and steps are plain, which costs nothing. Now and then a step drafts nevertheless,
because only that shows when the text has become easier. Such tries may cost a fixed share of the time, so they are
frequent if they lose little and rare if they lose much. Whether a step drafts never changes the generated text.
"""

from __future__ import annotations

from math import inf

# in units of a plain step: the debts at which drafting is doubted and at which it pauses; the share of plain time that
# tries may cost; the least price of a try
DOUBTED_DEBT, MOST_DEBT, ALLOWED, LEAST_PRICE = 0.25, 1.0, 0.004, 0.05


class Pace:
    """Decides for one sequence, step by step.

    Args:
        debt: the debt that earlier sequences left.
        saved: what they left for tries; infinite by default, so that the first step may always try.
        credit: most plain steps of earlier gain that may be lost again. With 0, `record` must be given expected gains:
            the random actual ones would soon add up to a debt.
    """

    def __init__(self, debt: float = 0.0, credit: float = 0.0, saved: float = inf) -> None:
        self.debt, self.saved, self._credit = debt, saved, credit
        self._price = self._due = LEAST_PRICE  # of a try, without and with the last known cost of catching up

    @property
    def doubted(self) -> bool:
        """Whether drafting has to prove that it pays."""
        return self.debt >= DOUBTED_DEBT

    @property
    def paused(self) -> bool:
        """Whether steps are plain, except for tries."""
        return self.debt >= MOST_DEBT

    def saving(self) -> bool:
        """Returns whether the next step is plain because no try is due yet, at the last known cost of catching up."""
        if not self.paused or self.saved >= self._due:
            return False
        self.saved += ALLOWED
        return True

    def drafts(self, catching_up: float = 0.0, losing: bool = False) -> bool:
        """Returns whether the next step should draft.

        Args:
            catching_up: cost of resuming drafting after plain steps.
            losing: whether plain decoding is expected to be faster.
        """
        if not self.paused and not losing:
            return True
        self._due = self._price + catching_up
        if self.saved >= self._due:
            self.saved = 0.0
            return True
        self.saved += ALLOWED
        return False

    def record(self, gain: float) -> None:
        """Records the gain of a drafted step over plain decoding."""
        self._price = self._due = max(-gain, LEAST_PRICE)
        self.debt = min(MOST_DEBT, max(-self._credit, self.debt - gain))
