"""How often the text goes on as its longest match did, by the match's length; learned from every committed token.

Nothing has to be drafted for that: what would have been proposed before a token is known without a pass.
"""

from __future__ import annotations

from bisect import bisect_right

# matches of these lengths and up to the next share a rate; the prior of the best match, and of the second best once the
# best has failed
LENGTHS = (3, 4, 6, 9, 14, 22)
PRIORS, SECOND = (0.3, 0.45, 0.6, 0.72, 0.8, 0.88), 0.2
# likewise of a long match that has broken off: how often it goes on after the one token that differs, as it does where
# a word was replaced
BROKEN, RESUMED = len(LENGTHS), 0.3
# observations remembered for a sequence and for all of them, and the weight of the latter in a new one
SEQUENCE_MEMORY, ALL_MEMORY, CARRIED = 30.0, 300.0, 6.0


class Rates:
    """Rates by length and rank (0 is the longest match).

    Args:
        memory: observations after which the weight of an old one has fallen to about a third (1/e).
        before: source of the prior.
    """

    def __init__(self, memory: float = ALL_MEMORY, before: Rates | None = None) -> None:
        self._keep, self._before = 1.0 - 1.0 / memory, before
        self._seen: dict[tuple[int, int], tuple[float, float]] = {}

    def for_sequence(self) -> Rates:
        """Returns the rates that a new sequence starts from."""
        return Rates(SEQUENCE_MEMORY, self)

    def chance(self, length: int, rank: int = 0) -> float:
        """Returns the probability that a match is continued; for rank 1 given that the best one is not."""
        return self._chance(bisect_right(LENGTHS, length) - 1, rank)

    @property
    def resumes(self) -> float:
        """The probability that a long match goes on after one token that differs."""
        return self._chance(BROKEN, 0)

    def chances(self, length: int, count: int) -> list[float]:
        """Returns the chances of `count` tokens in turn, each of which makes a match of this length longer by one; from
        the longest on the last one counts for all."""
        found = list[float]()
        for bucket in range(bisect_right(LENGTHS, length) - 1, len(LENGTHS)):
            last = bucket + 1 == len(LENGTHS)
            number = 1 if last else min(LENGTHS[bucket + 1] - length, count - len(found))
            found += [self._chance(bucket, 0)] * number
            length += number
            if len(found) >= count:
                break
        return found[:count]

    def _chance(self, bucket: int, rank: int) -> float:
        won, tried = self._seen.get((bucket, rank), (0.0, 0.0))
        first = SECOND if rank else RESUMED if bucket == BROKEN else PRIORS[bucket]
        prior = first if self._before is None else self._before._chance(bucket, rank)
        return (won + CARRIED * prior) / (tried + CARRIED)

    def learn(self, length: int, rank: int, continued: bool) -> None:
        """Learns whether a match was continued."""
        self._learn(bisect_right(LENGTHS, length) - 1, rank, continued)

    def learn_resumed(self, resumed: bool) -> None:
        """Learns whether a long match went on after a token that differed."""
        self._learn(BROKEN, 0, resumed)

    def _learn(self, bucket: int, rank: int, right: bool) -> None:
        won, tried = self._seen.get((bucket, rank), (0.0, 0.0))
        self._seen[bucket, rank] = won * self._keep + right, tried * self._keep + 1.0
        if self._before is not None:
            self._before._learn(bucket, rank, right)
