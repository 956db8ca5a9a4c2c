"""The GPU's side of one sequence: where it is, and what the host makes of the records of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from torch import Tensor

from mtp_spec.acceptance.accept import Accepted, Drawn
from mtp_spec.cuda.kinds import Kind
from mtp_spec.cuda.pages import DeviceLease
from mtp_spec.cuda.state import MOST, WAITING, stages_of
from mtp_spec.errors import MTPSpecError
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.sampling.sampler import History
from mtp_spec.sequence import Sequence
from mtp_spec.tree import ROOT, TokenTree
from mtp_spec.tree_shape import TreeShape


@dataclass(slots=True)
class Drafts:
    """What a watched step drafted.

    Attributes:
        ids: of its rows, root first; -1 where nothing was proposed.
        rows: `[V]` processed rows that children come from, by the node above them.
    """

    shape: TreeShape
    ids: Seq[int]
    rows: Mapping[int, Tensor]


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
        drafts: what an observer is shown.
    """

    tokens: list[int]
    path: list[int]
    failed: bool = False
    ranks: Seq[int] = ()
    depth: int = 0
    logits: Tensor | None = field(default=None, repr=False)
    prompt: bool = False
    drafts: Drafts | None = field(default=None, repr=False)


class DeviceText:
    """One sequence on a GPU.

    Attributes:
        stages: of sampling that it needs.
        history: of its tokens, where the host guides it or somebody looks on.
        errors: what went wrong where the host guided the last step, by row: of interest where the path comes there.
        waiting: rows that plain steps put aside for the MTP modules, see `shapes`.
    """

    def __init__(self, model: DeviceModel, sequence: Sequence, kind: Kind, lease: DeviceLease) -> None:
        self.model, self.sequence, self.kind, self.lease = model, sequence, kind, lease
        self.sampler = sequence.sampler
        self.params = self.sampler.params
        self.stages = stages_of(self.params)
        self.history = self.sampler.history(sequence.tokens) if kind.guided or kind.watched else None
        self.errors: dict[int, Exception] = {}
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
        wanted, drawn, ended = self.params.logprobs, list[Drawn](), False
        for j, token in enumerate(record.tokens):
            if record.failed and j + 1 == len(record.tokens):
                self._fail(record, len(self.tokens) + j)
            logprob = None
            if wanted and record.logits is not None:
                logprob = self.sampler.logprobs(record.logits[record.path[j]], token, wanted)
            drawn.append(Drawn(token, j + 1 if j + 1 < len(record.tokens) else 0, logprob))
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
            stats.record_step(record.depth, len(record.ranks), ranks, len(drawn))
        self.sequence.commit(drawn, ended)
        held = len(self.tokens) - 1
        self._share(held, held - self._late if self.drafts else held)

    def _show(self, record: Record, drafts: Drafts, history: History, accepted: Accepted) -> None:
        """Shows the sequence's observer a step; `history` is that of its root, the nodes come here."""
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

    A row that repeats a sibling, as where a distribution had too few tokens, is no node, and neither is what follows a
    row without tokens.
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
