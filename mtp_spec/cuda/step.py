"""One step on a GPU as one CUDA graph, or as three if the host guides it: extend, draft, verify, accept, commit.

All inputs and results of a step stay on the device, so steps follow each other without waiting for the host, which
reads the record of committed tokens one step later. Plain decoding is the step without a tree.

Legend: `B` sequences that share the step, `E` rows of each in the verify pass (root and nodes), `M` = B E, `N` nodes,
`A` = most tokens a step commits, `n` position of the root.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtp_spec.cuda.constants import Constants
from mtp_spec.cuda.draft import feed_modules, run_module
from mtp_spec.cuda.graphs import Graphs
from mtp_spec.cuda.guided import masked, remaining
from mtp_spec.cuda.kinds import Guided
from mtp_spec.cuda.rules import DeviceRule
from mtp_spec.cuda.script import expected, replaced, scripted
from mtp_spec.cuda.state import State
from mtp_spec.kernels import commit as commits
from mtp_spec.kernels import mla
from mtp_spec.kernels.sampler import Sampled, Stages, sample
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.tree_shape import TreeShape


@dataclass(slots=True)
class Step:
    """The step of one tree shape for all sequences of a state. Calling it runs the step, after `capture` as a graph.

    Args:
        extend: most tokens that the previous step leaves for the MTP modules to see; 0 without drafting. A step without
            a tree does not process them: then it is one of several shapes (`cuda.shapes`). A step that may commit more
            shows the modules all but the last itself.
        acceptance: the rule; all but "coupled" draw and accept drafts by `cuda.rules`.
        guided: what the host sends between verify and accept, see `kinds.Kind`: the parts are captured separately.
        masks: the buffer that receives it, see `guided.Guide`.
        watched: keep the rows that drafts come from.
        scripted: the drafts are those of the state's script, not the modules'.
        replay: the tokens that the modules draft are replaced.
    Attributes:
        logits: `[M, V]` float32 of the last call, root first; after "accept" without the tokens a guide has removed.
        ids: `[M]` int64, the tokens of its rows. A captured step of a state with its own logits buffer keeps nothing
            but the logits there.
        drafted: if watched, for every depth the nodes that have children, and their processed rows `[F, V]`.
    """

    model: DeviceModel
    state: State
    shape: TreeShape
    stages: Stages
    extend: int
    acceptance: str = "coupled"
    guided: Guided | None = None
    masks: Tensor | None = None
    watched: bool = False
    scripted: bool = False
    replay: bool = False
    logits: Tensor = field(init=False)
    ids: Tensor = field(init=False)
    drafted: list[tuple[list[int], Tensor]] = field(init=False, default_factory=list)
    _outputs: Tensor = field(init=False)  # [M, D] of the model
    _graphs: dict[str, Callable[[], None]] = field(init=False, default_factory=dict)
    _constants: Constants = field(init=False)
    _rule: DeviceRule | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._constants = Constants(self.model.device)
        if self.acceptance != "coupled" and self.shape.parents:
            self._rule = DeviceRule(self.acceptance, self.shape, not self.stages.noise, self.state.drawn)

    def __call__(self) -> None:
        for work in (self._graphs or self.parts()).values():
            work()

    def run(self, part: str) -> None:
        """Runs one of the `parts` of a guided step."""
        (self._graphs or self.parts())[part]()

    def capture(self, graphs: Graphs) -> None:
        """Captures the step, so that later calls replay a graph; the state must not hold a sequence."""
        self.state.blank()
        if self.guided is None:
            self._graphs = {"all": graphs.capture(self._run)}
        else:  # each part leaves tensors for the next, so no other graph may run between them
            for name, work in self.parts().items():
                if name == "draft" and not self.shape.parents and self.state.sequences == 1:
                    work()  # the root's token is a view, so nothing is launched, and torch warns of an empty graph
                    replay = _nothing
                else:
                    replay = graphs.capture(work)
                    replay()  # the next part needs the results of this one
                self._graphs = {**self._graphs, name: replay}
        if self.state.logits is not None and self.guided is None:
            del self._outputs, self.ids, self.logits  # lets the many steps of a batch reuse this memory

    def parts(self) -> dict[str, Callable[[], None]]:
        """Returns the parts of a step, in order; benchmarks time them separately."""
        return {"draft": self._propose, "verify": self._verify, "accept": self._accept}

    def _run(self) -> None:
        for part in self.parts().values():
            part()

    def _propose(self) -> None:
        root = self.state.tokens[:, -1:]  # the last committed token: tokens are padded with it
        ids = root
        if self.shape.parents:
            hidden = self.show() if self.extend else None
            drafts = self._given(root) if self.scripted or hidden is None else self._draft(hidden)
            ids = torch.cat((root, drafts), 1)
        self.ids = ids.flatten().contiguous()

    def _verify(self) -> None:
        state, shape, constants = self.state, self.shape, self._constants
        depths, order = constants.integers([0, *shape.depths]), constants.integers(range(shape.rows))
        ancestors = None if shape.is_chain else self._rows()
        plan = mla.Plan(state.length, depths, order, ancestors, shape.depth, pages=state.pages)
        self._outputs = self.model.rows(self.ids, state.caches, plan)
        self.logits = self.model.logits(self._outputs, None if state.logits is None else state.logits[: plan.rows])

    def _accept(self) -> None:
        state, shape, constants, ids = self.state, self.shape, self._constants, self.ids
        position = (state.length[:, None] + constants.integers([0, *shape.depths]) + 1).long().flatten()
        stages, path, logits = remaining(self.stages, self.guided), None, self.logits
        if stages.penalty and shape.parents:
            path = _drafted(ids.unflatten(0, (-1, shape.rows)), self._rows()[:, 1:])
        if self.masks is not None:
            logits = masked(logits, self.masks[: len(logits)], constants)
        drawn = self._sample(logits, position, path, stages)
        tokens = drawn.tokens[:, 0].contiguous()
        if self._rule is not None and drawn.rows is not None:
            tokens, ids = self._rule.judge(drawn.rows)
        self._commit(tokens, drawn.failed, ids)

    def _commit(self, tokens: Tensor, failed: Tensor, ids: Tensor) -> None:
        """Walks the tree along the drawn tokens `[M]`, moves the accepted slots and prepares the next step's state."""
        state, shape = self.state, self.shape
        waits = self.extend and not shape.parents
        if not waits:
            state.hidden[:, : shape.rows] = self._outputs.unflatten(0, (-1, shape.rows))
        parents = self._constants.integers([-1, *(parent + 1 for parent in shape.parents)])
        seen = state.settings.seen if self.stages.penalty else None
        commits.accept(tokens, failed, ids, parents, state.path, state.tokens, state.record, seen, shape.depth)
        if waits:
            commits.keep(self._outputs, state.tokens, state.length, state.hidden, state.ring, state.ring_tokens)
        if not shape.is_chain:
            commits.commit(state.caches, state.length, state.path, state.record, state.pages, shape.depth)
        count = state.record[:, commits.COUNT]
        if state.live is None:
            state.length += count
        else:
            state.length.addcmul_(count, state.live)
        if 0 < self.extend <= shape.depth:
            self._show_all_but_last()

    def _rows(self) -> Tensor:
        """Returns the rows from the root to each row `[E, A]`."""
        shape = self.shape
        return self._constants.table([[0, *(node + 1 for node in shape.path(row - 1))] for row in range(shape.rows)])

    def show(self) -> Tensor:
        """Runs the MTP modules over the tokens of the last step; returns the roots' outputs `[B, D]`."""
        state, rows = self.state, self.extend
        count, sequence = state.record[:, commits.UNSEEN], self._constants.places(range(state.sequences))
        # rows past the count repeat the last token, so they activate few more experts
        hidden, first = state.hidden[sequence[:, None], state.path[:, :rows]], state.length - count
        out = feed_modules(self.model, state, self._constants, state.tokens[:, :rows], hidden, first, count.long())
        state.fed.copy_(state.length)
        return out[sequence, count.long() - 1]

    def _show_all_but_last(self) -> None:
        """Runs the MTP modules over all but the last of this step's tokens, and leaves that one for the next step."""
        state, rows = self.state, self.shape.depth + 1
        count, sequence = state.record[:, commits.UNSEEN], self._constants.places(range(state.sequences))
        hidden, first = state.hidden[sequence[:, None], state.path[:, :rows]], state.length - count
        feed_modules(self.model, state, self._constants, state.tokens[:, :rows], hidden, first, (count - 1).long())
        state.fed.copy_(state.length - 1)
        state.hidden[:, 0] = hidden[sequence, (count - 1).long()]
        state.tokens.copy_(state.tokens[:, -1:].clone().expand_as(state.tokens))
        state.path.zero_()
        count.fill_(1)

    def _given(self, root: Tensor) -> Tensor:
        """Returns the drafts `[B, N]` of the script; the root's token where it has none."""
        state = self.state
        assert state.script is not None
        given = expected(state.script, state.length, self._constants, self.shape.depth)
        return replaced(root.expand_as(given), given)

    def _draft(self, hidden: Tensor) -> Tensor:
        """Returns the drafted tokens of all nodes `[B, N]` int64; hidden `[B, D]` are the roots' outputs."""
        state, shape, constants = self.state, self.shape, self._constants
        tokens = torch.zeros(state.sequences, len(shape.parents), dtype=torch.int64, device=self.model.device)
        feeding = [-1]
        if self._rule is not None:
            self._rule.begin(state.settings.seed)
        self.drafted = []
        for depth in range(1, shape.depth + 1):
            path = None
            if depth > 1:
                above, feeding = feeding, shape.with_children(depth - 1)
                places = constants.places(above.index(shape.parents[n]) for n in feeding)
                hidden = hidden.unflatten(0, (-1, len(above))).index_select(1, places).flatten(0, 1)
                ids = tokens.index_select(1, constants.places(feeding)).flatten()
                hidden = run_module(self.model, state, shape, constants, feeding, ids, hidden)
                if self.stages.penalty:
                    path = _drafted(tokens, constants.table([shape.path(node) for node in feeding]))
            children = shape.level(depth)
            width = max(shape.ranks[node] for node in children) + 1
            position = (state.length[:, None] + depth).long().expand(-1, len(feeding)).contiguous().flatten()
            own = self.model.config.head_of(min(depth, len(state.mtp_caches)) - 1)
            best = width if self._rule is None else 1
            logits = self.model.draft_logits(hidden) if own is None else self.model.draft_logits(hidden, own)
            drawn = self._sample(logits, position, path, self.stages, best, self.watched)
            if self.watched and drawn.rows is not None:
                self.drafted.append((feeding, drawn.rows))
            if self._rule is not None and drawn.rows is not None:
                found = self._rule.propose(depth, drawn.rows, drawn.failed)
            else:
                places = constants.places(
                    feeding.index(shape.parents[node]) * width + shape.ranks[node] for node in children
                )
                found = drawn.tokens.view(state.sequences, -1).index_select(1, places)
            if self.replay and state.replayed is not None:
                found = replaced(found, scripted(state.replayed, state.length, constants, depth)[:, depth - 1 :])
            tokens[:, children[0] : children[-1] + 1] = found
        return tokens

    def _sample(
        self, logits: Tensor, position: Tensor, path: Tensor | None, stages: Stages, best: int = 1, keep: bool = False
    ) -> Sampled:
        sequences = self.state.sequences
        request = self._constants.integers(row * sequences // len(logits) for row in range(len(logits)))
        return sample(
            logits, request, position, self.state.settings, stages, best, path, keep or self._rule is not None
        )

    def proposed(self) -> list[int]:
        """Returns the tokens of the last call's rows; -1 if a rule had none left to propose."""
        if self._rule is None:
            return self.ids.tolist()
        there = torch.cat((torch.ones_like(self._rule.there[:1]), self._rule.there))
        return torch.where(there, self.ids, -1).tolist()


@dataclass(slots=True)
class Prefill:
    """A prefill pass of `rows` tokens of each prompt through the model and, with `draft`, its MTP modules.

    A shorter chunk is padded with its last token; the next pass overwrites the padding's slots.

    Args:
        graphs: if given, the second call captures a graph, because many lengths occur only once.
    Attributes:
        ids: `[B, rows + 1]` int64, the tokens of the pass and one more: the MTP modules read the token after each.
        following: `[B]` int64, number of rows with a known next token.
        hidden: `[B rows, D]`, result.
    """

    model: DeviceModel
    state: State
    rows: int
    draft: bool
    graphs: Graphs | None = None
    ids: Tensor = field(init=False)
    following: Tensor = field(init=False)
    hidden: Tensor = field(init=False)
    _constants: Constants = field(init=False)
    _run: Callable[[], None] = field(init=False)

    def __post_init__(self) -> None:
        sequences, device = self.state.sequences, self.model.device
        self.ids = torch.zeros(sequences, self.rows + 1, dtype=torch.int64, device=device)
        self.following = torch.zeros(sequences, dtype=torch.int64, device=device)
        self._constants = Constants(self.model.device)
        self._run = self.run if self.graphs is None else self.graphs.later(self.run)

    def __call__(self, ids: Tensor, first: int) -> Tensor:
        """Runs the next chunk of a single sequence's prompt `ids` from token `first` on, and fills the caches; returns
        its hidden states `[chunk, D]`."""
        chunk = ids[first : first + self.rows + 1]
        self.ids.copy_(torch.cat((chunk, chunk[-1:].expand(self.rows + 1 - len(chunk)))))
        self.following.fill_(len(chunk) - 1)
        self.state.length.fill_(first)
        self._run()
        return self.hidden[: min(self.rows, len(ids) - first)]

    def run(self) -> None:
        """Runs the pass over `ids` from the state's length on."""
        state, order = self.state, self._constants.integers(range(self.rows))
        plan = mla.Plan(state.length, order, order, None, self.rows - 1, 0, state.pages)
        self.hidden = self.model.rows(self.ids[:, :-1].flatten().contiguous(), state.caches, plan)
        if self.draft:
            hidden = self.hidden.unflatten(0, (state.sequences, self.rows))
            feed_modules(self.model, state, self._constants, self.ids[:, 1:], hidden, state.length, self.following)


def _nothing() -> None:
    """Stands for a part of a step that launches nothing."""


def _drafted(ids: Tensor, table: Tensor) -> Tensor:
    """Looks up a table of paths `[E, A]` in ids `[B, .]`; returns `[B E, A]` int32, -1 where the table has -1."""
    return torch.where(table >= 0, ids[:, table.long().clamp_min(0)], -1).int().flatten(0, 1)
