"""Draws a short chat as an SVG, as `mtp-spec chat` shows it: python examples/chat_picture.py [FILE.svg]"""

import io
import sys

from rich.console import Console

import mtp_spec
from mtp_spec.chat.chat import Chat
from mtp_spec.chat.loop import converse, greet
from mtp_spec.chat.screen import Screen
from mtp_spec.chat.session import Session

LINES = ["/set colour on", "Tell me a story about a fox", "/parity", "/set colour off", "List three fruits", "/exit"]


class Typed:
    """Types the lines."""

    def __init__(self, console: Console) -> None:
        self.console, self.lines = console, iter(LINES)

    def read(self) -> str | None:
        line = next(self.lines, None)
        self.console.print(f"> {line}", style="bold", markup=False)
        return line

    def agree(self, question: str) -> bool:
        return True


def main(file: str = "chat.svg") -> None:
    # a terminal whose cursor does not move: every block is drawn once
    console = Console(file=io.StringIO(), record=True, width=96, force_terminal=True, force_interactive=False,
                      color_system="truecolor", no_color=False, highlight=False)  # fmt: skip
    # a fixed tree, so that the picture does not depend on how long steps take
    params, shape = mtp_spec.SamplingParams(max_new_tokens=120, seed=4), mtp_spec.Speculation(3)
    session = Session(mtp_spec.load(measure=False), params, shape)
    chat = Chat(session, Screen(console, console), Typed(console))
    greet(chat)
    converse(chat)
    console.save_svg(file, title="mtp-spec chat")
    print(f"{session.totals.steps} steps drawn to {file}")


if __name__ == "__main__":
    main(*sys.argv[1:])
