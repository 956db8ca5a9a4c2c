"""Text to token ids and back: a checkpoint's own tokenizer, its chat template, and decoding token by token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as RawTokenizer

from mtp_spec.errors import MTPSpecError, PromptError
from mtp_spec.model.errors import CheckpointError

ROLES = ("system", "user", "assistant")


class Tokenizer:
    """A folder's tokenizer.json with the tokenizer_config.json and generation_config.json beside it.

    Attributes:
        eos_ids: tokens that end a text.

    Raises:
        CheckpointError: a file is missing or unreadable.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / "tokenizer.json"
        try:
            self.raw = RawTokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"{file} is not a readable tokenizer ({error}): download it again") from error
        config = _read_json(folder / "tokenizer_config.json")
        self.template = _default_template(config.get("chat_template"), folder)
        self._special = {
            name: _token_text(config.get(name)) for name in ("bos_token", "eos_token", "pad_token")
        }
        self.bos_id = self._id(self._special["bos_token"])
        self.add_bos = bool(config.get("add_bos_token", False))
        self.eos_ids = self._eos_ids(_read_json(folder / "generation_config.json"))
        added = self.raw.get_added_tokens_decoder()
        self._special_texts = sorted((t.content for t in added.values() if t.special), key=len, reverse=True)

    def _id(self, text: str | None) -> int | None:
        return None if text is None else self.raw.token_to_id(text)

    def _eos_ids(self, generation: Mapping[str, Any]) -> frozenset[int]:
        given = generation.get("eos_token_id")
        ids = [] if given is None else given if isinstance(given, list) else [given]
        if not all(isinstance(token, int) for token in ids):
            raise CheckpointError(f"eos_token_id of generation_config.json is {given!r}: an id or a list of ids")
        own = self._id(self._special["eos_token"])
        return frozenset([*ids, *([] if own is None else [own])])

    def encode(self, text: str) -> list[int]:
        """Returns token ids, after the beginning-of-sequence token if the model uses one.

        Special tokens written out in the text are recognised, as in the model's own tokenizer: a prompt may
        contain a chat prefix. Messages of `chat_ids` are different: there a user's text stays text.

        Raises:
            PromptError: it is no text, or none that UTF-8 can hold.
        """
        ids = self._ids_of(text)
        if self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def _ids_of(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise PromptError(f"{text!r} is no text: give a str")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(f"the text cannot be encoded: {error}; give it as UTF-8") from None
        return list(self.raw.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, special tokens left out.

        Raises:
            PromptError: something that is no id.
        """
        try:
            return str(self.raw.decode(list(ids), skip_special_tokens=True))
        except (TypeError, OverflowError) as error:
            raise PromptError(f"{ids!r} are no token ids ({error}): give integers of 0 or more") from None

    def special_text(self, token: int) -> str:
        """Returns the text of a special token, which `decode` leaves out; none for any other."""
        return self._special_of.get(token, "")

    @cached_property
    def _special_of(self) -> dict[int, str]:
        return {token: one.content for token, one in self.raw.get_added_tokens_decoder().items() if one.special}

    def chat_ids(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """Returns the ids of a conversation through the checkpoint's chat template; errors as `chat_text`."""
        return self._ids_of(self.chat_text(messages, add_generation_prompt))

    def chat_text(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns a conversation as the text that the checkpoint's chat template makes of it.

        Special tokens inside a message are broken up, so that no user can end a turn or open another.

        Raises:
            PromptError: no message, a message without role or content, or an unknown role.
            MTPSpecError: the checkpoint has no chat template, or it cannot be applied.
        """
        if self.template is None:
            raise MTPSpecError("tokenizer_config.json has no chat_template: use generate with a text")
        if isinstance(messages, str) or not isinstance(messages, Sequence):
            raise PromptError(f'{messages!r}: give a list of {{"role": ..., "content": ...}}')
        if not messages:
            raise PromptError("no messages given: chat needs at least one")
        plain = [self._message(message) for message in messages]
        if not plain[-1]["content"]:
            raise PromptError("the last message is empty: give it some text")
        try:
            return _compiled(self.template).render(
                messages=plain, add_generation_prompt=add_generation_prompt, **self._special
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise MTPSpecError(f"the checkpoint's chat template failed: {error}") from error

    def _message(self, message: Mapping[str, str]) -> dict[str, str]:
        if not isinstance(message, Mapping):
            raise PromptError(f'message {message!r}: give {{"role": ..., "content": ...}}')
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise PromptError(
                f'message {dict(message)!r}: give {{"role": one of {", ".join(ROLES)}, "content": text}}'
            )
        for special in self._special_texts:
            # a zero-width space after the first character keeps the text readable and the token apart
            content = content.replace(special, special[:1] + "\u200b" + special[1:])
        return {"role": role, "content": content}


class TextStream:
    """Decodes one token at a time; bytes of an unfinished character are held back.

    Attributes:
        pending: whether bytes are held back.
    """

    # ids kept as context, because some tokenizers decode a token differently at the start of a text
    CONTEXT = 4

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._known = 0  # ids whose text is out
        self._shown = 0  # characters out of the text of those after
        self.pending = False

    def push(self, token: int) -> str:
        """Returns the text that this token completes, possibly none."""
        self._ids.append(token)
        text = self._new_text()
        # a replacement character at the end may be the beginning of a character of several tokens
        whole = text.rstrip("\ufffd")
        self.pending = len(whole) < len(text)
        new = whole[self._shown :]
        if self.pending:
            self._shown += len(new)
        else:
            self._forget()
        return new

    def flush(self) -> str:
        """Returns what is held back; unfinished characters appear as the replacement character."""
        text = self._new_text()[self._shown :] if self.pending else ""
        self.pending = False
        self._forget()
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._known])
        return self._tokenizer.decode(self._ids)[len(before) :]

    def _forget(self) -> None:
        self._ids = self._ids[-self.CONTEXT :]
        self._known, self._shown = len(self._ids), 0


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise CheckpointError(f"a special token of tokenizer_config.json is {value!r}: a text is needed")
    return text


def _default_template(given: Any, folder: Path) -> str | None:
    """Returns the chat template; of several with names the one called default."""
    if isinstance(given, list):
        named = {one.get("name"): one.get("template") for one in given if isinstance(one, dict)}
        given = named.get("default")
    if given is not None and not isinstance(given, str):
        raise CheckpointError(f"chat_template in {folder / 'tokenizer_config.json'} is no text: download it again")
    return given


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not readable JSON ({error}): download it again") from error
    return value if isinstance(value, dict) else {}


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    """Returns a chat template, which takes longer to compile than to apply."""
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
