"""Whether drafting pays right now, so that "auto" is never slower than plain decoding for long.

Every drafted step gains or loses something against plain decoding. Losses not made up for are a debt; once it reaches
a plain step, steps are plain, which costs nothing. Now and then a step drafts all the same, because only that tells
when the text has changed: what such tries lose is a fixed share of the time, so that they come often where they lose
little and seldom where they lose much. Whether a step drafts never changes the text.
"""

from __future__ import annotations

from math import inf

# all in plain steps: the debts at which drafting is doubted and at which it stops; the share of plain time that tries
# may lose; the least price of a try
DOUBTED_DEBT, MOST_DEBT, ALLOWED, LEAST_PRICE = 0.25, 1.0, 0.004, 0.05


class Pace:
    """Decides for one text, step by step.

    Args:
        debt: what the texts before left.
        saved: what they left for tries; without end, so that a first step may always try.
        credit: what drafting has won may be lost again, up to this many plain steps. Without, gains must be expected
            ones: of single steps the chance ones would soon amount to a debt.
    """

    def __init__(self, debt: float = 0.0, credit: float = 0.0, saved: float = inf) -> None:
        self.debt, self.saved, self._credit = debt, saved, credit
        self._price = self._due = LEAST_PRICE  # of a try; and with what catching up cost when it was last asked

    @property
    def doubted(self) -> bool:
        """Whether drafting has to show that it pays."""
        return self.debt >= DOUBTED_DEBT

    @property
    def paused(self) -> bool:
        """Whether steps are plain, but for tries."""
        return self.debt >= MOST_DEBT

    def saving(self) -> bool:
        """Returns whether the next step is plain because no try is due yet, if catching up costs what it did."""
        if not self.paused or self.saved >= self._due:
            return False
        self.saved += ALLOWED
        return True

    def drafts(self, catching_up: float = 0.0, losing: bool = False) -> bool:
        """Returns whether the next step should draft.

        Args:
            catching_up: what it costs to begin again after plain steps.
            losing: plain decoding is expected to be faster.
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
        """Takes what a drafted step gained over plain decoding."""
        self._price = self._due = max(-gain, LEAST_PRICE)
        self.debt = min(MOST_DEBT, max(-self._credit, self.debt - gain))
