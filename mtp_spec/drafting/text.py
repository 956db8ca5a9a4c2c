"""Drafts from the text itself: what followed the last time that its end occurred, in the text or in given documents."""

from __future__ import annotations

from collections.abc import Sequence

from mtp_spec.drafting.base import Continuation
from mtp_spec.drafting.rates import Rates
from mtp_spec.drafting.repeats import END, FOUND, LONGEST, Match, Repeats


class Text:
    """The drafter "text".

    Args:
        references: token ids of documents that are looked up beside the prompt and the text.
    """

    name = "text"

    def __init__(self, references: Sequence[Sequence[int]] = ()) -> None:
        self.rates = Rates()
        self._documents: Repeats | None = None
        if references:
            self._documents = Repeats([token for ids in references for token in (*ids, END)])

    def __repr__(self) -> str:
        return f"Text({0 if self._documents is None else len(self._documents.tokens)} tokens)"

    def begin(self, prompt: Sequence[int]) -> TextDrafts:
        """Returns the proposals for a new sequence."""
        return TextDrafts(prompt, self.rates.for_text(), self._documents)


class TextDrafts:
    """Proposals for one sequence; see `base.Drafts`.

    Args:
        documents: looked up beside its own text.
    """

    def __init__(self, prompt: Sequence[int], rates: Rates, documents: Repeats | None) -> None:
        self._own, self._rates = Repeats(prompt), rates
        self._texts = [self._own] if documents is None else [self._own, documents]
        self._expected = self._find(self._own.tokens[-LONGEST:])

    def commit(self, tokens: Sequence[int]) -> None:
        """Takes committed tokens, and learns how often matches were continued."""
        for token in tokens:
            for rank, (_, match) in enumerate(self._expected):
                self._rates.learn(match.length, rank, match.token == token)
                if match.token == token:
                    break
            self._own.extend((token,))
            self._expected = self._after(token)

    def _after(self, token: int) -> list[tuple[Repeats, Match]]:
        """Returns the matches after a token: a long one that goes on needs no search."""
        if self._expected and self._expected[0][1].token == token:
            text, match = self._expected[0]
            place = match.place + 1
            if match.length >= LONGEST and place < len(text.tokens) and text.tokens[place] != END:
                return [(text, Match(place, match.length, text.tokens[place]))]
        return self._find(self._own.tokens[-LONGEST:])

    def _find(self, end: Sequence[int]) -> list[tuple[Repeats, Match]]:
        """Returns the best matches with different next tokens."""
        if len(self._texts) == 1:
            return [(self._own, match) for match in self._own.find(end)]
        found = [(text, match) for text in self._texts for match in text.find(end)]
        found.sort(key=lambda one: -one[1].length)  # stable: the text's own come first
        best = dict[int, tuple[Repeats, Match]]()
        for one in found:
            best.setdefault(one[1].token, one)
        return list(best.values())[:FOUND]

    def propose(self, path: Sequence[int], most: int) -> list[Continuation]:
        """Returns what followed the longest matches."""
        found = self._expected
        if path:
            found = self._find([*self._own.tokens[-LONGEST:], *path][-LONGEST:])
        left, proposed = 1.0, list[Continuation]()
        for rank, (text, match) in enumerate(found):
            first = self._rates.chance(match.length, rank)
            tokens = self._continued(text, match.place, path, most)
            later = (self._rates.chance(match.length + place) for place in range(1, min(len(tokens), LONGEST)))
            proposed.append(Continuation(tokens, (left * first, *later), Text.name))
            left *= 1.0 - first
        return proposed

    def _continued(self, text: Repeats, place: int, path: Sequence[int], most: int) -> list[int]:
        """Returns up to `most` tokens from a place on; where the text itself ends, it repeats since that place."""
        tokens = text.tokens[place : place + most]
        if text is not self._own:
            return tokens[: tokens.index(END)] if END in tokens else tokens
        tokens += path[max(0, place - len(text.tokens)) :]
        period = len(tokens)
        while len(tokens) < most:
            tokens.append(tokens[-period])
        return tokens[:most]
