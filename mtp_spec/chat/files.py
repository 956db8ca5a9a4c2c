"""Conversations as files: JSON with the messages in the form of chat APIs, and the settings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mtp_spec.chat.session import Message, Session, Turn
from mtp_spec.chat.settings import NAMES, parse_shape, shape_text
from mtp_spec.chat.status import counted
from mtp_spec.errors import OptionError
from mtp_spec.sampling.params import SamplingParams

SHOWN = 60


def save(session: Session, file: Path) -> str:
    """Writes a conversation; returns a description of what was done.

    Raises:
        OptionError: the file exists and is not a conversation, or cannot be written.
    """
    if file.exists():
        _check_replaceable(file)
    params = asdict(session.params)
    document = {
        "messages": session.messages(),
        "settings": {name: params[name] for name in NAMES},
        "speculation": shape_text(session.speculation),
        **({"template": session.template} if session.template else {}),
    }
    try:
        file.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OptionError(f"/save {file}: {error.strerror}") from error
    return f"{counted(len(session.turns), 'turn')} written to {file}"


def _check_replaceable(file: Path) -> None:
    try:
        _turns(_read(file, "it")["messages"], file)
    except OptionError as error:
        raise OptionError(f"/save {file}: the file is no conversation and is not overwritten") from error


def load(session: Session, file: Path) -> str:
    """Loads a conversation, and the settings if the file has them; returns a description of what was done.

    Raises:
        OptionError: the file cannot be read or is not a conversation; nothing is changed then.
    """
    document = _read(file, f"/load {file}: this is no conversation")
    system, turns = _turns(document["messages"], file)
    given = document.get("settings", {})
    if "logit_bias" in given and isinstance(given["logit_bias"], Mapping):
        # JSON keys are strings
        given["logit_bias"] = {int(token): amount for token, amount in given["logit_bias"].items()}
    params = SamplingParams.from_options(given) if given else session.params
    shape = parse_shape(document["speculation"]) if "speculation" in document else session.speculation
    template = document.get("template", session.template)
    if not isinstance(template, dict):
        raise OptionError(f"{file}: template is {template!r}: give its arguments by name")
    session.set_template(template)
    session.system, session.turns, session.params, session.speculation = system, turns, params, shape
    return f"{counted(len(turns), 'turn')} read from {file}"


def _read(file: Path, problem: str) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise OptionError(f"{problem} ({error})") from error
    if isinstance(document, list):
        document = {"messages": document}
    if not isinstance(document, dict) or not isinstance(document.get("messages"), list):
        raise OptionError(f'{problem}: there is no list of "messages"')
    return document


def _turns(messages: list[Any], file: Path) -> tuple[str | None, list[Turn]]:
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise OptionError(f'{file}: message {message!r} has no "role" and "content"')
    plain: list[Message] = messages
    system = None
    if plain and plain[0]["role"] == "system":
        system, plain = plain[0]["content"], plain[1:]
    roles = [message["role"] for message in plain]
    if len(plain) % 2 or roles != ["user", "assistant"] * (len(plain) // 2):
        raise OptionError(f"{file}: after a system message, user and assistant must alternate, an answer last")
    pairs = zip(plain[::2], plain[1::2], strict=True)
    return system, [Turn(question["content"], answer["content"]) for question, answer in pairs]


def matching(word: str) -> Iterable[str]:
    """Returns paths that begin with a word, folders with a slash."""
    folder, _, name = word.rpartition("/")
    base = Path(f"{folder}/" if "/" in word else ".").expanduser()
    try:
        found = sorted(path for path in base.iterdir() if path.name.startswith(name))
    except OSError:
        return ()
    prefix = f"{folder}/" if "/" in word else ""
    return [f"{prefix}{path.name}{'/' if path.is_dir() else ''}" for path in found]


def beginning(text: str) -> str:
    """Returns the first line of a text, shortened."""
    line = text.strip().splitlines()[0] if text.strip() else ""
    return line if len(line) <= SHOWN and line == text.strip() else line[:SHOWN] + " ..."
