"""Converts a caller's prompt (text, ids or messages) to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtp_spec.errors import MTPSpecError, OptionError, PromptError
from mtp_spec.model.config import ModelConfig
from mtp_spec.request import checked_ids, is_batch
from mtp_spec.text import Tokenizer

Message = Mapping[str, Any]
# for conversations only
CHAT_OPTIONS = ("template", "tools", "continue_final_message")


@dataclass(frozen=True, slots=True)
class Asking:
    """Prompts for one model.

    Attributes:
        tokenizer: None if the model has none.
        max_context: most tokens of a prompt.
    """

    tokenizer: Tokenizer | None
    config: ModelConfig
    max_context: int

    def text(self) -> Tokenizer:
        """Returns the tokenizer.

        Raises:
            MTPSpecError: there is none.
        """
        if self.tokenizer is None:
            raise MTPSpecError(
                "this checkpoint has no tokenizer.json nor another vocabulary, so text cannot be used: give token ids, "
                "or copy the model's tokenizer.json and tokenizer_config.json into its folder"
            )
        return self.tokenizer

    def chat_ids(self, messages: Sequence[Message], options: Mapping[str, Any]) -> list[int]:
        """Returns the ids of a conversation."""
        known = (*CHAT_OPTIONS, "add_generation_prompt")
        for name, value in options.items():
            if name not in known:
                raise OptionError(f"{name}={value!r} is unknown to chat_ids: allowed are {', '.join(known)}")
        return self.text().chat_ids(messages, **options)

    def prompts(self, prompt: Any) -> list[list[int]]:
        """Returns the ids of one prompt or of each in a list."""
        parts = prompt if is_batch(prompt) else [prompt]
        if not parts:
            raise PromptError("no prompt given: the list is empty")
        ids = [self.text().encode(part) if isinstance(part, str) else part for part in parts]
        return [checked_ids(own, part, self.config, self.max_context) for own, part in zip(ids, parts, strict=True)]

    def references(self, references: Sequence[str | tuple[int, ...]]) -> list[list[int]]:
        """Returns the ids of `Speculation(references=)`.

        Raises:
            OptionError: an id is outside the vocabulary.
        """
        found = [self.text().encode(one) if isinstance(one, str) else list(one) for one in references]
        for ids in found:
            if (most := max(ids)) >= self.config.vocab_size:
                raise OptionError(
                    f"references hold the id {most}: ids are integers from 0 to {self.config.vocab_size - 1}"
                )
        return found

    def ids(self, prompt: Any, options: dict[str, Any]) -> list[int]:
        """Returns the ids of one prompt or conversation; removes the chat template's options from `options`."""
        chat = taken(options)
        if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], Mapping):
            prompt = self.chat_ids(prompt, chat)
        elif chat:
            raise OptionError(f"{', '.join(chat)}: for messages, and the prompt is none: give a list of messages")
        elif is_batch(prompt):
            raise PromptError("one prompt is expected: call once for each, or use generate")
        return self.prompts(prompt)[0]


def taken(options: dict[str, Any]) -> dict[str, Any]:
    """Removes the chat template's options from a call's options and returns them."""
    return {name: options.pop(name) for name in CHAT_OPTIONS if name in options}
