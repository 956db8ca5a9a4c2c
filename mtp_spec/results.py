"""Results of a generation: its tokens as they are committed, and the complete result at the end."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from mtp_spec.acceptance.accept import Drawn, TokenLogprob
from mtp_spec.stats import GenerationStats
from mtp_spec.text.stopping import StopChecker
from mtp_spec.tree import MODULES


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of a stream.

    Attributes:
        text: the text it adds; empty if it does not complete a character yet.
        token_id: its id.
        step: the verify step that committed it; 0 is the prefill.
        source: "target"; the depth of the MTP modules' draft that proposed it; or the name of another drafter, such as
            "text".
    """

    text: str
    token_id: int
    step: int
    source: str | int


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
        self._pending, self._texts = deque[tuple[Drawn, int]](), deque[str]()
        self._whole = False

    def take(self, drawn: list[Drawn], step: int) -> None:
        """Takes the tokens of a step."""
        self._pending.extend([(one, step) for one in drawn])

    def pop(self) -> TokenEvent | None:
        """Returns the next event, if there is one."""
        if not self._pending:  # the stop checker has seen more if a step failed halfway
            return None
        if not self._texts:
            self._texts.extend(self.stops.ready())
            if not self._texts:
                return None
        (drawn, step), text = self._pending.popleft(), self._texts.popleft()
        if not self._whole:
            self._add(text, [drawn])
        drafted = drawn.depth if drawn.source == MODULES else drawn.source
        return TokenEvent(text, drawn.token, step, drafted if drawn.depth else "target")

    def finish(self) -> Generation:
        """Returns the result of a sequence that has ended; events can still be popped."""
        whole = self.stops.whole()
        if whole is None:
            self._texts.extend(self.stops.ready())
            whole = "".join(self._texts), len(self._texts)
        text, count = whole
        self._add(text, [drawn for drawn, _ in islice(self._pending, count)])
        self._whole = True
        return self.result

    def _add(self, text: str, drawn: list[Drawn]) -> None:
        result = self.result
        result.text += text
        result.token_ids += [one.token for one in drawn]
        if result.logprobs is not None:
            result.logprobs += [one.logprob for one in drawn if one.logprob is not None]
