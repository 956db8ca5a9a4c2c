"""Finds where the end of a text occurred before, as prompt lookup and suffix automata do (SAM decoding, 2411.10666).

For runs of 3 and of 8 tokens a hash table holds the place after the latest occurrence, and every place is linked to the
one before with the same run. A query looks at the latest few places of the longer run that has any and compares
backwards, so the longest match is found first. Adding a token takes constant time, microseconds; a suffix automaton
has the same bound, and in Python takes several times as long and as much memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# lengths of the runs that are hashed; longest match that is told apart; most places compared, and matches returned
SHORT, LONG = 3, 8
LONGEST, TRIED, FOUND = 32, 8, 2
END = -1  # between documents: matches and continuations do not cross it
NOWHERE = 0  # no run ends before the first place


@dataclass(frozen=True, slots=True)
class Match:
    """An earlier occurrence of the end of a text.

    Attributes:
        place: of the token that followed it.
        length: tokens that agree, from `SHORT` to `LONGEST`.
        token: the one at `place`.
    """

    place: int
    length: int
    token: int


class _Runs:
    """The places after runs of one length."""

    __slots__ = ("before", "latest", "run")

    def __init__(self, run: int) -> None:
        self.run, self.latest = run, dict[tuple[int, ...], int]()
        self.before = [NOWHERE] * run  # by place

    def add(self, text: Sequence[int], first: int) -> None:
        """Adds the runs that end with the tokens from `first` on."""
        run, latest, before = self.run, self.latest, self.before
        start = max(0, first - run + 1)
        place = start + run
        for key in zip(*(text[start + shift :] for shift in range(run)), strict=False):
            before.append(latest.get(key, NOWHERE))
            latest[key] = place
            place += 1


class Repeats:
    """Places of runs of tokens in a growing text.

    Attributes:
        tokens: the text.
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self._short, self._long = _Runs(SHORT), _Runs(LONG)
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds tokens at the end."""
        first = len(self.tokens)
        self.tokens += tokens
        self._short.add(self.tokens, first)
        self._long.add(self.tokens, first)

    def follow(self, token: int) -> list[Match]:
        """Adds a token and returns the matches of the text's end; see `find`."""
        text = self.tokens
        text.append(token)
        place, places = len(text), list[tuple[int, _Runs]]()
        for runs in (self._long, self._short):
            if place >= runs.run:
                key = tuple(text[-runs.run :])
                found = runs.latest.get(key, NOWHERE)
                runs.before.append(found)
                runs.latest[key] = place
                if found:
                    places.append((found, runs))
        return self._best(places, text[-LONGEST:]) if places else []

    def find(self, end: Sequence[int]) -> list[Match]:
        """Returns the longest match for each of a few next tokens, the longest first, then the latest.

        Args:
            end: the last tokens of the text that is continued, at least `LONGEST` if it has them; it may be another.
        """
        ends = ((runs, tuple(end[-runs.run :])) for runs in (self._long, self._short))
        places = [(runs.latest.get(key, NOWHERE), runs) for runs, key in ends]
        return self._best(places, end)

    def _best(self, places: Sequence[tuple[int, _Runs]], end: Sequence[int]) -> list[Match]:
        text, found = self.tokens, dict[int, Match]()
        for place, runs in places:
            for _ in range(TRIED):
                if place == NOWHERE:
                    break
                token = text[place] if place < len(text) else END
                if token != END:
                    length = self._agreement(place, end, runs.run)
                    if token not in found or length > found[token].length:
                        found[token] = Match(place, length, token)
                place = runs.before[place]
            if len(found) >= FOUND:
                break
        if len(found) < 2:
            return list(found.values())
        return sorted(found.values(), key=lambda match: (-match.length, -match.place))[:FOUND]

    def _agreement(self, place: int, end: Sequence[int], known: int) -> int:
        """Returns how many tokens before a place equal the last ones of `end`; the last `known` do."""
        text = self.tokens
        for length in range(known, min(place, len(end), LONGEST)):
            if text[place - 1 - length] != end[-1 - length]:
                return length
        return min(place, len(end), LONGEST)
