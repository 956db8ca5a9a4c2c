"""The GPU's side of one sequence: where it is, and what the host makes of the records of its steps."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from torch import Tensor

from mtp_spec.acceptance.accept import Drawn
from mtp_spec.cuda.kinds import Kind
from mtp_spec.cuda.pages import DeviceLease
from mtp_spec.cuda.state import MOST, WAITING, stages_of
from mtp_spec.errors import MTPSpecError
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.sequence import Sequence


@dataclass(slots=True)
class Record:
    """What a step, or the pass that read a prompt, committed for one sequence.

    Attributes:
        tokens: committed.
        path: the row that drew each of them; row 0 is the root.
        failed: whether a row had no token.
        ranks: of the tree's nodes.
        depth: of the tree.
        logits: `[E, V]` of the sequence's rows, where it asked for them.
        prompt: whether the prompt was read.
    """

    tokens: list[int]
    path: list[int]
    failed: bool = False
    ranks: Seq[int] = ()
    depth: int = 0
    logits: Tensor | None = field(default=None, repr=False)
    prompt: bool = False


class DeviceText:
    """One sequence on a GPU.

    Attributes:
        stages: of sampling that it needs.
        host_draws: whether tokens are drawn on the host: a logits processor sees every row.
        waiting: rows that plain steps put aside for the MTP modules, see `shapes`.
    """

    def __init__(self, model: DeviceModel, sequence: Sequence, kind: Kind, lease: DeviceLease) -> None:
        self.model, self.sequence, self.kind, self.lease = model, sequence, kind, lease
        self.sampler = sequence.sampler
        self.params = self.sampler.params
        self.stages, self.host_draws = stages_of(self.params), kind.host_draws
        self.history = self.sampler.history(sequence.tokens) if self.host_draws else None
        self.waiting = 1
        self.drafts = kind.depth > 0
        # tokens that the MTP modules have not seen at most: of steps on their way, and put aside by plain ones
        self._late = 2 * MOST + (WAITING if kind.takes_turns else 0)
        sequence.stats.reused_tokens = lease.reused

    @property
    def tokens(self) -> list[int]:
        """Of the sequence."""
        return self.sequence.tokens

    @property
    def left(self) -> int:
        """Tokens that it may still get."""
        return self.sequence.end - len(self.sequence.tokens)

    def has_read(self, count: int) -> None:
        """Lets others share what is read of the prompt, or about to be: its first `count` tokens."""
        self._share(count, min(count, len(self.tokens) - 1))

    def take(self, record: Record) -> None:
        """Commits tokens one by one until the text ends.

        Raises:
            MTPSpecError: a row had no token.
        """
        if record.failed:
            self._fail(record.logits[record.path[-1]] if record.logits is not None else None)
        wanted, drawn, ended = self.params.logprobs, list[Drawn](), False
        for j, token in enumerate(record.tokens):
            logprob = None
            if wanted and record.logits is not None:
                logprob = self.sampler.logprobs(record.logits[record.path[j]], token, wanted)
            drawn.append(Drawn(token, j + 1 if j + 1 < len(record.tokens) else 0, logprob))
            ended = self.sequence.is_last(token)
            if ended:
                break
        self.commit(record, drawn, ended)

    def commit(self, record: Record, drawn: list[Drawn], ended: bool) -> None:
        """Counts what a record brought, and makes it tokens."""
        stats = self.sequence.stats
        if record.prompt:
            stats.record_prefill(len(self.tokens))
        else:
            ranks = [record.ranks[row - 1] for row in record.path[1 : len(drawn) + 1]]
            stats.record_step(record.depth, len(record.ranks), ranks, len(drawn))
        self.sequence.commit(drawn, ended)
        held = len(self.tokens) - 1
        self._share(held, held - self._late if self.drafts else held)

    def _share(self, held: int, fed: int) -> None:
        """Lets others share pages with these slots of the main model, and of the first MTP module if it drafts."""
        self.lease.publish(self.tokens, fed - len(self.model.mtp) + 1 if self.drafts else held, self.drafts)

    def _fail(self, row: Tensor | None) -> None:
        reason = "no token is left after logit_bias, or the logits hold NaN or infinity"
        if row is not None and not bool(row.isfinite().any()):
            reason = "the logits hold no finite number"
        raise MTPSpecError(
            f"no token can be drawn at position {len(self.tokens)} or after: {reason}; check the weights, or allow "
            "more tokens"
        )
