"""Divides growing markdown into finished blocks and renders them.

A block ends at a blank line outside a code fence, unless the next line is indented and so belongs to it (the second
paragraph of a list item). A finished block never changes, so it is printed once while the rest is redrawn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import RenderableType
from rich.markdown import Markdown
from rich.text import Text

Source = str | int
Piece = tuple[str, Source]
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
# the target's own tokens are not styled; the MTP modules' drafts are, by depth, with the last colour for every deeper
# one, and so are those of other drafters
DEPTH_STYLES, OTHER_STYLE = ("green", "cyan", "blue", "magenta", "yellow"), "bright_black"
# html stays visible: rich would drop it
PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


class Answer(Markdown):
    """Markdown in which a line break stays one and html is text."""

    def __init__(self, text: str) -> None:
        super().__init__("")
        self.markup, self.parsed = text, PARSER.parse(text)
        _keep_breaks(self.parsed)


def _keep_breaks(tokens: Sequence[Token]) -> None:
    for token in tokens:
        if token.type == "softbreak":
            token.type = "hardbreak"
        _keep_breaks(token.children or ())


class Blocks:
    """Divides a growing text.

    Attributes:
        open: pieces of the unfinished block.
    """

    def __init__(self) -> None:
        self.open: list[Piece] = []

    def push(self, text: str, source: Source) -> list[list[Piece]]:
        """Takes the next piece; returns the blocks that it finishes."""
        if not text:
            return []
        # only the beginning of a line can show that the block before it is finished
        begins_line = "\n" in text or not self.open or self.open[-1][0].endswith("\n")
        self.open.append((text, source))
        finished = []
        while begins_line and (end := _first_end("".join(piece for piece, _ in self.open))):
            block, self.open = _cut(self.open, end)
            finished.append(block)
        return finished


def _first_end(text: str) -> int:
    """Returns where the first block of a text ends and the next begins; 0 if there is only one."""
    fence, blank, at = "", False, 0
    for line in text.splitlines(keepends=True):
        if blank and line.strip() and not line[0].isspace():
            return at
        mark = FENCE.match(line)
        if fence:
            closes = mark is not None and mark[1].startswith(fence) and not line.strip().strip(fence[0])
            fence = "" if closes else fence
        elif mark is not None:
            fence = mark[1]
        # blank lines at the start end no block
        blank = not fence and (blank or at > 0) and not line.strip() and bool(text[:at].strip())
        at += len(line)
    return 0


def _cut(pieces: Sequence[Piece], at: int) -> tuple[list[Piece], list[Piece]]:
    """Returns the pieces up to a place in their joined text, and those after it."""
    before, after = list[Piece](), list[Piece]()
    for text, source in pieces:
        if at >= len(text):
            before.append((text, source))
        elif at <= 0:
            after.append((text, source))
        else:
            before.append((text[:at], source))
            after.append((text[at:], source))
        at -= len(text)
    return before, after


def drawn(pieces: Sequence[Piece], coloured: bool) -> RenderableType:
    """Returns a block as markdown, or as raw text with every token in the colour of its source."""
    if not coloured:
        return Answer("".join(text for text, _ in pieces))
    line = Text.assemble(*((text, style_of(source)) for text, source in pieces))
    line.rstrip()
    return line


def style_of(source: Source) -> str:
    """Returns the style of a token proposed by the target (no style), by a draft of some depth, or by a drafter."""
    if isinstance(source, str):
        return "" if source == "target" else OTHER_STYLE
    return DEPTH_STYLES[min(source, len(DEPTH_STYLES)) - 1]
