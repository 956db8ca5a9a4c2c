"""Draws answers and messages on a console.

On a terminal an answer appears as markdown while it is generated: finished blocks are printed once, the open one and
the line of statistics are redrawn below them, never taller than the window. Elsewhere the plain text goes to standard
output as it is generated, and everything else to standard error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.text import Text

from mtp_spec.chat.blocks import DEPTH_STYLES, OTHER_STYLE, Answer, Blocks, Piece, drawn, style_of
from mtp_spec.chat.status import status_line
from mtp_spec.results import TokenEvent
from mtp_spec.stream import TokenStream

# largest share of the time for drawing, and shortest time between two frames
DRAWING_SHARE, SHORTEST_FRAME = 0.1, 1 / 15
# lines of the window that the open block leaves free
FREE_LINES = 4


class Screen:
    """The output of a chat.

    Args:
        console: for answers.
        errors: for everything that is not part of the conversation if `console` is not a terminal.
    Attributes:
        coloured: colour tokens by their source.
        statistics: show the line of statistics.
    """

    def __init__(self, console: Console, errors: Console) -> None:
        self.console, self.errors = console, errors
        self.coloured, self.statistics = False, True

    @property
    def rich(self) -> bool:
        """Whether answers are drawn as markdown."""
        return self.console.is_terminal and not self.console.is_dumb_terminal

    @property
    def can_colour(self) -> bool:
        """Whether this output supports colours."""
        return self.rich and self.console.color_system is not None and not self.console.no_color

    def say(self, message: str) -> None:
        """Prints a message about the chat."""
        console = self._aside
        console.print(message, style="dim", markup=False, highlight=False, soft_wrap=not console.is_terminal)

    def show(self, message: RenderableType) -> None:
        """Prints the output of a command."""
        self.console.print(message, markup=False, highlight=False)

    def complain(self, message: str) -> None:
        """Prints an error."""
        soft = not self.errors.is_terminal
        self.errors.print(message, style="red", markup=False, highlight=False, soft_wrap=soft)

    @property
    def _aside(self) -> Console:
        return self.console if self.console.is_terminal else self.errors

    def answer(self, stream: TokenStream, seed: int, stopped: Callable[[], bool]) -> bool:
        """Draws an answer while it is generated; returns whether `stopped` or KeyboardInterrupt ended it."""
        if not self.rich:
            return self._plain(stream, seed, stopped)
        blocks = Blocks()
        with self._frames() as draw:
            draw(Text("reading the conversation ...", style="dim"))

            def take(event: TokenEvent) -> None:
                for block in blocks.push(event.text, event.source):
                    self._print_block(block)
                draw(Group(_Tail(drawn(blocks.open, self.coloured)), self._status(stream, seed)))

            interrupted = _each(stream, take, stopped)
        self._print_block(blocks.open)
        if self.statistics:
            self.console.print(self._status(stream, seed))
        return interrupted

    def count(self, stream: TokenStream, whole: int, stopped: Callable[[], bool]) -> bool:
        """Runs a stream and draws only its progress towards `whole` tokens; returns as `answer`."""
        with self._frames() as draw:

            def take(event: TokenEvent) -> None:
                done = len(stream.result.token_ids)
                draw(Text(f"without drafts: {done} of {whole} tokens", style="dim"))

            return _each(stream, take, stopped)

    def history(self, question: str, answer: str) -> None:
        """Prints an earlier turn."""
        self.console.print(Text(f"> {question}", style="bold"))
        self.console.print(Answer(answer) if self.rich else Text(answer))
        self.console.print()

    def legend(self) -> Text:
        """Returns the legend of the colours."""
        depths = range(1, len(DEPTH_STYLES) + 1)
        names = [Text(f"draft {depth}", style_of(depth)) for depth in depths]
        others = Text("from the text or another drafter", OTHER_STYLE)
        return Text.assemble(Text(", ").join([Text("target"), *names]), " or deeper, ", others)

    def _plain(self, stream: TokenStream, seed: int, stopped: Callable[[], bool]) -> bool:
        interrupted = _each(stream, lambda event: self.console.out(event.text, end="", highlight=False), stopped)
        self.console.out("")
        if self.statistics:
            self.errors.print(status_line(stream.result.stats, seed), style="dim", soft_wrap=True, highlight=False)
        return interrupted

    def _print_block(self, block: Sequence[Piece]) -> None:
        if any(text.strip() for text, _ in block):
            self.console.print(drawn(block, self.coloured))
            self.console.print()

    def _status(self, stream: TokenStream, seed: int) -> Text:
        return Text(status_line(stream.result.stats, seed, self.console.width), style="dim", no_wrap=True)

    @contextmanager
    def _frames(self) -> Iterator[Callable[[RenderableType], None]]:
        """Yields a function that redraws the changing part of the window; it does nothing without cursor control."""
        if not self.console.is_interactive:
            yield lambda _: None
            return
        due = 0.0
        with Live(console=self.console, auto_refresh=False, transient=True) as live:

            def draw(picture: RenderableType) -> None:
                nonlocal due
                start = perf_counter()
                if start < due:
                    return
                live.update(picture, refresh=True)
                end = perf_counter()
                due = end + max(SHORTEST_FRAME, (end - start) / DRAWING_SHARE)

            yield draw


def _each(stream: TokenStream, take: Callable[[TokenEvent], None], stopped: Callable[[], bool]) -> bool:
    """Passes events to `take` until the stream ends or is stopped; returns whether it was stopped."""
    try:
        for event in stream:
            take(event)
            if stopped():
                return True
    except KeyboardInterrupt:
        return True
    return False


class _Tail:
    """The last lines of a renderable, as many as fit the window."""

    def __init__(self, content: RenderableType) -> None:
        self.content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self.content, options.update(height=None), pad=False)
        for line in lines[-max(1, console.height - FREE_LINES) :]:
            yield from line
            yield Segment.line()
