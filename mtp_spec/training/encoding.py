"""Chats to token ids on all cores: most of the time goes into telling a template's markers from a message's text.

Other processes share the work, each with the checkpoint's tokenizer alone. They are started once there are so many
lines that it pays, and lines come back in their order.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

from mtp_spec.api import LM
from mtp_spec.errors import MTPSpecError, OptionError
from mtp_spec.text import Tokenizer
from mtp_spec.training.texts import Span, text_of

ALONE = 2000  # lines that take as long as it takes to start the others
PART = 64  # lines that a process is sent at a time
MOST = 8  # processes, each of some 300 MB
Entry = dict[str, Any]
Encoded = tuple[int, Entry, list[int], list[Span]]  # number, object, ids, what counts


def encoded(lm: LM, lines: Iterable[tuple[int, Entry]], file: Path) -> Iterator[Encoded]:
    """Yields the ids of each line's text, in order.

    Raises:
        OptionError: a line has no text.
        MTPSpecError: one of the processes ended.
    """
    remaining = iter(lines)
    for number, entry in islice(remaining, ALONE):
        yield number, entry, *text_of(lm, entry, _where(file, number))
    count = min(MOST, os.cpu_count() or 1)
    first = next(remaining, None)
    if first is None:
        return
    if lm.tokenizer is None or count < 2:
        for number, entry in (first, *remaining):
            yield number, entry, *text_of(lm, entry, _where(file, number))
        return
    with _Others(lm.tokenizer.folder, count) as others:
        parts = deque[tuple[list[tuple[int, Entry]], Future[Any]]]()
        waiting = [first]
        while waiting or parts:
            if waiting:
                waiting += islice(remaining, PART - len(waiting))
                parts.append((waiting, others.encode([(entry, _where(file, number)) for number, entry in waiting])))
                waiting = list(islice(remaining, 1))
            if len(parts) > 2 * count or not waiting:
                own, told = parts.popleft()
                for (number, entry), (ids, spans) in zip(own, told.result(), strict=True):
                    yield number, entry, ids, spans


class _Others:
    """Processes that encode; none of them runs the caller's script again, as those of multiprocessing would."""

    def __init__(self, folder: Path, count: int) -> None:
        self._idle = SimpleQueue[subprocess.Popen[bytes]]()
        self._threads = ThreadPoolExecutor(count)
        self._ended = ExitStack()
        command = [sys.executable, "-c", "from mtp_spec.training.encoding import serve; serve()", str(folder)]
        paths = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                 "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
        for _ in range(count):
            other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=paths)
            self._ended.callback(_end, other)
            self._idle.put(other)

    def encode(self, part: list[tuple[Entry, str]]) -> Future[Any]:
        return self._threads.submit(self._asked, part)

    def _asked(self, part: list[tuple[Entry, str]]) -> list[tuple[list[int], list[Span]]]:
        other = self._idle.get()
        try:
            assert other.stdin is not None
            assert other.stdout is not None
            pickle.dump(part, other.stdin)
            other.stdin.flush()
            found = pickle.load(other.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise MTPSpecError(f"a process that encodes texts ended ({error}): give memory, and go on") from None
        finally:
            self._idle.put(other)
        if isinstance(found, str):
            raise OptionError(found)
        return cast(list[tuple[list[int], list[Span]]], found)

    def __enter__(self) -> _Others:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._ended.close()


def serve() -> None:
    """Encodes what comes in until nothing does; `sys.argv[1]` is the tokenizer's folder."""
    tokenizer, out = Tokenizer(Path(sys.argv[1])), sys.stdout.buffer
    while True:
        try:
            part = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        found: Any = []
        try:
            found = [text_of(tokenizer, entry, where) for entry, where in part]
        except OptionError as error:
            found = str(error)
        pickle.dump(found, out)
        out.flush()


def _end(other: subprocess.Popen[bytes]) -> None:
    other.kill()
    other.communicate()


def _where(file: Path, number: int) -> str:
    return f"{file}, line {number + 1}"
