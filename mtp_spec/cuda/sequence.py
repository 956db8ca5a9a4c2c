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
from mtp_spec.kernels import commit as commits
from mtp_spec.model.cache import PAGE
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
class Results:
    """The results of a step, or of a prefill pass, for its sequences.

    Attributes:
        sequences: by slot.
        lines: of each the record (`kernels.commit.accept`); of a chain's, whose rows are 0, 1, 2, ..., at least the
            first part.
        shape: of the tree.
        logits: by slot, `[E, V]` of the sequence's rows, if requested.
        prompt: whether they are of a prefill.
        drafts: for an observer.
        sources: by slot the drafter of the tree, if it is not the MTP modules.
    """

    sequences: Seq[DeviceSequence]
    lines: Seq[list[int]]
    shape: TreeShape
    logits: Mapping[int, Tensor] = field(default_factory=dict)
    prompt: bool = False
    drafts: Drafts | None = None
    sources: Seq[str] = ()
    chain: bool = field(init=False)
    depth: int = field(init=False)

    def __post_init__(self) -> None:
        self.chain, self.depth = self.shape.is_chain, self.shape.depth  # once, not for every sequence

    def tokens(self, slot: int) -> list[int]:
        """Returns the committed tokens."""
        line = self.lines[slot]
        return line[commits.HEADER : commits.HEADER + line[commits.COUNT]]

    def source(self, slot: int) -> str:
        """Returns the drafter of the tree."""
        return self.sources[slot] if self.sources else MODULES

    def path(self, slot: int) -> Seq[int]:
        """Returns the row that drew each of them; row 0 is the root."""
        line, first = self.lines[slot], commits.HEADER + MOST
        count = line[commits.COUNT]
        return range(count) if self.chain else line[first : first + count]


class DeviceSequence:
    """One sequence on a GPU.

    Attributes:
        core: the scheduler's sequence, of which this is the `state`.
        stages: the sampling stages that it needs.
        history: of its tokens, if the host guides it or it has an observer.
        errors: errors of the last step's guidance, by row; raised only if the path reaches that row.
        given: what drafters other than the MTP modules expect after the known tokens.
    """

    def __init__(self, model: DeviceModel, sequence: Sequence, kind: Kind, lease: DeviceLease) -> None:
        self.model, self.core, self.kind, self.lease = model, sequence, kind, lease
        self.sampler = sequence.sampler
        self.params = self.sampler.params
        self.stages = stages_of(self.params)
        self.history = self.sampler.history(sequence.tokens) if kind.guided or kind.watched else None
        self.replay = None if sequence.speculation is None else sequence.speculation.replay
        self.errors: dict[int, Exception] = {}
        self.drafts = kind.modules
        self.given: Continuation | None = None
        self._proposals: Proposals | None = None
        if kind.scripted:
            self._proposals = Proposals(sequence.request.drafters, sequence.tokens, model.config.vocab_size)
        # most tokens that the MTP modules have not seen: of steps in flight, and stored by plain steps
        self._late = 2 * (max(shape.depth for shape in kind.shapes) + 1) + (WAITING if kind.takes_turns else 0)
        self._due = 0  # tokens from which on another page can be shared
        # whether something is wanted of every token or row
        self._asks = self.history is not None or self.params.logprobs > 0
        sequence.stats.reused_tokens = lease.reused

    @property
    def tokens(self) -> list[int]:
        """The sequence's tokens."""
        return self.core.tokens

    @cached_property
    def script(self) -> npt.NDArray[np.int64]:
        """`[T + 1, MAX_DEPTH]`, what is drafted if drafts are replayed."""
        assert self.replay is not None
        return self.replay.table(MAX_DEPTH, self.model.config.vocab_size)

    @property
    def left(self) -> int:
        """Most tokens that it may still generate."""
        return self.core.end - len(self.core.tokens)

    def has_read(self, count: int) -> None:
        """Lets others share the first `count` tokens of the prompt, whose prefill is done or launched."""
        self._share(count, min(count, len(self.tokens) - 1))

    def take(self, results: Results, slot: int) -> None:
        """Commits the tokens of a step or a prefill, up to the one that ends the sequence.

        Raises:
            MTPSpecError: a row had no token to draw.
        """
        tokens, failed = results.tokens(slot), results.lines[slot][commits.FAILED] > 0
        if failed or self._asks or not self.core.extend(tokens, results.source(slot)):
            self._take_each(results, slot, tokens, failed)
        else:
            self._count(results, slot, len(tokens))
        if self._proposals is not None and self.core.alive:
            self._proposals.commit(tokens)
            found = self._proposals.propose((), min(LONGEST, self.left))
            self.given = found[0] if found else None
        if len(self.tokens) >= self._due:
            held = len(self.tokens) - 1
            self._share(held, held - self._late if self.drafts else held)

    def _take_each(self, results: Results, slot: int, tokens: list[int], failed: bool) -> None:
        """Commits the tokens one by one."""
        wanted, drawn, ended = self.params.logprobs, list[Drawn](), False
        path, logits = results.path(slot), results.logits.get(slot)
        for j, token in enumerate(tokens):
            if failed and j + 1 == len(tokens):
                self._fail(path[j], logits, results.prompt, len(self.tokens) + j)
            logprob = None
            if wanted and logits is not None:
                logprob = self.sampler.logprobs(logits[path[j]], token, wanted)
            drawn.append(Drawn(token, j + 1 if j + 1 < len(tokens) else 0, logprob, results.source(slot)))
            ended = self.core.is_last(token)
            if ended:
                break
        before = self.history
        if before is not None:
            self.history = before.extend(one.token for one in drawn)
            if results.drafts is not None and logits is not None:
                accepted = Accepted([], drawn, self.history, ended)
                self._show(results.drafts, path, logits, before, accepted)
        self._count(results, slot, len(drawn))
        self.core.commit(drawn, ended)

    def _count(self, results: Results, slot: int, committed: int) -> None:
        """Adds to the statistics."""
        stats, shape = self.core.stats, results.shape
        if results.prompt:
            stats.record_prefill(self.core.prompt_tokens)
            return
        # the last token of a step is the target's own, unless the sequence ended at a draft before it
        accepted = min(committed, results.lines[slot][commits.COUNT] - 1)
        ranks: Seq[int] = shape.ranks[:accepted]
        if not results.chain:
            ranks = [shape.ranks[row - 1] for row in results.path(slot)[1 : accepted + 1]]
        source = results.source(slot) if self.replay is None else self.replay.name
        if source == MODULES:
            stats.record_step(results.depth, len(shape.parents), ranks, committed)
        else:
            nodes = len(shape.parents)
            stats.record_step(results.depth, nodes, ranks, committed, [source] * accepted, [source] * nodes)

    def _show(self, drafts: Drafts, path: Seq[int], logits: Tensor, history: History, accepted: Accepted) -> None:
        """Passes a step to the sequence's observer; `history` is that of its root, and the nodes are filled in here."""
        observer = self.core.observer
        assert observer is not None
        tree, rows = tree_of(drafts)
        nodes = {0: ROOT, **{row: node for node, row in enumerate(rows)}}
        for parent, row in drafts.rows.items():
            if parent + 1 in nodes:
                observer.drafted(nodes[parent + 1], row)
        accepted.nodes[:] = [nodes[row] for row in path[1 : len(accepted.drawn) + 1]]
        observer.verified(tree, logits[[0, *rows]].cpu(), history, accepted)

    def _share(self, held: int, fed: int) -> None:
        """Lets others share pages with these slots of the main model, and of the first MTP module if it drafts."""
        modules = len(self.model.mtp)
        filled = fed - modules + 1 if self.drafts else held
        pages = self.lease.publish(self.tokens, filled, self.drafts)
        behind = self._late + modules if self.drafts else 1
        self._due = (pages + 1) * PAGE + max(behind, modules)

    def _fail(self, row: int, logits: Tensor | None, prompt: bool, position: int) -> None:
        if row in self.errors and not prompt:
            raise self.errors[row]
        reason = "no token is left after logit_bias, or the logits hold NaN or infinity"
        if self.kind.guided:
            reason = ("no token is left after logit_bias, logits_processor, response_format and min_new_tokens, or the "
                      "logits hold NaN or infinity")  # fmt: skip
        if logits is not None and not bool(logits[row].isfinite().any()):
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
