"""Selects a folder's chat template and renders conversations with it, as in transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from warnings import warn

from jinja2 import Template

from mtp_spec.errors import MTPSpecError, OptionError, PromptError
from mtp_spec.text.environment import MOMENT, RaisedByTemplateError, compiled, variables
from mtp_spec.text.messages import (
    LISTS,
    REASONING,
    Conversation,
    checked_arguments,
    checked_messages,
    checked_tools,
)  # fmt: skip

# appended to the text to continue, to find its end in the rendered text
END_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


def conversation(
    templates: Mapping[str, str],
    special: Mapping[str, str],
    messages: Any,
    template: Any = None,
    tools: Any = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool | str = False,
) -> Conversation:
    """Returns the checked conversation; arguments as for `Tokenizer.chat_text`.

    Raises:
        PromptError, OptionError: an input is invalid.
        MTPSpecError: there is no template, or one has to be chosen by name.
    """
    arguments = checked_arguments(template)
    opens = arguments.pop("add_generation_prompt", add_generation_prompt)
    proceed = arguments.pop("continue_final_message", continue_final_message)
    if not isinstance(opens, bool) or not isinstance(proceed, bool | str):
        raise OptionError(
            f"add_generation_prompt={opens!r}, continue_final_message={proceed!r}: give True or False; the latter may "
            "name the field to continue"
        )
    checked = checked_messages(messages)
    if checked[-1].get("prefix") is True:
        proceed = proceed or True
    field = proceed if isinstance(proceed, str) else "content" if proceed else ""
    known_tools = checked_tools(tools)
    source = _chosen(templates, arguments.pop("chat_template", None), known_tools)
    named = {**special, **{name: value for name, value in arguments.items() if name in special}}
    others = {name: value for name, value in arguments.items() if name not in special}
    _check_read(source, [*others, *(["tools"] if known_tools else [])])
    if field:
        _check_continues(source, checked[-1], field)
    return Conversation(source, checked, known_tools, named, others, opens and not field, field)


def _chosen(templates: Mapping[str, str], name: Any, tools: list[Any] | None) -> str:
    if name is not None:
        if isinstance(name, str) and name in templates:
            return templates[name]
        if isinstance(name, str) and "{" in name:
            return name
        raise OptionError(
            f"chat_template={name!r}: there are {', '.join(templates) or 'none'}; or give a template's text"
        )
    if tools is not None and "tool_use" in templates:
        return templates["tool_use"]
    if "default" in templates:
        return templates["default"]
    if templates:
        raise MTPSpecError(
            f"none of the chat templates ({', '.join(templates)}) is the default: choose one, with "
            f'template={{"chat_template": {next(iter(templates))!r}}}'
        )
    raise MTPSpecError(
        "the checkpoint has no chat template (chat_template in tokenizer_config.json, or chat_template.jinja): use "
        'generate with a text, or give template={"chat_template": ...}'
    )


def _check_read(source: str, names: list[str]) -> None:
    """Warns of arguments without effect, which transformers does not.

    Raises:
        MTPSpecError: the template is invalid.
    """
    try:
        unread = [name for name in names if name not in variables(source)]
    except Exception as error:  # jinja2 compiles it to Python
        raise _failed(error) from error
    if unread:
        warn(f"the chat template does not read {', '.join(unread)}: the text is the same without", stacklevel=5)


def _check_continues(source: str, message: Mapping[str, Any], field: str) -> None:
    if not _text_to_continue(message.get(field)):
        raise PromptError(f"the last message has no {field} that the answer could continue: {dict(message)!r}")
    if not any(name in source for name in _copies(message, field)):
        raise PromptError(f"continue_final_message={field!r}: the chat template does not write this field")


def _copies(message: Mapping[str, Any], field: str) -> list[str]:
    """Returns the names of the message's fields that hold the text to continue."""
    if field not in REASONING:
        return [field]
    return [name for name in REASONING if message.get(name) == message.get(field)]


def _text_to_continue(value: Any) -> list[str]:
    """Returns a list with the last text of a field; an empty one if there is none."""
    if isinstance(value, str):
        return [value]
    parts = [part["text"] for part in value if isinstance(part, dict) and isinstance(part.get("text"), str)] \
        if isinstance(value, LISTS) else []  # fmt: skip
    return parts[-1:]


def _left_open(message: dict[str, Any], field: str) -> dict[str, Any]:
    """Returns a message with the mark after the text to continue."""
    value = message[field]
    if isinstance(value, str):
        return {**message, **{name: message[name] + END_MARK for name in _copies(message, field)}}
    last = max(i for i, part in enumerate(value) if isinstance(part, dict) and isinstance(part.get("text"), str))
    parts = [{**part, "text": part["text"] + END_MARK} if i == last else part for i, part in enumerate(value)]
    return {**message, field: parts}


def rendered(asked: Conversation, template: Template | None = None) -> str:
    """Returns the text of a conversation.

    Args:
        template: used in place of the conversation's own.

    Raises:
        PromptError: the template raises an error of its own, or omits the text to continue.
        MTPSpecError: it fails.
    """
    messages = asked.messages
    if asked.proceed:
        messages = [*messages[:-1], _left_open(messages[-1], asked.proceed)]
    token = MOMENT.set(asked.moment)
    try:
        text = (template or compiled(asked.source)).render(
            {"documents": None, **asked.special, **asked.arguments, "messages": messages, "tools": asked.tools,
             "add_generation_prompt": asked.opens}
        )  # fmt: skip
    except RaisedByTemplateError as error:
        raise PromptError(f"the checkpoint's chat template refuses this conversation: {error}") from error
    except Exception as error:  # a template's code may raise any: SyntaxError, MemoryError
        bare = [number for number, message in enumerate(asked.messages) if "content" not in message]
        if bare:
            raise PromptError(f"the chat template failed ({error}), and messages[{bare[0]}] has no content") from error
        raise _failed(error) from error
    finally:
        MOMENT.reset(token)
    return _cut(text, asked) if asked.proceed else text


def _failed(error: Exception) -> MTPSpecError:
    return MTPSpecError(f"the checkpoint's chat template failed: {str(error) or type(error).__name__}")


def _cut(text: str, asked: Conversation) -> str:
    mark, wanted = END_MARK.strip(), _text_to_continue(asked.messages[-1][asked.proceed])[0].strip()
    if mark not in text or wanted not in text:
        raise PromptError(
            f"the chat template does not write the {asked.proceed} of the last message as it stands, so no answer can "
            f"continue it: {wanted!r}"
        )
    end = text.rindex(mark)
    # a template that strips what it writes strips the mark's own space too
    return text[:end] if text.startswith(END_MARK, end) else text[:end].rstrip()
