"""A checkpoint's own tokenizer and chat templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from warnings import warn

from mtp_spec.errors import PromptError
from mtp_spec.model.errors import CheckpointError
from mtp_spec.text.files import CONFIG, end_ids, read_config, read_templates, special_tokens
from mtp_spec.text.markers import Markers
from mtp_spec.text.template import conversation, rendered
from mtp_spec.text.vocabulary import TOKENIZER, read_vocabulary, vocabulary_file

Message = Mapping[str, Any]


class Tokenizer:
    """A folder's vocabulary, usually tokenizer.json, with its settings and chat templates.

    It encodes like transformers' AutoTokenizer: truncation and padding stated in tokenizer.json are switched off, and
    tokens of its post-processor are added.

    Attributes:
        raw: the tokenizer of `tokenizers`, without the post-processor that adds tokens at the ends of a text.
        templates: chat templates by name.
        bos_id: beginning-of-sequence token of tokenizer_config.json; None if it names none.
        eos_id: end-of-sequence token, likewise.
        eos_ids: all tokens that end a text, those of generation_config.json included.

    Raises:
        CheckpointError: a file is missing, unreadable or inconsistent.
    """

    def __init__(self, folder: Path) -> None:
        file = vocabulary_file(folder)
        if file is None:
            raise CheckpointError(f"{folder / TOKENIZER} is not there, nor another vocabulary: download it")
        config = read_config(folder)
        self.raw, self._special = read_vocabulary(file, config, special_tokens(config, folder))
        self._ends, self.raw.post_processor = self.raw.post_processor, None
        self.templates = read_templates(config, folder)
        self.bos_id = self._id("bos_token")
        self.eos_id = self._id("eos_token")
        self.eos_ids = end_ids(folder) | ({self.eos_id} if self.eos_id is not None else set())
        self._markers = Markers(self.raw)
        self._check_ends(config, folder)

    def _id(self, name: str) -> int | None:
        return self.raw.token_to_id(self._special[name]) if name in self._special else None

    def _check_ends(self, config: Mapping[str, Any], folder: Path) -> None:
        added = set(self.encode("a"))
        for name, token in (("add_bos_token", self.bos_id), ("add_eos_token", self.eos_id)):
            if config.get(name) and token is not None and token not in added:
                warn(
                    f"{folder / CONFIG} says {name}, but the post-processor of {TOKENIZER} adds no such token: "
                    "transformers 5 goes by the latter, and so do prompts here. Chat templates write their own",
                    stacklevel=4,
                )

    @property
    def template(self) -> str | None:
        """The chat template that is used without tools; None if there is none."""
        return self.templates.get("default")

    def encode(self, text: str) -> list[int]:
        """Returns token ids, with the tokens that the tokenizer adds at the beginning and end of a text.

        Special tokens written out in the text are recognised, as in the model's own tokenizer: a prompt may
        contain a chat prefix. Messages of `chat_ids` are different: there a user's text stays text.

        Raises:
            PromptError: it is not a string, or cannot be encoded as UTF-8.
        """
        if not isinstance(text, str):
            raise PromptError(f"{text!r} is no text: give a str")
        _check_utf8(text)
        encoding = self.raw.encode(text)
        return list((encoding if self._ends is None else self._ends.process(encoding)).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, special tokens left out.

        Raises:
            PromptError: an element is not an id.
        """
        try:
            return str(self.raw.decode(list(ids), skip_special_tokens=True))
        except (TypeError, OverflowError) as error:
            raise PromptError(f"{ids!r} are no token ids ({error}): give a list of integers of 0 or more") from None

    def special_text(self, token: int) -> str:
        """Returns the text of a special token, which `decode` leaves out; empty for any other token."""
        return self._special_of.get(token, "")

    @cached_property
    def _special_of(self) -> dict[int, str]:
        return {token: one.content for token, one in self.raw.get_added_tokens_decoder().items() if one.special}

    def chat_ids(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        template: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool | str = False,
    ) -> list[int]:
        """Returns the ids of a conversation rendered by the checkpoint's chat template; arguments as for `chat_text`.

        They are those of transformers' apply_chat_template, except that nothing in a message, a tool or an argument
        becomes a marker. A marker is an added token of the tokenizer, `special` or not, except ordinary words and
        blanks that are not special and that the template does not write. If one is written out in a message, or would
        arise where a message meets other text, its characters are encoded as ordinary text, unchanged. An assistant's
        content and reasoning may hold what a model generates in its own turn: pairs such as <think> and </think> that
        are not special or that the template searches for, unless they name a role or enclose another's message, a
        tool's result or a tool's description. Roles are words without marker characters.

        Raises:
            PromptError, OptionError, MTPSpecError: as for `chat_text`; also if the tokenizer cannot keep a marker text.
        """
        asked = conversation(
            self.templates, self._special, messages, template, tools, add_generation_prompt, continue_final_message
        )
        text = rendered(asked)
        _check_utf8(text)
        return self._markers.ids(asked, text)

    def chat_text(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        template: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool | str = False,
    ) -> str:
        """Returns a conversation as text, rendered by the checkpoint's chat template.

        It is for reading: markers written out in a message look like the template's; only `chat_ids` distinguishes
        them.

        Args:
            messages: mappings with a role and any fields that the template knows: content, a text or a list of parts,
                tool_calls, reasoning_content. `"prefix": True` in the last one means `continue_final_message`.
            add_generation_prompt: begin the assistant's answer.
            template: the template's own arguments, such as `{"enable_thinking": False}`; "chat_template" chooses one
                of several by name, "documents" are for templates that support them.
            tools: JSON schemas of the tools that the model may call.
            continue_final_message: the answer continues the last message instead of beginning a turn; a name continues
                that field.

        Raises:
            PromptError: messages or tools are invalid, or the template raises an error of its own.
            OptionError: an argument is invalid.
            MTPSpecError: the checkpoint has no chat template, or it fails.
        """
        return rendered(
            conversation(
                self.templates, self._special, messages, template, tools, add_generation_prompt, continue_final_message
            )
        )


def open_tokenizer(folder: Path) -> Tokenizer | None:
    """Returns a folder's tokenizer; None for a folder without a vocabulary, whose model takes ids only.

    Raises:
        CheckpointError: there is one that cannot be read.
    """
    return None if vocabulary_file(folder) is None else Tokenizer(folder)


def _check_utf8(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(f"the text cannot be encoded: {error}; give it as UTF-8") from None
