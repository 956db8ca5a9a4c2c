"""What a generation gives: its tokens as they are committed, and the whole of it at the end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal

from mtp_spec.accept import Drawn, TokenLogprob
from mtp_spec.device_engine import DeviceDecoder, SharedDecoder
from mtp_spec.engine import Decoder
from mtp_spec.finish import Finisher
from mtp_spec.options import SamplingParams
from mtp_spec.passes import Work
from mtp_spec.stats import GenerationStats


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of a stream.

    Attributes:
        text: the text it adds; empty for a token that completes no character yet.
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
    """A finished text.

    Attributes:
        text: without the prompt, the end-of-sequence token and the stop string.
        token_ids: its tokens; `decode(token_ids)` is the text, except where a stop string cut a token in two.
        finish_reason: "stop" (end-of-sequence token or stop string) or "length".
        logprobs: None, or for each token its log-probability and the best alternatives.
        stats: counts, rates and seconds.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] = "length"
    logprobs: list[TokenLogprob] | None = None
    stats: GenerationStats = field(default_factory=GenerationStats)


class TokenStream(Iterator[TokenEvent]):
    """Iterates over the tokens of one generation as they are committed; `result` is whole at the end."""

    def __init__(
        self,
        decoder: Decoder | DeviceDecoder | SharedDecoder,
        finisher: Finisher,
        ended: Callable[[GenerationStats, SamplingParams], None] | None = None,
    ) -> None:
        self._ended = ended
        self.result, self.decoder = Generation(stats=decoder.stats), decoder
        if decoder.sampler.params.logprobs:
            self.result.logprobs = []
        self._waiting, self._ready = deque[tuple[Drawn, int]](), deque[str]()
        self.work = self._write(decoder, finisher)

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> TokenEvent:
        while (event := self.pop()) is None:
            if isinstance(self.decoder, Decoder):
                if self.decoder.runner.advance(self.work):
                    raise StopIteration
            else:
                next(self.work)
        return event

    def pop(self) -> TokenEvent | None:
        """Returns the next event of what `work` has written so far, if there is one."""
        return self._event(self._ready.popleft(), *self._waiting.popleft()) if self._ready else None

    def _write(self, decoder: Decoder | DeviceDecoder | SharedDecoder, finisher: Finisher) -> Work[None]:
        """Writes the text; whoever runs the passes it yields may run those of other texts with them."""
        step, spent = 0, 0.0
        while not decoder.finished:
            start = perf_counter()
            if isinstance(decoder, DeviceDecoder):
                drawn = decoder.step() if step else decoder.prefill()
            else:
                drawn = yield from (decoder.stepping() if step else decoder.prefilling())
            self._waiting.extend((token, step) for token in drawn)
            step += 1
            spent += perf_counter() - start
            decoder.stats.total_seconds = spent
            self.result.finish_reason = finisher.reason
            self._ready.extend(finisher.ready())
            if decoder.finished and self._ended is not None:
                self._ended(decoder.stats, decoder.sampler.params)
            if not isinstance(decoder, SharedDecoder):  # whose next turn follows at once
                yield None

    def _event(self, text: str, drawn: Drawn, step: int) -> TokenEvent:
        self.result.text += text
        self.result.token_ids.append(drawn.token)
        if self.result.logprobs is not None and drawn.logprob is not None:
            self.result.logprobs.append(drawn.logprob)
        return TokenEvent(text, drawn.token, step, drawn.depth or "target")
