"""Texts that follow a grammar: JSON, a JSON schema, a regular expression or a Lark grammar (`response_format=`).

Tokens that would violate the grammar are removed from every row, those of drafts included; once the text is complete
only end-of-sequence tokens are left. llguidance, an optional package, compiles grammars and computes the masks; its
matchers are copied at every branch of a draft tree, so that nothing is parsed twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtp_spec.errors import MTPSpecError, OptionError
from mtp_spec.sampling.processors import Masking
from mtp_spec.text import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

# whitespace between the parts of JSON: one blank, or a new line and its indentation. Without a bound a weak model may
# generate blanks until the end
BLANKS = r" |\n[ \t]{0,24}"
KEPT_GRAMMARS = 16


@dataclass(slots=True)
class _State:
    """The grammar's state after a path, and the mask of allowed tokens once computed."""

    matcher: LLMatcher
    mask: npt.NDArray[np.uint8] | None = None


class GrammarProcessor(Masking):
    """Keeps a text to a grammar: a `LogitsProcessor`."""

    def __init__(self, compiled: LLMatcher) -> None:
        self._compiled = compiled

    def start(self, prompt_ids: Sequence[int]) -> _State:
        return _State(self._compiled.deep_copy())

    def advance(self, state: _State, token: int) -> _State:
        matcher = state.matcher.deep_copy()
        if not matcher.consume_token(token):
            raise MTPSpecError(f"token {token} leaves the grammar: {matcher.get_error()}")
        return _State(matcher)

    def apply(self, state: _State, logits: Tensor) -> Tensor:
        allowed = np.unpackbits(self.mask(state), bitorder="little")[: len(logits)].astype(np.bool_)
        return logits.masked_fill_(torch.from_numpy(~allowed), -torch.inf)

    def mask(self, state: _State) -> npt.NDArray[np.uint8]:
        if state.mask is None:
            bits = np.frombuffer(state.matcher.compute_bitmask(), dtype=np.uint8)
            if state.matcher.is_error():
                raise MTPSpecError(f"the grammar cannot be followed further: {state.matcher.get_error()}")
            state.mask = bits
        return state.mask


class Grammars:
    """Compiles grammars for one tokenizer; the most recent are cached.

    Args:
        vocab_size: width of the logits; ids beyond the tokenizer's are never allowed.
        stop_ids: tokens that end a text.

    Raises:
        OptionError: llguidance is not installed, or the model has no end-of-sequence token.
        MTPSpecError: llguidance cannot read the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int]) -> None:
        try:
            import llguidance
        except ImportError:
            raise OptionError("response_format needs llguidance: pip install 'mtp-spec[grammar]'") from None
        if not stop_ids:
            raise OptionError("response_format needs a model with an end-of-sequence token: this one names none")
        try:
            self._tokenizer = llguidance.LLTokenizer(tokenizer.raw.to_str(), vocab_size, sorted(stop_ids))
        except ValueError as error:
            raise MTPSpecError(f"llguidance cannot read this tokenizer ({error}): leave response_format out") from error
        self._matcher = llguidance.LLMatcher
        self._compile = lru_cache(KEPT_GRAMMARS)(self._compiled)

    def processor(self, response_format: Mapping[str, Any]) -> GrammarProcessor:
        """Returns the processor of a format that `SamplingParams` has checked.

        Raises:
            OptionError: a schema, expression or grammar that cannot be compiled.
        """
        kind, matcher = response_format["type"], self._matcher
        if kind == "regex":
            grammar = matcher.grammar_from_regex(response_format["regex"])
        elif kind == "lark":
            grammar = matcher.grammar_from_lark(response_format["lark"])
        else:
            try:
                schema = json.dumps(response_format.get("schema", {"type": "object"}))
            except (TypeError, ValueError, RecursionError) as error:
                raise OptionError(f"response_format has a schema that JSON cannot hold: {error}") from None
            grammar = matcher.grammar_from_json_schema(schema, {"whitespace_pattern": BLANKS})
        return GrammarProcessor(self._compile(grammar))

    def _compiled(self, grammar: str) -> LLMatcher:
        matcher = self._matcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())
            raise OptionError(f"response_format cannot be compiled: {reason}")
        return matcher
