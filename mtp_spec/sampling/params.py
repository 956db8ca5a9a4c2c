"""`SamplingParams`: how tokens are sampled and when generation ends.

Every value is checked here, once, with a message that names the option, the given value and the allowed ones. Nothing
is corrected silently.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor

from mtp_spec.errors import OptionError
from mtp_spec.option_checks import LARGEST, as_float, integer, invalid, real, unknown_option
from mtp_spec.sampling.processors import LogitsProcessor, Processor, resolve_processors
from mtp_spec.sampling.seeds import checked_seed

# response formats, and the key that each of them needs
RESPONSE_FORMATS = {"json_object": None, "json_schema": "schema", "regex": "regex", "lark": "lark"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are sampled and when generation ends; checked on construction.

    Args:
        max_new_tokens: at most this many tokens are generated, 1 or more.
        temperature: 0 is greedy; larger is more varied.
        top_p: keep the smallest set of most probable tokens with at least this mass, in (0, 1]; 1 is off.
        top_k: keep the k most probable tokens; 0 is off, a value beyond the vocabulary keeps all of it.
        min_p: keep tokens at least this fraction as probable as the best one, in [0, 1]; 0 is off.
        repetition_penalty: divides positive (multiplies negative) logits of tokens in prompt or text; 1 is off.
        presence_penalty: subtracted from the logit of every token already generated; 0 is off.
        frequency_penalty: subtracted once for each time the token was generated; 0 is off.
        logit_bias: token id -> number added to its logit; -inf forbids the token.
        seed: 0 .. 2**64 - 1; the same seed gives the same text with or without speculation. None draws a fresh one,
            below 2**53, which the result reports.
        stop: a string, or several; generation ends before the first one that appears in the text, with or without
            special tokens written out.
        stop_token_ids: token ids that end the text in addition to the model's own end-of-sequence tokens; they are not
            part of it.
        ignore_eos: treat the model's end-of-sequence tokens as ordinary tokens; only `stop_token_ids`, `stop` and the
            length end the text.
        min_new_tokens: at least this many tokens are generated: until then no token may end the text, and a stop string
            that begins there is part of it.
        logprobs: 0 is off; n reports each token's log-probability and the n best alternatives.
        logits_processor: a function of (ids so far, logits `[V]`) that returns logits, a `LogitsProcessor` with a
            state of its own, or a list of these; called for every row, those of drafts included.
        response_format: the grammar that the text follows: {"type": "json_object"}, {"type": "json_schema", "schema":
            {...}}, {"type": "regex", "regex": "..."} or {"type": "lark", "lark": "..."}; needs mtp-spec[grammar].

    Raises:
        OptionError: a value of the wrong kind or outside its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: int | Sequence[int] | None = None
    ignore_eos: bool = False
    min_new_tokens: int = 0
    logprobs: int = 0
    logits_processor: Processor | Sequence[Processor] | None = None
    response_format: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, minimum in (("max_new_tokens", 1), ("top_k", 0), ("logprobs", 0), ("min_new_tokens", 0)):
            self._store(name, integer(name, getattr(self, name), minimum, None, f"an integer, {minimum} or more"))
        self._store("seed", checked_seed(self.seed))
        allowed = f"a number from 0 (greedy) to {LARGEST:g}"
        self._store("temperature", real("temperature", self.temperature, allowed, low=0.0))
        self._store("top_p", real("top_p", self.top_p, "a number above 0 and up to 1 (off)", above=0.0, high=1.0))
        self._store("min_p", real("min_p", self.min_p, "a number from 0 (off) to 1", low=0.0, high=1.0))
        allowed = f"a number from {1 / LARGEST:g} to {LARGEST:g}; 1 is off"
        repetition = real("repetition_penalty", self.repetition_penalty, allowed, low=1 / LARGEST)
        self._store("repetition_penalty", repetition)
        for name in ("presence_penalty", "frequency_penalty"):
            self._store(name, real(name, getattr(self, name), f"a number from -{LARGEST:g} to {LARGEST:g}; 0 is off"))
        self._store("logit_bias", _logit_bias(self.logit_bias))
        self._store("stop", _stop_strings(self.stop))
        self._store("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if not isinstance(self.ignore_eos, bool):
            raise invalid("ignore_eos", self.ignore_eos, "True or False")
        if self.min_new_tokens > self.max_new_tokens:
            raise invalid("min_new_tokens", self.min_new_tokens, f"at most max_new_tokens, {self.max_new_tokens}")
        resolve_processors(self.logits_processor)
        _check_response_format(self.response_format)
        if self.ignore_eos and self.response_format is not None:
            raise invalid("ignore_eos", True, "False with response_format: a text that is whole ends by such a token")

    def _store(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def from_options(cls, options: Mapping[str, Any], also_allowed: Iterable[str] = ()) -> SamplingParams:
        """The parameters named in ``options``.

        Args:
            options: keyword arguments as the caller gave them.
            also_allowed: names handled elsewhere, mentioned in the message about an unknown one.

        Raises:
            OptionError: an unknown name, or a bad value.
        """
        names = [field.name for field in fields(cls)]
        for name in options:
            if name not in names:
                raise unknown_option(name, [*names, *also_allowed])
        return cls(**options)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple, empty when there are none."""
        return tuple(self.stop or ())

    @property
    def known_seed(self) -> int:
        """The seed, which a `Sampler` has drawn if none was given.

        Raises:
            OptionError: none was given or drawn.
        """
        if self.seed is None:
            raise OptionError("seed=None: no seed was drawn for these parameters yet; give one")
        return self.seed

    def ends(self, model_ends: frozenset[int]) -> frozenset[int]:
        """The tokens that end a text, given the model's own."""
        own = () if self.stop_token_ids is None else self.stop_token_ids
        assert not isinstance(own, int)  # a tuple since construction
        return frozenset(own) if self.ignore_eos else model_ends | frozenset(own)

    @property
    def processors(self) -> list[LogitsProcessor[Any]]:
        """The logits processors, in order."""
        return resolve_processors(self.logits_processor)

    @property
    def greedy(self) -> bool:
        """Whether every token is the best of its row, without noise."""
        return self.temperature == 0.0

    def validate(self, vocab_size: int) -> None:
        """Checks what depends on the model.

        Raises:
            OptionError: a token of ``logit_bias`` or ``stop_token_ids`` or the number of ``logprobs`` is beyond the
                vocabulary, or ``logit_bias`` forbids all of it.
        """
        for token in self.ends(frozenset()):
            if token >= vocab_size:
                raise invalid("stop_token_ids", [token], f"token ids from 0 to {vocab_size - 1}")
        bias = self.logit_bias or {}
        for token in bias:
            if not 0 <= token < vocab_size:
                raise invalid("logit_bias", dict(bias), f"token ids from 0 to {vocab_size - 1}; {token} is not one")
        if sum(value == -math.inf for value in bias.values()) == vocab_size:
            raise invalid("logit_bias", "-inf for every token", "at least one token left to choose")
        if self.logprobs > vocab_size:
            raise invalid("logprobs", self.logprobs, f"at most the size of the vocabulary, {vocab_size}")


def expanded_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a call's options with `sampling=` replaced by its parameters.

    Raises:
        OptionError: it is not a `SamplingParams`, or one of its parameters is also given separately.
    """
    given = dict(options)
    params = given.pop("sampling", None)
    if params is None:
        return given
    if not isinstance(params, SamplingParams):
        raise invalid("sampling", params, "mtp_spec.SamplingParams(...), or None")
    own = {field.name: getattr(params, field.name) for field in fields(params)}
    for name, value in given.items():
        if name in own:
            raise OptionError(
                f"{name}={value!r} is not possible beside sampling=SamplingParams(...), which has a {name} already: "
                "change it there (dataclasses.replace), or leave sampling out"
            )
    return {**own, **given}


def _logit_bias(value: object) -> dict[int, float] | None:
    if value is None:
        return None
    allowed = f"a dictionary of token id -> number from -{LARGEST:g} to {LARGEST:g} (or -inf, which forbids the token)"
    if not isinstance(value, Mapping):
        raise invalid("logit_bias", value, allowed)
    bias: dict[int, float] = {}
    for token, amount in value.items():
        if isinstance(amount, bool) or not isinstance(amount, Real):
            raise invalid("logit_bias", {token: amount}, allowed)
        number = as_float(amount)
        if not (abs(number) <= LARGEST or number == -math.inf):
            raise invalid("logit_bias", {token: amount}, allowed)
        bias[integer("logit_bias token", token, 0, None, "a token id, 0 or more")] = number
    return bias


def _stop_strings(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    strings = (value,) if isinstance(value, str) else value
    allowed = "a string or a list of strings, none of them empty"
    if not isinstance(strings, Sequence) or isinstance(strings, bytes):
        raise invalid("stop", value, allowed)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise invalid("stop", value, allowed)
    return tuple(strings)


def _token_ids(name: str, value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    allowed = "a token id or a list of token ids, 0 or more each"
    if isinstance(value, Tensor | np.ndarray):
        value = value.tolist()
    listed = [value] if isinstance(value, Integral) else value
    if isinstance(listed, str | bytes | bytearray) or not isinstance(listed, Sequence | Set):
        raise invalid(name, value, allowed)
    return tuple(dict.fromkeys(integer(name, token, 0, None, allowed) for token in listed))


def _check_response_format(value: object) -> None:
    if value is None:
        return
    kind = value.get("type") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(kind, str) or kind not in RESPONSE_FORMATS:
        raise invalid("response_format", value, '{"type": one of ' + ", ".join(RESPONSE_FORMATS) + ", ...}")
    key = RESPONSE_FORMATS[kind]
    kinds = Mapping | bool if key == "schema" else str
    if set(value) != {"type", key} - {None} or (key is not None and not isinstance(value[key], kinds)):
        allowed = f'{{"type": "{kind}"' + ("}" if key is None else f', "{key}": ...}}')
        raise invalid("response_format", value, allowed)
