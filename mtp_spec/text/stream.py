"""Decoding token by token."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtp_spec.text.tokenizer import Tokenizer


class TextStream:
    """Decodes one token at a time; bytes of an unfinished character are held back.

    Attributes:
        pending: whether bytes are held back.
    """

    # ids kept as context, because some tokenizers decode a token differently at the start of a text; and at how many
    # they are reduced to so few, which takes another call of the tokenizer
    CONTEXT, MOST = 4, 16

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._known = 0  # characters of the ids whose text was returned
        self._shown = 0  # characters already returned of the text after
        self.pending = False

    def push(self, *tokens: int) -> str:
        """Returns the text that the next tokens complete, possibly none."""
        self._ids += tokens
        text = self._tokenizer.decode(self._ids)[self._known :]
        # a replacement character at the end may be the beginning of a character that spans several tokens
        whole = text.rstrip("\ufffd")
        self.pending = len(whole) < len(text)
        new = whole[self._shown :]
        if self.pending:
            self._shown += len(new)
        else:
            self._forget(text)
        return new

    def copy(self) -> TextStream:
        """Returns a stream at the same place."""
        other = copy.copy(self)
        other._ids = list(self._ids)
        return other

    def flush(self) -> str:
        """Returns the held-back text; unfinished characters appear as the replacement character."""
        if not self.pending:
            return ""
        text, shown = self._tokenizer.decode(self._ids)[self._known :], self._shown
        self.pending = False
        self._forget(text)
        return text[shown:]

    def _forget(self, text: str) -> None:
        """Takes the text after the known one as returned."""
        self._known, self._shown = self._known + len(text), 0
        if len(self._ids) > self.MOST:
            self._ids = self._ids[-self.CONTEXT :]
            self._known = len(self._tokenizer.decode(self._ids))
