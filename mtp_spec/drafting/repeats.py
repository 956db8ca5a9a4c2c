"""Finds where the end of a text occurred before, as prompt lookup and suffix automata do (SAM decoding, 2411.10666).

For runs of 2, 4 and 8 tokens a hash table holds the place after the latest occurrence, and every place is linked to the
one before with the same run. A query looks at the latest few places of the longest run that has any and compares
backwards, so the longest match is found first. Adding a token takes constant time, about a microsecond; a suffix
automaton has the same bound but takes ten times as long and as much memory in Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# lengths of the runs that are hashed; each is twice the one before, so that its hash follows from two of those
RUNS = (2, 4, 8)
# longest match that is told apart; the latest places of a run that are compared; matches returned
LONGEST, TRIED, FOUND = 32, 8, 2
FACTOR, MASK = 0x9E3779B97F4A7C15, 2**64 - 1
FACTORS = {run: pow(FACTOR, run, 2**64) for run in (1, *RUNS)}
END = -1  # between documents: matches and continuations do not cross it
BULK = 64  # as many tokens are added by NumPy
NOWHERE = -1


@dataclass(frozen=True, slots=True)
class Match:
    """An earlier occurrence of the end of a text.

    Attributes:
        place: of the token that followed it.
        length: tokens that agree, up to `LONGEST`.
        token: the one at `place`.
    """

    place: int
    length: int
    token: int


class Repeats:
    """Places of runs of tokens in a growing text.

    Attributes:
        tokens: the text.
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self._latest: dict[int, dict[int, int]] = {run: {} for run in RUNS}  # hash of a run -> the place after it
        # for each place, the hash of the run before it, and the place before with the same hash
        self._hashes: dict[int, list[int]] = {run: [0] for run in RUNS}
        self._before: dict[int, list[int]] = {run: [NOWHERE] for run in RUNS}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds tokens at the end."""
        if len(tokens) >= BULK:
            self._extend_by_many(tokens)
            return
        text = self.tokens
        for token in tokens:
            text.append(token)
            place = len(text)
            for run in RUNS:
                value = self._hash_of(run, place)
                self._hashes[run].append(value)
                latest = self._latest[run]
                self._before[run].append(latest.get(value, NOWHERE) if place >= run else NOWHERE)
                if place >= run:
                    latest[value] = place

    def _hash_of(self, run: int, place: int) -> int:
        """Returns the hash of the run before a place; 0 if there is none."""
        if place < run:
            return 0
        if run == RUNS[0]:
            return (self.tokens[place - 1] + FACTOR * self.tokens[place - 2]) & MASK
        half = self._hashes[run // 2]
        return (half[place] + FACTORS[run // 2] * half[place - run // 2]) & MASK

    def _extend_by_many(self, tokens: Sequence[int]) -> None:
        first, text = len(self.tokens), self.tokens
        text += tokens
        start = max(0, first - RUNS[-1])  # hashes of new places depend on these older tokens
        values = np.asarray(text[start:], dtype=np.int64).astype(np.uint64)
        hashes, run = values, 1
        for run in RUNS:
            half = run // 2
            joined = np.zeros_like(hashes)
            joined[half:] = hashes[half:] + np.uint64(FACTORS[half]) * hashes[:-half]
            hashes = joined  # entry i is the hash of the run that ends with token i
            skipped = max(0, run - 1 - first)
            new = hashes[first - start :].tolist()
            new[:skipped] = [0] * min(skipped, len(new))
            self._hashes[run] += new
            latest, before = self._latest[run], self._before[run]
            for place, value in enumerate(new, start=first + 1):
                if place < run:
                    before.append(NOWHERE)
                else:
                    before.append(latest.get(value, NOWHERE))
                    latest[value] = place

    def find(self, end: Sequence[int]) -> list[Match]:
        """Returns the longest match of each next token, the longest first, then the most frequent and latest.

        Args:
            end: the last tokens of the text that is continued, `LONGEST` at most; it may be another text.
        """
        found, text = dict[int, Match](), self.tokens
        votes: dict[int, int] = {}
        hashes, values = list[int](), [token & MASK for token in end[-RUNS[-1] :]]
        for run in RUNS:
            hashes.append(_hash(values[-run:]) if len(values) >= run else NOWHERE)
        seen = set[int]()
        for run, value in zip(reversed(RUNS), reversed(hashes), strict=True):
            place = self._latest[run].get(value, NOWHERE)
            for _ in range(TRIED):
                if place == NOWHERE:
                    break
                if place < len(text) and place not in seen:
                    seen.add(place)
                    token, length = text[place], self._agreement(place, end)
                    if length >= RUNS[0] and token != END:
                        votes[token] = votes.get(token, 0) + 1
                        if token not in found or length > found[token].length:
                            found[token] = Match(place, length, token)
                place = self._before[run][place]
            if len(found) >= FOUND:
                break
        matches = sorted(found.values(), key=lambda match: (-match.length, -votes[match.token], -match.place))
        return matches[:FOUND]

    def _agreement(self, place: int, end: Sequence[int]) -> int:
        """Returns how many tokens before a place equal the last ones of `end`."""
        text, most = self.tokens, min(place, len(end))
        for length in range(most):
            if text[place - 1 - length] != end[-1 - length]:
                return length
        return most


def _hash(values: Sequence[int]) -> int:
    total = 0
    for value in values:
        total = (total * FACTOR + value) & MASK
    return total
