"""Whether drafting pays right now: measured while running, so that "auto" is never slower than plain for long.

Both sides are in the same unit, seconds a committed token. Plain steps give the one, steps that drafted the other.
Where drafting loses it is put off, each time for longer; a step that tries again tells when the text has changed. What
a text taught is where the next one starts. Whether a step drafts never changes the text.
"""

from __future__ import annotations

# weight of what is new in the running means, and of the last texts in a new one, as steps
NEWER = 0.12
PRIOR_STEPS = 2.0
# steps without drafts after the first failure, and how much longer each further pause is
FIRST_PAUSE, LONGER = 12, 3
# drafted steps after which plain decoding is timed again: its cost grows with the context
STALE = 200


class Pace:
    """What a model's texts have shown so far; one a model."""

    def __init__(self) -> None:
        self.plain_seconds: float | None = None
        self.tokens: float | None = None  # a drafted step
        self.seconds: float | None = None  # a drafted step
        self.since_plain = 0


class TextPace:
    """Decides for one text, step by step."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self._steps, self._tokens, self._seconds = 0.0, 0.0, 0.0
        if pace.tokens is not None and pace.seconds is not None:
            self._steps = PRIOR_STEPS
            self._tokens, self._seconds = PRIOR_STEPS * pace.tokens, PRIOR_STEPS * pace.seconds
        self._pause, self._left = FIRST_PAUSE, 0

    def drafts(self) -> bool:
        """Returns whether the next step should draft."""
        if self._left > 0:
            self._left -= 1
            return False
        unknown = self.pace.plain_seconds is None and self._steps > 0
        return not unknown and self.pace.since_plain < STALE

    def record(self, drafted: bool, seconds: float, tokens: int) -> None:
        """Takes the time of a step and the tokens it committed."""
        pace = self.pace
        if not drafted:
            pace.plain_seconds = _mean(pace.plain_seconds, seconds)
            pace.since_plain = 0
            return
        pace.since_plain += 1
        pace.tokens, pace.seconds = _mean(pace.tokens, tokens), _mean(pace.seconds, seconds)
        keep = 1.0 - NEWER
        self._steps = self._steps * keep + 1.0
        self._tokens = self._tokens * keep + tokens
        self._seconds = self._seconds * keep + seconds
        if pace.plain_seconds is None:
            return
        if self._seconds > pace.plain_seconds * self._tokens:
            self._left, self._pause = self._pause, self._pause * LONGER
            # the next try counts for more than what led here
            shrink = PRIOR_STEPS / max(self._steps, PRIOR_STEPS)
            self._steps, self._tokens, self._seconds = (
                value * shrink for value in (self._steps, self._tokens, self._seconds)
            )
        else:
            self._pause = FIRST_PAUSE


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + NEWER * (new - old)
