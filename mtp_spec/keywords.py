"""The keyword arguments of `LM`'s methods as types, so that editors complete them and type checkers check them.

    def ask(question: str, **options: Unpack[GenerateOptions]) -> str:
        return lm.generate(question, **options).text

Meaning and range of each are documented and checked in `SamplingParams`, `Speculation`, `load` (`defaults`) and
`mtp_spec.text.Tokenizer.chat_text` (the chat template's).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from mtp_spec.sampling.params import SamplingParams
from mtp_spec.sampling.processors import Processor
from mtp_spec.speculation import Speculation


class _TextOptions(TypedDict, total=False):
    """Options of every text: the fields of `SamplingParams` except the seed, or all as `sampling`, and the others."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    stop: str | Sequence[str] | None
    stop_token_ids: int | Sequence[int] | None
    ignore_eos: bool
    min_new_tokens: int
    logprobs: int
    logits_processor: Processor | Sequence[Processor] | None
    response_format: Mapping[str, Any] | None
    sampling: SamplingParams | None
    speculation: Speculation | Literal["auto"] | int | None
    defaults: Literal["library", "checkpoint"]


class TemplateOptions(TypedDict, total=False):
    """Options of the chat template, for conversations."""

    template: Mapping[str, Any] | None
    tools: Sequence[Mapping[str, Any]] | None
    continue_final_message: bool | str


class ChatIdsOptions(TemplateOptions, total=False):
    """Options of `LM.chat_ids`."""

    add_generation_prompt: bool


class GenerateOptions(_TextOptions, total=False):
    """Options of `LM.generate`, which generates one text or several."""

    seed: int | Sequence[int] | None


class ChatOptions(GenerateOptions, TemplateOptions, total=False):
    """Options of `LM.chat`."""


class StreamOptions(_TextOptions, TemplateOptions, total=False):
    """Options of `LM.stream`, `LM.submit` and `LM.explain`, which generate one text for a prompt or a conversation."""

    seed: int | None
