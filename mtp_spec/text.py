"""Text to token ids and back: a checkpoint's own tokenizer, its chat template, and decoding token by token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
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
        self.template: str | None = config.get("chat_template")
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
        own = self._id(self._special["eos_token"])
        return frozenset([*ids, *([] if own is None else [own])])

    def encode(self, text: str) -> list[int]:
        """Returns token ids, after the beginning-of-sequence token if the model uses one.

        Special tokens written out in the text are recognised, as in the model's own tokenizer: a prompt may
        contain a chat prefix. Messages of `chat_ids` are different: there a user's text stays text.
        """
        ids = list(self.raw.encode(text, add_special_tokens=False).ids)
        if self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, special tokens left out."""
        return str(self.raw.decode(list(ids), skip_special_tokens=True))

    def chat_ids(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """Returns the ids of a conversation through the checkpoint's chat template; errors as `chat_text`."""
        return list(self.raw.encode(self.chat_text(messages, add_generation_prompt), add_special_tokens=False).ids)

    def chat_text(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns a conversation as the text that the checkpoint's chat template makes of it.

        Special tokens inside a message are broken up, so that no user can end a turn or open another.

        Raises:
            PromptError: no message, a message without role or content, or an unknown role.
            MTPSpecError: the checkpoint has no chat template, or it cannot be applied.
        """
        if self.template is None:
            raise MTPSpecError("tokenizer_config.json has no chat_template: use generate with a text")
        if not messages:
            raise PromptError("no messages given: chat needs at least one")
        plain = [self._message(message) for message in messages]
        if not plain[-1]["content"]:
            raise PromptError("the last message is empty: give it some text")
        try:
            return _compiled(self.template).render(
                messages=plain, add_generation_prompt=add_generation_prompt, **self._special
            )
        except TemplateError as error:
            raise MTPSpecError(f"the checkpoint's chat template failed: {error}") from error

    def _message(self, message: Mapping[str, str]) -> dict[str, str]:
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
        self.pending = False

    def push(self, token: int) -> str:
        """Returns the text that this token completes, possibly none."""
        self._ids.append(token)
        text = self._new_text()
        # a replacement character at the end may be the beginning of a character of several tokens
        self.pending = text.endswith("\ufffd")
        if self.pending:
            return ""
        self._forget()
        return text

    def flush(self) -> str:
        """Returns what is held back; unfinished characters appear as the replacement character."""
        text = self._new_text() if self.pending else ""
        self.pending = False
        self._forget()
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._known])
        return self._tokenizer.decode(self._ids)[len(before) :]

    def _forget(self) -> None:
        self._ids = self._ids[-self.CONTEXT :]
        self._known = len(self._ids)


def _token_text(value: Any) -> str | None:
    return value.get("content") if isinstance(value, dict) else value


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not readable JSON ({error}): download it again") from error
    return value if isinstance(value, dict) else {}


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    """Returns a chat template, which takes longer to compile than to apply."""
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
