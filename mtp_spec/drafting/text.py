"""Drafts from the text itself: what followed the last time that its end occurred, in the text or in given documents."""

from __future__ import annotations

from collections.abc import Sequence

from mtp_spec.drafting.base import Continuation
from mtp_spec.drafting.rates import Rates
from mtp_spec.drafting.repeats import END, FOUND, LONG, LONGEST, Match, Repeats


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
        return TextDrafts(prompt, self.rates.for_sequence(), self._documents)


class TextDrafts:
    """Proposals for one sequence; see `base.Drafts`.

    Args:
        documents: looked up beside its own text.
    """

    def __init__(self, prompt: Sequence[int], rates: Rates, documents: Repeats | None) -> None:
        self._own, self._rates, self._documents = Repeats(prompt), rates, documents
        self._expected = self._with_documents(self._own.find(self._own.tokens[-LONGEST:]), self._own.tokens[-LONGEST:])
        self._broken: int | None = None  # the next token if the long match that has just broken off goes on

    def commit(self, tokens: Sequence[int]) -> None:
        """Takes committed tokens, and learns how often matches were continued."""
        own = self._own
        for token in tokens:
            if self._broken is not None:
                self._rates.learn_resumed(self._broken == token)
            self._broken = self._after_break(token)
            for rank, (_, match) in enumerate(self._expected):
                self._rates.learn(match.length, rank, match.token == token)
                if match.token == token:
                    break
            self._expected = self._with_documents(own.follow(token), own.tokens)

    def _after_break(self, token: int) -> int | None:
        """Returns the token after the one at which a token breaks a long match; None if it does not."""
        if not self._expected:
            return None
        text, match = self._expected[0]
        after = match.place + 1
        breaks = match.length >= LONG and match.token != token and after < len(text.tokens)
        return text.tokens[after] if breaks else None

    def _with_documents(self, found: list[Match], end: Sequence[int]) -> list[tuple[Repeats, Match]]:
        """Returns the best matches with different next tokens, each with the text that it is in."""
        matches = [(self._own, match) for match in found]
        if self._documents is None:
            return matches
        matches += [(self._documents, match) for match in self._documents.find(end[-LONGEST:])]
        matches.sort(key=lambda one: -one[1].length)  # stable: the text's own come first
        best = dict[int, tuple[Repeats, Match]]()
        for one in matches:
            best.setdefault(one[1].token, one)
        return list(best.values())[:FOUND]

    def propose(self, path: Sequence[int], most: int) -> list[Continuation]:
        """Returns what followed the longest matches."""
        found = self._expected
        if path:
            end = [*self._own.tokens[-LONGEST:], *path]
            found = self._with_documents(self._own.find(end), end)
        left, proposed = 1.0, list[Continuation]()
        for rank, (text, match) in enumerate(found):
            first = self._rates.chance(match.length, rank)
            tokens = self._continued(text, match.place, path, most)
            later = self._rates.chances(match.length + 1, len(tokens) - 1)
            resumes = self._rates.resumes if match.length >= LONG else 0.0
            proposed.append(Continuation(tokens, [left * first, *later], Text.name, resumes))
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
