"""Results of a generation: its tokens as they are committed, and the complete result at the end."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mtp_spec.acceptance.accept import TokenLogprob
from mtp_spec.stats import GenerationStats
from mtp_spec.text.stopping import StopChecker


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of a stream.

    Attributes:
        text: the text it adds; empty if it does not complete a character yet.
        token_id: its id.
        step: the verify step that committed it; 0 is the prefill.
        source: "target", or the depth of the draft that proposed it.
    """

    text: str
    token_id: int
    step: int
    source: Literal["target"] | int


@dataclass(slots=True)
class Generation:
    """The result of a generation.

    Attributes:
        text: without the prompt, the end-of-sequence token and the stop string.
        token_ids: its tokens; `decode(token_ids)` is the text, except where a stop string cut a token in two.
        finish_reason: "stop" (end-of-sequence token or stop string) or "length".
        logprobs: None, or for each token its log-probability and the best alternatives.
        stats: counts, rates and seconds.
        seed: reproduces this text; None for a result that no model has generated.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] = "length"
    logprobs: list[TokenLogprob] | None = None
    stats: GenerationStats = field(default_factory=GenerationStats)
    seed: int | None = None


class EventLog:
    """Log of a sequence's committed tokens; turns them into `TokenEvent`s on demand, or all at once at the end.

    Attributes:
        result: covers the events created so far; complete after `finish`.
        stops: has seen every token in the log.
    """

    def __init__(self, stops: StopChecker, result: Generation) -> None:
        self.stops, self.result = stops, result
        self._tokens, self._logprobs = list[int](), list[TokenLogprob]()
        # of each step with tokens that are not popped yet: where they begin and end, how many were drafted, its number
        self._steps = deque[tuple[int, int, int, int]]()
        self._popped = self._told = 0
        self._whole = False
        self._texts = deque[str]()

    def take(self, tokens: Sequence[int], drafted: int, step: int, logprobs: Sequence[TokenLogprob] = ()) -> None:
        """Takes the tokens of a step.

        Args:
            drafted: how many of them were drafted: these come first, each one deeper than the one before.
            logprobs: of the tokens, if requested.
        """
        begin = len(self._tokens)
        self._tokens += tokens
        self._logprobs += logprobs
        self._steps.append((begin, begin + len(tokens), drafted, step))

    def pop(self) -> TokenEvent | None:
        """Returns the next event, if there is one."""
        if not self._steps:  # the stop checker has seen more if a step failed halfway
            return None
        if not self._texts:
            self._texts.extend(self.stops.ready())
            if not self._texts:
                return None
        text, place = self._texts.popleft(), self._popped
        self._popped += 1
        begin, end, drafted, step = self._steps[0]
        if self._popped == end:
            self._steps.popleft()
        if self._told == place:
            self._add(text, 1)
        depth = place - begin + 1
        return TokenEvent(text, self._tokens[place], step, depth if depth <= drafted else "target")

    def finish(self) -> Generation:
        """Returns the result of a sequence that has ended; events can still be popped."""
        if not self._whole:
            self._whole, whole = True, self.stops.whole()
            if whole is None:
                self._texts.extend(self.stops.ready())
                whole = "".join(self._texts), len(self._texts)
            self._add(*whole)
        return self.result

    def _add(self, text: str, count: int) -> None:
        """Adds the next `count` tokens to the result."""
        result, some = self.result, slice(self._told, self._told + count)
        self._told += count
        result.text += text
        result.token_ids += self._tokens[some]
        if result.logprobs is not None:
            result.logprobs += self._logprobs[some]
