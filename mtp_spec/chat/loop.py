"""The chat's loop: reads a line, runs a command or shows an answer, and continues after any error."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

from rich.console import Console

from mtp_spec.api import LM
from mtp_spec.chat.chat import Chat
from mtp_spec.chat.commands import run_command, suggestions
from mtp_spec.chat.reading import LineReader, Reader, SharedReader, TerminalReader, unquoted
from mtp_spec.chat.screen import Screen
from mtp_spec.chat.session import MAX_NEW_TOKENS, Session
from mtp_spec.chat.settings import shape_text
from mtp_spec.chat.status import counted
from mtp_spec.console import standard_input
from mtp_spec.errors import MTPSpecError
from mtp_spec.kernels.cpu import engine
from mtp_spec.model.errors import RankError
from mtp_spec.sampling.params import SamplingParams


def converse(chat: Chat) -> None:
    """Runs a chat until its reader ends, `/exit`, or Ctrl-C twice at an empty prompt."""
    while not chat.leaving:
        try:
            text = chat.reader.read()
        except KeyboardInterrupt:
            chat.leaving = chat.interrupted
            chat.interrupted = True
            if not chat.leaving:
                chat.screen.say("once more, Ctrl-D or /exit leaves")
            continue
        if text is None:
            return
        chat.interrupted = False
        if text.strip():
            _answer(chat, text)


def _answer(chat: Chat, text: str) -> None:
    try:
        if text.startswith("/"):
            run_command(chat, unquoted(text))
        else:
            chat.ask(unquoted(text))
    except (BrokenPipeError, SystemExit, RankError):
        raise
    except KeyboardInterrupt:
        chat.interrupted = True
    except MTPSpecError as error:
        chat.screen.complain(str(error))
    except Exception as error:  # an error must not cost the user the conversation
        chat.screen.complain(f"{type(error).__name__}: {error}. The chat goes on; /save FILE keeps it")


def run_chat(
    lm: LM,
    options: Mapping[str, Any],
    system: str | None = None,
    prompt: str | None = None,
    history: Path | None = None,
) -> None:
    """Runs the chat of the command line.

    Args:
        options: as for `LM.chat`; the length of an answer is `MAX_NEW_TOKENS` if not given.
        prompt: if given, only this question is answered; "-" reads it from standard input.
        history: a file for the input history in place of the default one.
    """
    given = {"max_new_tokens": MAX_NEW_TOKENS, **lm.defaults.applied(options)}
    speculation = given.pop("speculation", "auto")
    template, tools = given.pop("template", None), given.pop("tools", None)
    session = Session(lm, SamplingParams.from_options(given), speculation, system, template, tools)
    lm.speculation_for(speculation)
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a character that cannot be read must not end the chat
    chat = open_chat(session, history=history)
    if prompt is not None:
        ranks = lm.model.ranks
        if prompt == "-":
            prompt = ranks.from_first(standard_input() if ranks.rank == 0 else None)
        chat.ask(prompt)
        if chat.interrupted:
            raise KeyboardInterrupt
        return
    greet(chat)
    converse(chat)


def greet(chat: Chat) -> None:
    """Says what is running."""
    lm = chat.session.lm
    chat.screen.say(
        f"{lm.config.model_type}, {lm.config.num_hidden_layers} layers, {counted(len(lm.model.mtp), 'MTP module')}, "
        f"context {lm.max_context}, speculation {shape_text(chat.session.speculation)}. /help lists the commands"
    )
    if lm.model.device.type == "cpu" and (obstacle := engine.why_not()) is not None:
        chat.screen.say(f"runs by torch, slowly: {obstacle}")


def open_chat(session: Session, console: Console | None = None, history: Path | None = None) -> Chat:
    """Returns a chat on this process's terminal or pipes; of several processes only the first reads and prints."""
    ranks = session.lm.model.ranks
    if ranks.rank:
        silent = Console(file=open(os.devnull, "w"))  # noqa: SIM115 - for as long as the process lives
        return Chat(session, Screen(silent, silent), SharedReader(None, ranks))
    console = console or Console(highlight=False)
    screen = Screen(console, Console(stderr=True, highlight=False))
    reader: Reader = LineReader(StringIO() if sys.stdin is None else sys.stdin)
    if sys.stdin is not None and sys.stdin.isatty() and console.is_terminal and not console.is_dumb_terminal:
        reader = TerminalReader(suggestions, _writable(history or _history_file(), screen))
    return Chat(session, screen, reader if ranks.size == 1 else SharedReader(reader, ranks))


def _history_file() -> Path | None:
    """Returns the file of the input history; None for a user without a home."""
    state = os.environ.get("XDG_STATE_HOME")
    with suppress(RuntimeError):
        return (Path(state) if state else Path.home() / ".local" / "state") / "mtp-spec" / "chat_history"
    return None


def _writable(file: Path | None, screen: Screen) -> Path | None:
    """Returns the file if the input history can be written there."""
    if file is None:
        return None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a"):
            return file
    except OSError as error:
        screen.complain(f"what you type is not kept after this chat: {file}: {error.strerror}")
        return None
