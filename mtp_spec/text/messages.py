"""Checks the inputs of a chat template: messages, tools and arguments, as plain values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import datetime
from typing import Any

from mtp_spec.errors import OptionError, PromptError

# names under which a message may hold its reasoning; templates read the first
REASONING = ("reasoning_content", "thinking", "reasoning")
# templates write roles into their own markers, so a role must not contain part of a marker
ROLE = re.compile(r"[\w .:/@-]+")
# arguments that are given elsewhere
ELSEWHERE = {"messages": "the messages are given first", "tools": "give tools=",
             "tokenize": "chat_text gives text, chat_ids ids"}  # fmt: skip
LISTS = (list, tuple)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat template and all its inputs.

    Attributes:
        source: the template.
        special: special tokens by name, trusted like the template itself.
        arguments: given by the caller.
        proceed: the field of the last message that the answer continues; empty if the answer is a turn of its own.
        moment: the time of rendering.
    """

    source: str
    messages: list[dict[str, Any]]
    tools: list[Any] | None
    special: Mapping[str, str]
    arguments: Mapping[str, Any]
    opens: bool
    proceed: str = ""
    moment: datetime = field(default_factory=datetime.now)


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Returns messages as plain values, without fields that are None and with reasoning under each of its names.

    Raises:
        PromptError: there is no message, or one is not a mapping with a role and content.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise PromptError(f'{messages!r}: give a list of {{"role": ..., "content": ...}}')
    if not messages:
        raise PromptError("no messages given: chat needs at least one")
    found = [_message(message, f"messages[{number}]") for number, message in enumerate(messages)]
    if found[-1]["role"] == "user" and found[-1].get("content", "") == "" and found[-1].keys() <= {"role", "content"}:
        raise PromptError("the last message is empty: give it some text")
    return found


def _message(message: Any, where: str) -> dict[str, Any]:
    value = plain(message, where)
    if not isinstance(value, dict):
        raise PromptError(f'{where} is {message!r}: give {{"role": ..., "content": ...}}')
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str) or not ROLE.fullmatch(role):
        raise PromptError(f"{where} has the role {role!r}: give a word such as user, without the marks of a token")
    if isinstance(content, bool | int | float):
        raise PromptError(f"{where} has the content {content!r}: give text, a list of parts, or None")
    known = {name: one for name, one in value.items() if one is not None}
    reasoning = next((known[name] for name in REASONING if name in known), None)
    return known if reasoning is None else {"thinking": reasoning, **known, REASONING[0]: reasoning}


def checked_tools(tools: Any) -> list[Any] | None:
    """Returns tools as plain values, None if there are none.

    Raises:
        PromptError: they are not a list of JSON schemas.
    """
    if tools is None:
        return None
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise PromptError(f"tools={tools!r}: give a list of JSON schemas, or None")
    for number, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise PromptError(
                f"tools[{number}] is {tool!r}: give a JSON schema; transformers.utils.get_json_schema makes one of a "
                "function"
            )
    return [plain(tool, f"tools[{number}]") for number, tool in enumerate(tools)]


def checked_arguments(template: Any) -> dict[str, Any]:
    """Returns the arguments of a template as plain values.

    Raises:
        OptionError: they are not a mapping from names, or a name is given elsewhere.
    """
    if template is None:
        return {}
    if not isinstance(template, Mapping) or not all(isinstance(name, str) for name in template):
        raise OptionError(
            f'template={template!r}: give the template\'s arguments, such as {{"enable_thinking": False}}'
        )
    for name in template:
        if name in ELSEWHERE:
            raise OptionError(f"template={dict(template)!r}: {name} is no argument of a template: {ELSEWHERE[name]}")
    return {name: plain(value, f"template[{name!r}]") for name, value in template.items()}


def plain(value: Any, where: str) -> Any:
    """Returns a value as JSON types only, since templates are code of the folder and get no other objects.

    Raises:
        PromptError: it has another type; `where` names it.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str | int | float | None) for key in value):
            raise PromptError(f"{where} has keys that JSON does not have: {list(value)!r}")
        return {plain(key, where): plain(one, f"{where}[{key!r}]") for key, one in value.items()}
    if isinstance(value, LISTS):
        return type(value)(plain(one, f"{where}[{number}]") for number, one in enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: plain(getattr(value, one.name), f"{where}.{one.name}") for one in fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):  # pydantic models, as API clients return
        return plain(dump(), where)
    raise PromptError(f"{where} is {value!r}: a template takes text, numbers, true, false, None, lists and mappings")


def is_written(message: Mapping[str, Any], name: str) -> bool:
    """Whether a field of a message holds a model's own output: an assistant's content and reasoning."""
    return message["role"] == "assistant" and name in ("content", *REASONING)


def strings(value: Any) -> list[str]:
    """Returns the texts in a plain value, keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for one in pair for text in strings(one)]
    return [text for one in value for text in strings(one)] if isinstance(value, LISTS) else []
