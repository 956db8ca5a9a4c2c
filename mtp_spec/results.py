"""What a generation gives: its tokens as they are committed, and the whole of it at the end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from time import perf_counter
from typing import Literal

from mtp_spec.acceptance.accept import Drawn, TokenLogprob
from mtp_spec.cpu.engine import Decoder
from mtp_spec.cpu.passes import Work
from mtp_spec.cuda.engine import DeviceDecoder, SharedDecoder
from mtp_spec.sampling.params import SamplingParams
from mtp_spec.stats import GenerationStats
from mtp_spec.text.stopping import Finisher


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
        seed: gives this text again; None for a result that no model has drawn.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] = "length"
    logprobs: list[TokenLogprob] | None = None
    stats: GenerationStats = field(default_factory=GenerationStats)
    seed: int | None = None


class Teller:
    """Tells what a text has written as events, when somebody asks, or all at once at its end.

    Attributes:
        result: what was told so far; whole after `finish`.
        finisher: has seen every token taken.
    """

    def __init__(self, finisher: Finisher, result: Generation) -> None:
        self.finisher, self.result = finisher, result
        self._untold, self._texts = deque[tuple[Drawn, int]](), deque[str]()
        self._whole = False

    def take(self, drawn: list[Drawn], step: int) -> None:
        """Takes the tokens of a step."""
        self._untold.extend([(one, step) for one in drawn])

    def pop(self) -> TokenEvent | None:
        """Returns the next event, if there is one."""
        if not self._untold:  # the finisher has seen more if a step failed halfway
            return None
        if not self._texts:
            self._texts.extend(self.finisher.ready())
            if not self._texts:
                return None
        (drawn, step), text = self._untold.popleft(), self._texts.popleft()
        if not self._whole:
            self._add(text, [drawn])
        return TokenEvent(text, drawn.token, step, drawn.depth or "target")

    def finish(self) -> Generation:
        """Returns the result of a text that has ended; events can still be asked for."""
        whole = self.finisher.whole()
        if whole is None:
            self._texts.extend(self.finisher.ready())
            whole = "".join(self._texts), len(self._texts)
        text, count = whole
        self._add(text, [drawn for drawn, _ in islice(self._untold, count)])
        self._whole = True
        return self.result

    def _add(self, text: str, drawn: list[Drawn]) -> None:
        result = self.result
        result.text += text
        result.token_ids += [one.token for one in drawn]
        if result.logprobs is not None:
            result.logprobs += [one.logprob for one in drawn if one.logprob is not None]


class TokenStream(Iterator[TokenEvent]):
    """Iterates over the tokens of one generation as they are committed; `result` is whole at the end.

    Attributes:
        work: writes the text; whoever runs the passes it yields may run those of other texts with them.
        teller: tells what it has written.
        allowed: asked before every step; raises where the text cannot go on.
    """

    def __init__(
        self,
        decoder: Decoder | DeviceDecoder | SharedDecoder,
        finisher: Finisher,
        ended: Callable[[GenerationStats, SamplingParams], None] | None = None,
    ) -> None:
        self._ended, self.decoder = ended, decoder
        self.result = Generation(stats=decoder.stats, seed=decoder.sampler.params.known_seed)
        if decoder.sampler.params.logprobs:
            self.result.logprobs = []
        self.teller = Teller(finisher, self.result)
        self.allowed: Callable[[], None] | None = None
        self.work = self._share(decoder) if isinstance(decoder, SharedDecoder) else self._write(decoder)

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> TokenEvent:
        while (event := self.teller.pop()) is None:
            self._advance()
        return event

    def rest(self) -> Generation:
        """Writes the text to its end without telling it token by token."""
        with suppress(StopIteration):
            while True:
                self._advance()
        return self.teller.finish()

    def _advance(self) -> None:
        """Writes up to the next rest.

        Raises:
            StopIteration: the text has ended.
        """
        if self.allowed is not None:
            self.allowed()
        if not isinstance(self.decoder, Decoder):
            next(self.work)
        elif self.decoder.runner.advance(self.work):
            raise StopIteration

    def _write(self, decoder: Decoder | DeviceDecoder) -> Work[None]:
        step, spent = 0, 0.0
        while not decoder.finished:
            start = perf_counter()
            if isinstance(decoder, DeviceDecoder):
                drawn = decoder.step() if step else decoder.prefill()
            else:
                drawn = yield from (decoder.stepping() if step else decoder.prefilling())
            spent += perf_counter() - start
            self._take(drawn, step, spent)
            step += 1
            yield None

    def _share(self, decoder: SharedDecoder) -> Work[None]:
        """The same for a text whose turns somebody else takes: its next one follows at once."""
        step, begun = 0, perf_counter()
        while not decoder.finished:
            start = perf_counter()
            yield decoder.turn
            now = perf_counter()
            decoder.stats.add_seconds("step" if step else "prefill", now - start)
            self._take(decoder.taken(), step, now - begun)
            step += 1

    def _take(self, drawn: list[Drawn], step: int, spent: float) -> None:
        decoder = self.decoder
        self.teller.take(drawn, step)
        decoder.stats.total_seconds = spent
        if decoder.finished:
            self.result.finish_reason = self.teller.finisher.reason
            if self._ended is not None:
                self._ended(decoder.stats, decoder.sampler.params)
