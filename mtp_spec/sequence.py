"""One sequence that is being generated: its tokens, how they are sampled, when it stops, and its statistics."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from mtp_spec.acceptance.accept import Accepted, Drawn, TokenLogprob
from mtp_spec.cache.pages import Lease
from mtp_spec.errors import MTPSpecError
from mtp_spec.request import Request
from mtp_spec.results import EventLog, Generation
from mtp_spec.sampling.sampler import History
from mtp_spec.stats import GenerationStats
from mtp_spec.tree import MODULES, TokenTree


def raisable(error: BaseException) -> BaseException:
    """Returns an error that iterators of a sequence's tokens can raise.

    One that says that they are exhausted would silently end the text of a `for`, and a future cannot hold it.
    """
    first = error.__cause__ if isinstance(error, RuntimeError) else error  # Python's own, from within a generator
    if not isinstance(first, StopIteration | StopAsyncIteration):
        return error
    found = MTPSpecError(
        f"a drafter, logits processor or observer raised {type(first).__name__}: it called next() on an iterator that "
        "has no more; give next() a default"
    )
    found.__cause__ = first
    return found


@runtime_checkable
class Observer(Protocol):
    """Watches the steps of a sequence without changing them."""

    def drafted(self, parent: int, row: Tensor) -> None:
        """Called with the processed draft row `[V]` that a node's children are drawn from; ROOT begins a new tree."""
        ...

    def pruned(self, kept: list[int]) -> None:
        """Called with the nodes that are kept for verifying, ascending; they are renumbered."""
        ...

    def verified(self, tree: TokenTree, logits: Tensor, history: History, accepted: Accepted) -> None:
        """Called with a verified tree, the target's rows `[1 + N, V]` and what was accepted."""
        ...


class Sequence:
    """A sequence, from its request to its last token.

    Args:
        number: unique within a scheduler; ranks identify sequences by it.
        observer: see `Observer`.
        ended: called with the sequence once it has finished.
    Attributes:
        failing: called with the sequence when it fails, before anything else is computed; an exception from it ends
            all sequences.
        tokens: ids of the prompt and all committed tokens.
        end: most tokens that it may have, prompt included.
        steps: number of commits; the first is that of the prefill.
        finished: whether the last token stopped it.
        cancelled: whether its caller no longer wants it.
        error: the exception that ended it, if any.
        lease: its pages of cache.
        state: the device's state for it.
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
        """Whether it continues."""
        return not (self.finished or self.cancelled or self.error)

    def fail(self, error: BaseException) -> None:
        """Ends it with an error.

        Raises:
            RankError: another rank that shares the model has not failed on the same sequence.
        """
        self.error = raisable(error)
        if self.failing is not None:
            self.failing(self)

    def is_last(self, token: int) -> bool:
        """Takes the next drawn token; returns whether it ends the sequence. Call it exactly once for each token."""
        return self.request.stops.push(token)

    def commit(self, drawn: list[Drawn], ended: bool) -> None:
        """Appends the tokens of a step, each of which was passed to `is_last`.

        Args:
            ended: whether the last one ends the sequence.
        """
        logprobs = [one.logprob for one in drawn if one.logprob is not None]
        sources = [one.source for one in drawn if one.depth > 0]
        self._append([one.token for one in drawn], len(sources), logprobs, sources)
        self.finished = ended
        if ended:
            self.log.result.finish_reason = self.request.stops.reason
            if self._ended is not None:
                self._ended(self)

    def extend(self, tokens: list[int], source: str = MODULES) -> bool:
        """Appends the tokens of a step, all but the last of them drafted, if none can end the sequence; else returns
        false and changes nothing. Their log-probabilities are not wanted."""
        if not self.request.stops.pass_by(tokens):
            return False
        self._append(tokens, len(tokens) - 1, (), () if source == MODULES else [source] * (len(tokens) - 1))
        return True

    def _append(
        self, tokens: list[int], drafted: int, logprobs: Seq[TokenLogprob], sources: Seq[str]
    ) -> None:  # fmt: skip
        self.tokens += tokens
        self.log.take(tokens, drafted, self.steps, logprobs, sources)
        self.steps += 1
