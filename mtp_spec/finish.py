"""Where a text ends, decided token by token: end-of-sequence, stop string or length.

Text, ids, log-probabilities and both caches are cut at the same token, because the answer is known when a token is
drawn and nothing is drawn after it. Tokens are released for streaming once nothing that follows can take back their
text: no stop string may have begun in it, no character may be incomplete. Without stop strings text is decoded when
somebody asks for it, for whoever asks at the end at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mtp_spec.text import TextStream, Tokenizer


class Finisher:
    """Follows one text.

    Args:
        tokenizer: None when a model has no tokenizer; texts are then empty and only ids and length end them.
        stop_ids: tokens that end the text and do not belong to it.
        stops: strings that end the text and do not belong to it.
        limit: most tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, stop_ids: frozenset[int], stops: Sequence[str], limit: int
    ) -> None:
        self.reason: Literal["stop", "length"] = "length"
        self._tokenizer, self._stream = tokenizer, None if tokenizer is None else TextStream(tokenizer)
        self._stop_ids, self._stops, self._limit = stop_ids, stops, limit
        self._count, self._ended = 0, False
        self._unread: list[int] = []  # tokens not yet decoded
        self._held: list[str] = []  # texts of tokens not yet released
        self._released: list[str] = []

    def push(self, token: int) -> bool:
        """Takes the next token; returns whether the text ends with it."""
        self._count += 1
        last = token in self._stop_ids
        if last:
            self.reason = "stop"
        else:
            self._unread.append(token)
            last = self._count == self._limit
        if self._stops:
            self._read()
            if last:  # bytes that never became a character hold back text that may hold a stop string
                self._flush()
            if self._cut_at_stop():
                self.reason, last = "stop", True
        self._ended = last
        return last

    def ready(self) -> list[str]:
        """Returns the texts of the tokens released since the last call, one for each token."""
        self._read()
        if self._ended:
            self._finish()
        else:
            self._release()
        released, self._released = self._released, []
        return released

    def whole(self) -> tuple[str, int] | None:
        """Returns the text that has ended and how many tokens belong to it; None once parts of it were released."""
        if self._stops or self._count - len(self._unread) > (self.reason == "stop"):
            return None
        return "" if self._tokenizer is None else self._tokenizer.decode(self._unread), len(self._unread)

    def _read(self) -> None:
        stream, unread = self._stream, self._unread
        self._held += [""] * len(unread) if stream is None else [stream.push(token) for token in unread]
        self._unread = []

    def _finish(self) -> None:
        """Releases everything."""
        self._flush()
        self._released += self._held
        self._held = []

    def _flush(self) -> None:
        """Ends the last token's text; bytes that never became a character appear as the replacement character."""
        if self._held and self._stream is not None:
            self._held[-1] += self._stream.flush()

    def _cut_at_stop(self) -> bool:
        text = "".join(self._held)
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops if stop in text]
        if not ends:
            return False
        _, cut = min(ends)
        for piece in self._held:
            if cut <= 0:
                break
            self._released.append(piece[:cut])
            cut -= len(piece)
        self._held = []
        return True

    def _release(self) -> None:
        """Releases the leading tokens whose text can no longer become part of a stop string."""
        if not self._held or (self._stream is not None and self._stream.pending):
            return
        text = "".join(self._held)
        safe = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        done = 0
        for piece in self._held:
            safe -= len(piece)
            if safe < 0:
                break
            done += 1
        self._released += self._held[:done]
        self._held = self._held[done:]


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of the text that begins the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
