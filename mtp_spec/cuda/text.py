"""The GPU backend's state of one sequence, and how the host processes the records of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mtp_spec.acceptance.accept import Accepted, Drawn
from mtp_spec.cuda.kinds import Kind
from mtp_spec.cuda.pages import DeviceLease
from mtp_spec.cuda.script import LONGEST
from mtp_spec.cuda.state import MOST, WAITING, stages_of
from mtp_spec.drafting import Continuation
from mtp_spec.drafting.together import Proposals
from mtp_spec.errors import MTPSpecError
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.sampling.sampler import History
from mtp_spec.sequence import Sequence
from mtp_spec.speculation import MAX_DEPTH
from mtp_spec.tree import MODULES, ROOT, TokenTree
from mtp_spec.tree_shape import TreeShape


@dataclass(slots=True)
class Drafts:
    """The drafts of a watched step.

    Attributes:
        ids: of its rows, root first; -1 if nothing was proposed.
        rows: `[V]` processed rows that children are drawn from, by parent node.
    """

    shape: TreeShape
    ids: Seq[int]
    rows: Mapping[int, Tensor]


@dataclass(slots=True)
class Record:
    """The result of a step, or of a prefill, for one sequence.

    Attributes:
        tokens: committed tokens.
        path: the row that drew each of them; row 0 is the root.
        failed: whether a row had no token to draw.
        ranks: of the tree's nodes.
        depth: of the tree.
        logits: `[E, V]` of the sequence's rows, if requested.
        prompt: whether it is of a prefill.
        drafts: for an observer.
        source: the drafter of the tree.
    """

    tokens: list[int]
    path: list[int]
    failed: bool = False
    ranks: Seq[int] = ()
    depth: int = 0
    logits: Tensor | None = field(default=None, repr=False)
    prompt: bool = False
    drafts: Drafts | None = field(default=None, repr=False)
    source: str = MODULES


class DeviceText:
    """One sequence on a GPU.

    Attributes:
        stages: the sampling stages that it needs.
        history: of its tokens, if the host guides it or it has an observer.
        errors: errors of the last step's guidance, by row; raised only if the path reaches that row.
        waiting: number of plain steps' rows stored for the MTP modules, see `shapes`.
        given: what drafters other than the MTP modules expect after the known tokens.
    """

    def __init__(self, model: DeviceModel, sequence: Sequence, kind: Kind, lease: DeviceLease) -> None:
        self.model, self.sequence, self.kind, self.lease = model, sequence, kind, lease
        self.sampler = sequence.sampler
        self.params = self.sampler.params
        self.stages = stages_of(self.params)
        self.history = self.sampler.history(sequence.tokens) if kind.guided or kind.watched else None
        self.replay = None if sequence.speculation is None else sequence.speculation.replay
        self.errors: dict[int, Exception] = {}
        self.waiting = 1
        self.drafts = kind.modules
        self.given: Continuation | None = None
        self._proposals: Proposals | None = None
        if kind.text:
            self._proposals = Proposals(sequence.request.drafters, sequence.tokens, model.config.vocab_size)
        # most tokens that the MTP modules have not seen: of steps in flight, and stored by plain steps
        self._late = 2 * MOST + (WAITING if kind.takes_turns else 0)
        sequence.stats.reused_tokens = lease.reused

    @property
    def tokens(self) -> list[int]:
        """The sequence's tokens."""
        return self.sequence.tokens

    @cached_property
    def script(self) -> npt.NDArray[np.int64]:
        """`[T + 1, MAX_DEPTH]`, what is drafted if drafts are replayed."""
        assert self.replay is not None
        return self.replay.table(MAX_DEPTH, self.model.config.vocab_size)

    @property
    def left(self) -> int:
        """Most tokens that it may still generate."""
        return self.sequence.end - len(self.sequence.tokens)

    def has_read(self, count: int) -> None:
        """Lets others share the first `count` tokens of the prompt, whose prefill is done or launched."""
        self._share(count, min(count, len(self.tokens) - 1))

    def take(self, record: Record) -> None:
        """Commits tokens one by one until the sequence ends.

        Raises:
            MTPSpecError: a row had no token to draw.
        """
        wanted, drawn, ended = self.params.logprobs, list[Drawn](), False
        for j, token in enumerate(record.tokens):
            if record.failed and j + 1 == len(record.tokens):
                self._fail(record, len(self.tokens) + j)
            logprob = None
            if wanted and record.logits is not None:
                logprob = self.sampler.logprobs(record.logits[record.path[j]], token, wanted)
            drawn.append(Drawn(token, j + 1 if j + 1 < len(record.tokens) else 0, logprob, record.source))
            ended = self.sequence.is_last(token)
            if ended:
                break
        before, stats = self.history, self.sequence.stats
        if before is not None:
            self.history = before.extend(one.token for one in drawn)
            if record.drafts is not None:
                self._show(record, record.drafts, before, Accepted([], drawn, self.history, ended))
        if record.prompt:
            stats.record_prefill(len(self.tokens))
        else:
            ranks = [record.ranks[row - 1] for row in record.path[1 : len(drawn) + 1]]
            source = record.source if self.replay is None else self.replay.name
            others = [] if source == MODULES else [source] * len(record.ranks)
            stats.record_step(record.depth, len(record.ranks), ranks, len(drawn), [source] * len(ranks), others)
        self.sequence.commit(drawn, ended)
        if self._proposals is not None and not ended:
            self._proposals.commit([one.token for one in drawn])
            found = self._proposals.propose((), min(LONGEST, self.left))
            self.given = found[0] if found else None
        held = len(self.tokens) - 1
        self._share(held, held - self._late if self.drafts else held)

    def _show(self, record: Record, drafts: Drafts, history: History, accepted: Accepted) -> None:
        """Passes a step to the sequence's observer; `history` is that of its root, and the nodes are filled in here."""
        observer = self.sequence.observer
        assert observer is not None
        assert record.logits is not None
        tree, rows = tree_of(drafts)
        nodes = {0: ROOT, **{row: node for node, row in enumerate(rows)}}
        for parent, row in drafts.rows.items():
            if parent + 1 in nodes:
                observer.drafted(nodes[parent + 1], row)
        accepted.nodes[:] = [nodes[row] for row in record.path[1 : len(accepted.drawn) + 1]]
        observer.verified(tree, record.logits[[0, *rows]].cpu(), history, accepted)

    def _share(self, held: int, fed: int) -> None:
        """Lets others share pages with these slots of the main model, and of the first MTP module if it drafts."""
        self.lease.publish(self.tokens, fed - len(self.model.mtp) + 1 if self.drafts else held, self.drafts)

    def _fail(self, record: Record, position: int) -> None:
        row = record.path[-1]
        if row in self.errors and not record.prompt:
            raise self.errors[row]
        reason = "no token is left after logit_bias, or the logits hold NaN or infinity"
        if self.kind.guided:
            reason = ("no token is left after logit_bias, logits_processor, response_format and min_new_tokens, or the "
                      "logits hold NaN or infinity")  # fmt: skip
        if record.logits is not None and not bool(record.logits[row].isfinite().any()):
            reason = "the logits hold no finite number"
        raise MTPSpecError(
            f"no token can be drawn at position {position}: {reason}; check the weights, or allow more tokens"
        )


def tree_of(drafts: Drafts) -> tuple[TokenTree, list[int]]:
    """Returns the tree that a pass verified, and the row of each of its nodes.

    A row that repeats a sibling, because its distribution had too few tokens, is not a node, and neither is a row below
    one without tokens.
    """
    tree, rows, nodes, shape = TokenTree(), list[int](), {ROOT: ROOT}, drafts.shape
    for place, parent in enumerate(shape.parents):
        token = drafts.ids[place + 1]
        if parent not in nodes or token < 0 or not bool(drafts.rows[parent].max().isfinite()):
            continue
        if tree.child(nodes[parent], token) is None:
            nodes[place] = tree.add(nodes[parent], token, shape.ranks[place])
            rows.append(place + 1)
    return tree, rows
