"""Decides token by token where a text ends: end-of-sequence, stop token, stop string or length.

Text, ids, log-probabilities and both caches are cut at the same token, because the decision is made when a token is
drawn, and nothing is drawn after the last. Tokens are released for streaming once their text is final: no stop string
may have begun in it and no character may be incomplete. Text is decoded on demand: all at once if it is only read at
the end.

Stop strings are searched for twice: in the visible text, and in the text with its special tokens written out. That
takes the text of every token, so as long as nobody reads and there is no special token, a simple search comes first: a
step's text, and as much before it as a stop string is long, must hold none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from mtp_spec.text import TextStream, Tokenizer


class _Piece(NamedTuple):
    """What a token adds: its visible text and, for a special token, which has none, its written-out text.

    Attributes:
        begun: whether it adds only the beginning of a character.
    """

    shown: str
    special: str = ""
    begun: bool = False


class StopChecker:
    """Follows one text.

    Args:
        tokenizer: None if a model has no tokenizer; texts are then empty and only ids and length end them.
        stop_ids: tokens that end the text and are not part of it.
        stops: strings that end the text and are not part of it.
        limit: most tokens.
        least: least number of tokens; a stop string that begins in their text is ignored.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stop_ids: frozenset[int],
        stops: Sequence[str],
        limit: int,
        least: int = 0,
    ) -> None:
        self.reason: Literal["stop", "length"] = "length"
        self._tokenizer, self._stream = tokenizer, None if tokenizer is None else TextStream(tokenizer)
        self._stop_ids, self._stops, self._limit, self._least = stop_ids, stops, limit, least
        self._count, self._ended = 0, False
        self._unread: list[int] = []  # tokens not yet decoded
        self._held: list[_Piece] = []  # of tokens not yet released
        self._released: list[str] = []
        self._gone = 0  # tokens released so far
        # for the simple search: all tokens so far, and the end of their text; None once it does not suffice
        self._ahead = None if tokenizer is None or not stops else TextStream(tokenizer)
        self._tail, self._reach = "", max(map(len, stops), default=1) - 1

    def push(self, token: int) -> bool:
        """Takes the next token; returns whether the text ends with it."""
        self._count += 1
        last = ends = token in self._stop_ids
        if ends:
            self.reason = "stop"
        else:
            self._unread.append(token)
            last = self._count == self._limit
        if self._stops and not self._is_clear([] if ends else [token], last, self._special(token)):
            self._ahead = None
            self._read()
            if last:  # incomplete bytes hold back text that may contain a stop string
                self._flush()
            if self._cut_at_stop(self._special(token) if ends else ""):
                self.reason, last = "stop", True
            elif not last:  # keeps the searched text short
                self._release()
        self._ended = last
        return last

    def pass_by(self, tokens: Sequence[int]) -> bool:
        """Takes the next tokens if none of them can end the text; else returns false and takes none."""
        count = self._count + len(tokens)
        if count >= self._limit or not self._stop_ids.isdisjoint(tokens):
            return False
        if self._stops and not self._is_clear(tokens, False, "".join(map(self._special, tokens))):
            return False
        self._count = count
        self._unread += tokens
        return True

    def _is_clear(self, tokens: Sequence[int], last: bool, special: str) -> bool:
        """Takes the next tokens for the simple search if it shows that they complete no stop string; else takes none.

        Args:
            last: whether the text ends after them.
            special: text of the special tokens among them, or of the one that ends the text.
        """
        if self._ahead is None or (special and not last):
            return False
        ahead = self._ahead.copy()
        text = self._tail + ahead.push(*tokens)
        whole = text + ahead.flush() + special if last else text
        if any(stop in whole for stop in self._stops):
            return False
        self._ahead, self._tail = ahead, text[max(0, len(text) - self._reach) :]
        return True

    def ready(self) -> list[str]:
        """Returns the texts of the tokens released since the last call, one for each token."""
        self._ahead = None  # every token's text is decoded now
        self._read()
        if self._ended:
            self._flush()
            self._let_go(len(self._held))
        else:
            self._release()
        released, self._released = self._released, []
        return released

    def whole(self) -> tuple[str, int] | None:
        """Returns the finished text and its number of tokens; None if parts of it were already released."""
        read = self._stops and self._ahead is None
        if read or self._count - len(self._unread) > (self.reason == "stop"):
            return None
        return "" if self._tokenizer is None else self._tokenizer.decode(self._unread), len(self._unread)

    def _special(self, token: int) -> str:
        return "" if self._tokenizer is None else self._tokenizer.special_text(token)

    def _read(self) -> None:
        stream = self._stream
        for token in self._unread:
            shown = "" if stream is None else stream.push(token)
            begun = stream is not None and stream.pending and not shown
            self._held.append(_Piece(shown, self._special(token) if self._stops else "", begun))
        self._unread = []

    def _flush(self) -> None:
        """Ends the text of the tokens so far; incomplete bytes appear as the replacement character."""
        if not self._held or self._stream is None or not (rest := self._stream.flush()):
            return
        ordinary = [place for place, piece in enumerate(self._held) if not piece.special]
        place = ordinary[-1] if ordinary else len(self._held) - 1
        piece = self._held[place]
        self._held[place] = piece._replace(shown=piece.shown + rest)

    def _release(self) -> None:
        """Releases the leading tokens whose text can no longer become part of a stop string."""
        if self._stream is None or not self._stream.pending:
            self._let_go(min(self._free(False), self._free(True)))

    def _let_go(self, count: int) -> None:
        """Releases the first tokens held."""
        self._released += [piece.shown for piece in self._held[:count]]
        self._held = self._held[count:]
        self._gone += count

    def _texts(self, written_out: bool) -> tuple[list[str], int]:
        """Returns the texts of the tokens held, and where in their concatenation the first stop string may begin."""
        texts = [piece.shown + piece.special if written_out else piece.shown for piece in self._held]
        return texts, sum(map(len, texts[: max(0, self._least - self._gone)]))

    def _cut_at_stop(self, ending: str) -> bool:
        """Cuts the text before the first stop string, if there is one.

        Args:
            ending: text of the special token that ends the text: a stop string may end with it.
        """
        found = [place for place in (self._find(False, ""), self._find(True, ending)) if place is not None]
        if not found:
            return False
        _, (at, offset) = min(found)
        if not offset:  # also drop tokens that began the stop string's first character
            while at and self._held[at - 1].begun and not self._held[at - 1].shown:
                at -= 1
        cut = self._held[at] if offset and at < len(self._held) else None
        self._let_go(at)
        if cut is not None:
            self._held = [cut._replace(shown=cut.shown[:offset])]
            self._let_go(1)
        self._held = []
        return True

    def _find(self, written_out: bool, ending: str) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Returns the last and the first character of the stop string that is complete first: token and offset."""
        texts, begin = self._texts(written_out)
        text = "".join(texts) + ending
        starts = [(text.find(stop, begin), len(stop)) for stop in self._stops]
        ends = [(start + length, start) for start, length in starts if start >= 0]
        if not ends:
            return None
        end, start = min(ends)
        return _place(texts, end - 1), _place(texts, start)

    def _free(self, written_out: bool) -> int:
        """Returns how many of the first tokens held cannot contain the beginning of a stop string."""
        texts, begin = self._texts(written_out)
        text = "".join(texts)
        safe = len(text) - max((_overlap(text[begin:], stop) for stop in self._stops), default=0)
        done = 0
        for piece in texts:
            safe -= len(piece)
            if safe < 0:
                break
            done += 1
        return done


def _place(texts: Sequence[str], at: int) -> tuple[int, int]:
    """Returns which text holds a character of their concatenation, and where; one more past the end."""
    for number, text in enumerate(texts):
        if at < len(text):
            return number, at
        at -= len(text)
    return len(texts), at


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest suffix of the text that is a prefix of the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
