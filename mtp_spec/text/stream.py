"""Decoding token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtp_spec.text.tokenizer import Tokenizer


class TextStream:
    """Decodes one token at a time; bytes of an unfinished character are held back.

    Attributes:
        pending: whether bytes are held back.
    """

    # ids kept as context, because some tokenizers decode a token differently at the start of a text
    CONTEXT = 4

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._known = 0  # ids whose text was returned
        self._shown = 0  # characters already returned of the text of the ids after
        self.pending = False

    def push(self, token: int) -> str:
        """Returns the text that this token completes, possibly none."""
        self._ids.append(token)
        text = self._new_text()
        # a replacement character at the end may be the beginning of a character that spans several tokens
        whole = text.rstrip("\ufffd")
        self.pending = len(whole) < len(text)
        new = whole[self._shown :]
        if self.pending:
            self._shown += len(new)
        else:
            self._forget()
        return new

    def flush(self) -> str:
        """Returns the held-back text; unfinished characters appear as the replacement character."""
        text = self._new_text()[self._shown :] if self.pending else ""
        self.pending = False
        self._forget()
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._known])
        return self._tokenizer.decode(self._ids)[len(before) :]

    def _forget(self) -> None:
        self._ids = self._ids[-self.CONTEXT :]
        self._known, self._shown = len(self._ids), 0
