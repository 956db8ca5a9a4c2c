"""One text that is being generated: its tokens, how they are drawn, where they end, what is known of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from mtp_spec.acceptance.accept import Accepted, Drawn, TokenLogprob
from mtp_spec.cache.pages import Lease
from mtp_spec.request import Request
from mtp_spec.results import EventLog, Generation
from mtp_spec.sampling.sampler import History
from mtp_spec.stats import GenerationStats
from mtp_spec.tree import TokenTree


class Observer(Protocol):
    """Looks at the steps of a sequence from outside; it changes nothing."""

    def drafted(self, parent: int, row: Tensor) -> None:
        """Takes the draft's processed row `[V]` that the children of a node come from; ROOT begins a new tree."""
        ...

    def pruned(self, kept: list[int]) -> None:
        """Takes which nodes were kept for verifying, ascending; they are numbered anew."""
        ...

    def verified(self, tree: TokenTree, logits: Tensor, history: History, accepted: Accepted) -> None:
        """Takes a verified tree with the target's rows `[1 + N, V]` and what was accepted."""
        ...


class Sequence:
    """A sequence, from its request to its end.

    Args:
        number: counts those of a scheduler; ranks name sequences by it.
        observer: see `Observer`.
        ended: called with the sequence once it has ended.
    Attributes:
        failing: called with the sequence once it has failed, before anything else is computed; may raise what ends all.
        tokens: ids of the prompt and all committed tokens.
        end: most tokens that there will be, prompt included.
        steps: times that tokens were committed; the first is the prompt's.
        finished: whether the last token ends it.
        cancelled: nobody wants the rest of it.
        error: what ended it instead.
        lease: its pages of cache.
        state: what its device keeps of it.
    """

    def __init__(
        self, request: Request, number: int = 0, observer: Observer | None = None,
        ended: Callable[[Sequence], None] | None = None,
    ) -> None:  # fmt: skip
        self.request, self.number, self.observer, self._ended = request, number, observer, ended
        self.sampler, self.speculation = request.sampler, request.speculation
        self.tokens, self.prompt_tokens = list(request.ids), len(request.ids)
        self.end, self.steps = self.prompt_tokens + request.limit, 0
        self.stats = GenerationStats()
        logprobs: list[TokenLogprob] | None = [] if self.sampler.params.logprobs else None
        result = Generation(stats=self.stats, seed=self.sampler.params.known_seed, logprobs=logprobs)
        self.log = EventLog(request.stops, result)
        self.finished, self.cancelled = False, False
        self.error: BaseException | None = None
        self.failing: Callable[[Sequence], None] | None = None
        self.lease: Lease | None = None
        self.state: Any = None

    @property
    def alive(self) -> bool:
        """Whether it is to go on."""
        return not (self.finished or self.cancelled or self.error)

    def fail(self, error: BaseException) -> None:
        """Ends it by an error.

        Raises:
            RankError: another rank, which shares the model, has not failed at the same.
        """
        self.error = error
        if self.failing is not None:
            self.failing(self)

    def is_last(self, token: int) -> bool:
        """Takes the next token that was drawn; returns whether it ends the text. To be asked once for each token."""
        return self.request.stops.push(token)

    def commit(self, drawn: list[Drawn], ended: bool) -> None:
        """Takes the tokens of a step, which `is_last` has seen.

        Args:
            ended: the last one ends the text.
        """
        self.tokens += [one.token for one in drawn]
        self.log.take(drawn, self.steps)
        self.steps += 1
        self.finished = ended
        if ended:
            self.log.result.finish_reason = self.request.stops.reason
            if self._ended is not None:
                self._ended(self)
