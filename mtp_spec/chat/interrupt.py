"""Ctrl-C while an answer is generated: the first one stops it after the current step, a second one immediately."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

# makes a terminal mark the beginning and end of a paste, so that its lines stay one question
MARK_PASTES, LEAVE_PASTES = "\x1b[?2004h", "\x1b[?2004l"


class Interrupt:
    """Attributes:
    asked: whether Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def interruptible(quiet: bool) -> Iterator[Interrupt]:
    """Yields an `Interrupt`; with `quiet`, keys typed ahead are not echoed and wait for the next prompt."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield interrupt
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with _quiet_keys() if quiet else nullcontext():
            yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _quiet_keys() -> Iterator[None]:
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    # a process in the background would be stopped for touching the terminal
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.tcgetpgrp(sys.stdin.fileno()) != os.getpgrp():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = [*before]
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    sys.stdout.write(MARK_PASTES)
    try:
        yield
    finally:
        sys.stdout.write(LEAVE_PASTES)
        sys.stdout.flush()
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
