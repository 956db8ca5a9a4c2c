"""Texts to train on, and texts that are held out: read, told apart, kept on disk as token ids.

A file has one JSON object a line, compressed (.gz, .xz) or not. A text is `{"text": ...}`, of which every token counts,
or `{"messages": [...]}`, of which the assistant's answers count. A prompt is `{"prompt": ...}` or `{"messages": [...]}`
without its last answer. "domain", or "category", says what kind of text a line is.

Texts that occur again are left out, and texts whose prompt is held out are held out: nothing is measured on a prompt
that was trained on.
"""

from __future__ import annotations

import gzip
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from math import ceil
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from mtp_spec.api import LM
from mtp_spec.errors import MTPSpecError, OptionError
from mtp_spec.option_checks import shown

IDS, INDEX = "ids.bin", "index.jsonl"
DOMAINS = ("domain", "category")
OTHER = "all"  # the domain of lines that name none
HELD = "held_out"  # the source whose texts are all held out
ANSWERS = "prompts"  # the source whose texts are the model's own answers
SURROGATE = re.compile("[\ud800-\udfff]")  # such a half has no UTF-8, so it could be neither encoded nor written
BEGINNING = 32  # tokens of a text that stand for its prompt

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Text:
    """A text.

    Attributes:
        source: which option named its file.
        line: number of its line, from 0 on.
        start: its first token's place in the file of ids.
        length: number of tokens.
        answers: begin and end of the runs of tokens that count.
        domain: what kind of text it is.
        held: whether it is held out.
    """

    source: str
    line: int
    start: int
    length: int
    answers: tuple[Span, ...]
    domain: str
    held: bool

    @property
    def prompt(self) -> int:
        """Number of tokens before the first answer; of plain text, of its beginning."""
        return prompt_length(self.answers[0][0], self.length)


class Corpus:
    """Texts in a folder; what was added is there again after a crash, but for a line that was being written.

    Args:
        folder: created if it does not exist.
        share: of the prompts of each domain that is held out.
    Attributes:
        texts: in the order in which they were added.
        left_out: number of texts that had occurred before.
    """

    def __init__(self, folder: Path, share: float) -> None:
        self.folder, self.left_out = folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        self._share = share
        self._known: set[bytes] = set()
        self._prompts: dict[bytes, bool] = {}
        self._counts: dict[str, int] = {}
        self.texts, size = _read_index(folder / INDEX)
        end = max((text.start + text.length for text in self.texts), default=0)
        stored = (folder / IDS).stat().st_size if (folder / IDS).is_file() else 0
        if stored < 4 * end:
            raise MTPSpecError(
                f"{folder / IDS} has {stored} bytes of {4 * end}: delete {folder.parent} and start again"
            )
        self._ids, self._index = (folder / IDS).open("ab"), (folder / INDEX).open("a", encoding="utf-8")
        self._ids.truncate(4 * end)
        self._index.truncate(size)
        self._end = end
        self._stored: npt.NDArray[np.int32] = np.empty(0, np.int32)
        for text in self.texts:
            self._told(self.ids(text), text.prompt, text.domain, text.source)

    @property
    def tokens(self) -> int:
        return self._end

    def next_line(self, source: str) -> int:
        """Returns the line of a source to go on with: the last one, of which some pieces may be missing."""
        return max((text.line for text in self.texts if text.source == source), default=0)

    def add(self, source: str, line: int, ids: list[int], answers: Iterable[Span], domain: str) -> None:
        """Adds a text unless it has occurred; all texts of the source HELD are held out, of others some prompts."""
        spans = tuple(answers)
        new, held = self._told(ids, prompt_length(spans[0][0], len(ids)), domain, source)
        if not new:
            self.left_out += 1
            return
        text = Text(source, line, self._end, len(ids), spans, domain, held)
        self._ids.write(np.asarray(ids, np.int32).tobytes())
        self._ids.flush()
        self._index.write(json.dumps(asdict(text)) + "\n")
        self._index.flush()
        self._end += len(ids)
        self.texts.append(text)

    def ids(self, text: Text) -> npt.NDArray[np.int32]:
        """Returns a text's token ids."""
        end = text.start + text.length
        if len(self._stored) < end:
            self._stored = np.memmap(self.folder / IDS, np.int32, "r")
        return np.array(self._stored[text.start : end])

    def close(self) -> None:
        for file in (self._ids, self._index):
            os.fsync(file.fileno())
            file.close()

    def _told(self, ids: Any, prompt: int, domain: str, source: str) -> tuple[bool, bool]:
        """Returns whether ids are new, and whether their prompt is held out; remembers both."""
        whole = np.asarray(ids, np.int32)
        key, begin = _digest(whole), _digest(whole[:prompt])
        new = key not in self._known
        self._known.add(key)
        if source == HELD:
            self._prompts[begin] = True
        elif begin not in self._prompts:
            count = self._counts.get(domain, 0)
            self._counts[domain] = count + 1
            # the first of a domain, and then as many as keep the share
            before, after = (ceil(round(prompts * self._share, 9)) for prompts in (count, count + 1))
            self._prompts[begin] = after > before
        return new, self._prompts[begin]


def read_lines(file: Path, first: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the number and object of each line from `first` on.

    Raises:
        OptionError: the file cannot be read, or a line is no JSON object.
    """
    number = -1
    try:
        with _opened(file) as lines:
            for number, line in enumerate(lines):
                if number < first or not line.strip():
                    continue
                entry = json.loads(line)
                if not isinstance(entry, dict):
                    raise ValueError("no object")
                if "\\u" in line and SURROGATE.search(json.dumps(entry, ensure_ascii=False)):
                    raise ValueError("half of a surrogate pair, such as \\ud83d, is no character")
                yield number, entry
    except (OSError, ValueError, EOFError, RecursionError, lzma.LZMAError, zlib.error) as error:
        # characters are decoded many lines at a time, so only a line's own error has a number
        of_line = isinstance(error, ValueError | RecursionError) and not isinstance(error, UnicodeError)
        where = f"{file}, line {number + 1}," if of_line else f"{file}"
        raise OptionError(f"{where} cannot be read ({error}): give one JSON object a line") from error


def check_file(file: Path, kinds: Sequence[str]) -> None:
    """Reads a file's lines and rejects one that has neither messages nor one of the kinds, before any work starts.

    Raises:
        OptionError: there is such a line, or the file is empty.
    """
    number = -1
    wanted = " or ".join(f'"{kind}"' for kind in (*kinds, "messages"))
    for number, entry in read_lines(file):
        if not any(isinstance(entry.get(kind), str) for kind in kinds):
            messages = _messages(entry, f"{file}, line {number + 1}", wanted)
            answered = "text" in kinds and any(message.get("role") == "assistant" for message in messages)
            if "prompt" in kinds and not answered:
                _asked(messages, f"{file}, line {number + 1}")
    if number < 0:
        raise OptionError(f"{file} is empty: give one JSON object a line")


def prompt_length(first: int, length: int) -> int:
    """Returns how many of a text's tokens are its prompt, if its first answer begins at token `first`."""
    return first if first > 1 else min(BEGINNING, length)


def domain_of(entry: Mapping[str, Any]) -> str:
    """Returns what kind of text a line is, as one line of a table."""
    named = (" ".join(str(entry[name]).replace("|", "/").split()) for name in DOMAINS if entry.get(name))
    return next(filter(None, named), OTHER)


def text_of(lm: LM, entry: Mapping[str, Any], where: str) -> tuple[list[int], list[Span]]:
    """Returns the ids of a text and the runs that count; none if its template renders it otherwise than its prompt.

    Raises:
        OptionError: the line has no text.
    """
    messages = None if isinstance(entry.get("text"), str) else _messages(entry, where, '"text" or "messages"')
    try:
        if messages is not None:
            return _chat(lm, messages)
        ids = lm.encode(entry["text"])
    except MTPSpecError as error:
        raise OptionError(f"{where}: {error}") from error
    return ids, [(1, len(ids))] if len(ids) > 1 else []


def prompt_of(lm: LM, entry: Mapping[str, Any], where: str) -> list[int]:
    """Returns the ids of a prompt, a chat's up to where its last answer begins.

    Raises:
        OptionError: the line has no prompt.
    """
    messages: list[Any] = [{"role": "user", "content": entry.get("prompt")}]
    if not isinstance(entry.get("prompt"), str):
        messages = _messages(entry, where, '"prompt" or "messages"')
    asked = _asked(messages, where)
    try:
        if isinstance(entry.get("prompt"), str) and lm.tokenizer is not None and not lm.tokenizer.templates:
            return lm.encode(entry["prompt"])
        return lm.chat_ids(messages[: asked + 1])
    except MTPSpecError as error:
        raise OptionError(f"{where}: {error}") from error


def _chat(lm: LM, messages: list[Any]) -> tuple[list[int], list[Span]]:
    whole, spans = lm.chat_ids(messages, add_generation_prompt=False), list[Span]()
    for number, message in enumerate(messages):
        if message.get("role") != "assistant" or not number:
            continue
        before = lm.chat_ids(messages[:number])
        last = number + 1 == len(messages)
        after = whole if last else lm.chat_ids(messages[: number + 1], add_generation_prompt=False)
        # some templates render an answer otherwise once another turn follows
        if after[: len(before)] == before and whole[: len(after)] == after and len(after) > len(before):
            spans.append((len(before), len(after)))
    return whole, spans


def _messages(entry: Mapping[str, Any], where: str, wanted: str) -> list[Any]:
    messages = entry.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        given = [f'"{name}" is {shown(entry[name])}' for name in ("prompt", "text", "messages") if name in entry]
        found = ", ".join(given) or f"its keys are {', '.join(map(repr, entry)) or 'none'}"
        raise OptionError(f"{where} has no {wanted}, a text or a list of messages: {found}")
    return messages


def _asked(messages: Sequence[Mapping[str, Any]], where: str) -> int:
    """Returns the place of the user's last message.

    Raises:
        OptionError: there is none.
    """
    asked = max((number for number, message in enumerate(messages) if message.get("role") == "user"), default=-1)
    if asked < 0:
        raise OptionError(f"{where}: none of its messages is the user's, so there is nothing to answer")
    return asked


def _read_index(file: Path) -> tuple[list[Text], int]:
    """Returns the texts that are listed whole, and the size of their lines."""
    texts, size = list[Text](), 0
    if file.is_file():
        for line in file.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            values = json.loads(line)
            texts.append(Text(**{**values, "answers": tuple((begin, end) for begin, end in values["answers"])}))
            size += len(line)
    return texts, size


def _opened(file: Path) -> TextIO:
    kinds: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
    opened: TextIO = kinds.get(file.suffix, open)(file, "rt", encoding="utf-8-sig")
    return opened


def _digest(ids: npt.NDArray[np.int32]) -> bytes:
    return sha256(ids.tobytes()).digest()[:16]
