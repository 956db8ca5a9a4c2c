"""Sources of questions and commands: the keyboard, or lines of text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.buffer import CompletionState
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output

from mtp_spec.model.distributed.group import Ranks

QUOTES = '"""'
OPENED = re.compile(rf"\s*(/\w+\s+)?{QUOTES}")
PROMPT, CONTINUED = "> ", "  "
Suggest = Callable[[str], Iterable[str]]


class Reader(Protocol):
    """A source of input."""

    def read(self) -> str | None:
        """Returns the next question or command as typed, None at the end.

        Raises:
            KeyboardInterrupt: Ctrl-C at an empty prompt.
        """

    def agree(self, question: str) -> bool:
        """Returns whether the user says yes; false if there is no user to ask."""


def is_open(text: str) -> bool:
    """Returns whether a text began with three quotes that are not closed yet."""
    return OPENED.match(text) is not None and text.count(QUOTES) % 2 == 1


def unquoted(text: str) -> str:
    """Returns a text without the three quotes around it, or around a command's argument."""
    opened = OPENED.match(text)
    end = text.rstrip()
    if opened is None or text.count(QUOTES) < 2 or not end.endswith(QUOTES):
        return text.strip()
    return (opened[1] or "") + end[opened.end() : -len(QUOTES)].strip("\n")


class LineReader:
    """Reads questions and commands from lines, one each, or several between three quotes."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = iter(lines)

    def read(self) -> str | None:
        text = next(self._lines, None)
        if text is None:
            return None
        while is_open(text) and (more := next(self._lines, None)) is not None:
            text = text.rstrip("\n") + "\n" + more
        return text

    def agree(self, question: str) -> bool:
        return False


class SharedReader:
    """Reads in the first of several processes and passes the input to all, so that they do the same.

    Args:
        reader: of the first; None in the others.
    """

    def __init__(self, reader: Reader | None, ranks: Ranks) -> None:
        self._reader, self._ranks = reader, ranks

    def read(self) -> str | None:
        text = None
        if self._reader is not None:
            with suppress(KeyboardInterrupt):  # the launcher of the processes ends them
                text = self._reader.read()
        return self._ranks.from_first(text)

    def agree(self, question: str) -> bool:
        return self._ranks.from_first(self._reader is not None and self._reader.agree(question))


class TerminalReader:
    """Reads from the keyboard, with history and completion.

    Args:
        suggest: returns the possible words at the cursor, given the text before.
        history: a file, or None to keep the history for this chat only.
        input: of prompt_toolkit, for tests.
        output: of prompt_toolkit, for tests.
    """

    def __init__(
        self, suggest: Suggest, history: Path | None = None, input: Input | None = None, output: Output | None = None
    ) -> None:
        remembered: History = InMemoryHistory() if history is None else _History(str(history))
        self._session: PromptSession[str] = PromptSession(
            history=remembered,
            completer=_Words(suggest),
            key_bindings=_keys(),
            multiline=True,
            input=input,
            output=output,
            prompt_continuation=CONTINUED,
            reserve_space_for_menu=6,
        )
        self._plain: PromptSession[str] = PromptSession(input=input, output=output)

    def read(self) -> str | None:
        try:
            return self._session.prompt(FormattedText([("bold", PROMPT)]))
        except EOFError:
            return None

    def agree(self, question: str) -> bool:
        try:
            return self._plain.prompt(f"{question} [Y/n] ").strip().lower() in ("", "y", "yes")
        except (EOFError, KeyboardInterrupt):
            return False


def _keys() -> KeyBindings:
    keys, typing = KeyBindings(), has_focus(DEFAULT_BUFFER)

    @keys.add("enter", filter=typing)
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("tab", filter=typing)
    def complete(event: KeyPressEvent) -> None:
        # completes immediately; prompt_toolkit's own completion would come after the keys that follow
        buffer = event.current_buffer
        if not buffer.complete_state or not buffer.complete_state.completions:
            found = list(buffer.completer.get_completions(buffer.document, CompleteEvent(completion_requested=True)))
            buffer.complete_state = CompletionState(buffer.document, found)
        buffer.complete_next()

    @keys.add("c-c", filter=typing)
    def empty_or_leave(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    return keys


class _History(FileHistory):
    """The file of the input history; a full disk does not end the chat."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


class _Words(Completer):
    """Completes commands and their words, not questions."""

    def __init__(self, suggest: Suggest) -> None:
        self._suggest = suggest

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        before = document.text_before_cursor
        if not before.startswith("/") or "\n" in before:
            return
        word = before[max(before.rfind(" "), before.rfind("\t")) + 1 :]
        for full in self._suggest(before):
            if full.startswith(word):
                yield Completion(full, start_position=-len(word))
