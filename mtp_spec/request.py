"""A checked request: the prompt's ids and everything that determines the generated text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy import ndarray
from torch import Tensor

from mtp_spec.drafting import Drafter
from mtp_spec.errors import PromptError
from mtp_spec.model.config import ModelConfig
from mtp_spec.sampling.params import SamplingParams
from mtp_spec.sampling.processors import LogitsProcessor
from mtp_spec.sampling.sampler import Sampler
from mtp_spec.speculation import Speculation
from mtp_spec.text import Tokenizer
from mtp_spec.text.stopping import StopChecker


@dataclass(frozen=True, slots=True)
class Request:
    """A request that is ready to start.

    Attributes:
        limit: most new tokens.
        drafters: those that propose drafts beside the MTP modules.
    """

    ids: list[int]
    sampler: Sampler
    speculation: Speculation | None
    limit: int
    stops: StopChecker
    drafters: tuple[Drafter, ...] = ()

    @property
    def modules(self) -> bool:
        """Whether the MTP modules draft for it."""
        return self.speculation is not None and self.speculation.modules

    @property
    def strict(self) -> bool:
        """Whether its speculation is fixed, so that the MTP modules need the whole context."""
        return self.modules and self.speculation is not None and not self.speculation.adaptive

    @property
    def room(self) -> int:
        """Most cache slots that it may need, those of its largest tree included."""
        return len(self.ids) + self.limit + (0 if self.speculation is None else self.speculation.nodes) + 1


def new_request(
    ids: list[int], params: SamplingParams, speculation: Speculation | None, config: ModelConfig, max_context: int,
    processors: Sequence[LogitsProcessor[Any]], tokenizer: Tokenizer | None, model_ends: frozenset[int],
    drafters: tuple[Drafter, ...] = (),
) -> Request:  # fmt: skip
    """Returns the request for a continuation of checked ids.

    Args:
        processors: applied before those of `params`.
        model_ends: the model's own end-of-sequence tokens.
        drafters: of `speculation`, except the MTP modules.

    Raises:
        OptionError: parameters do not fit the vocabulary.
        PromptError: the context leaves no room for a token, or too little for `min_new_tokens`.
    """
    ends = params.ends(model_ends)
    sampler = Sampler(params, config.vocab_size, None, processors, ends)
    room = max_context - len(ids)
    if room < max(1, params.min_new_tokens):
        raise too_long(len(ids), config, max_context, params.min_new_tokens)
    limit = min(params.max_new_tokens, room)
    stops = StopChecker(tokenizer, ends, params.stop_strings, limit, params.min_new_tokens)
    return Request(ids, sampler, speculation, limit, stops, drafters)


def checked_ids(ids: Any, given: object, config: ModelConfig, max_context: int) -> list[int]:
    """Returns a prompt's ids; `given` is what they were encoded from, for the message.

    Raises:
        PromptError: there are none or too many, or one is outside the vocabulary.
    """
    if isinstance(ids, Tensor | ndarray):
        ids = ids.tolist()
    if isinstance(ids, str | bytes | bytearray) or not isinstance(ids, Sequence):
        raise PromptError(f"the prompt {ids!r} is neither text nor ids: give a str or a list of integers")
    if (isinstance(given, str) and not given) or not len(ids):
        raise PromptError(f"the prompt {given if given is not None else ids!r} is empty: give text or ids")
    vocab = config.vocab_size
    for i, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab:
            raise PromptError(f"prompt token {i} is {token!r}: ids are integers from 0 to {vocab - 1}")
    if len(ids) > max_context:
        raise too_long(len(ids), config, max_context)
    return list(ids)


def too_long(tokens: int, config: ModelConfig, max_context: int, least: int = 0) -> PromptError:
    """Returns the error of a prompt that leaves no room for a new token, or for the `least` number of new tokens."""
    more = config.max_position_embeddings
    other = f", or load with a larger max_context (the model allows {more})" if more > max_context else ""
    wanted = f" and min_new_tokens is {least}" if tokens < max_context else ""
    return PromptError(f"the prompt has {tokens} tokens{wanted} and the context is {max_context}: shorten it{other}")


def is_batch(prompt: Any) -> bool:
    """Whether a prompt is a list of prompts."""
    if isinstance(prompt, str | bytes | bytearray | Tensor) or not isinstance(prompt, Sequence):
        return False
    return len(prompt) == 0 or isinstance(prompt[0], str | Sequence | Tensor | ndarray)
