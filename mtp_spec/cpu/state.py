"""The CPU's state of a sequence, above all its caches and drafter, and the sequence's own part of each step."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from mtp_spec.acceptance import RULES
from mtp_spec.acceptance.accept import Accepted, accept_by_rule, accept_coupled
from mtp_spec.acceptance.base import Distribution, SeededChoices, certain
from mtp_spec.cache.pages import HostLease
from mtp_spec.cpu.draft import MOST_BEHIND, Drafter
from mtp_spec.cpu.passes import MOST_ROWS, MainRows, Pass, Work
from mtp_spec.drafting import Continuation
from mtp_spec.drafting.together import Proposals
from mtp_spec.errors import MTPSpecError, NotFiniteError
from mtp_spec.model.host import HostModel, Technique
from mtp_spec.planning.fixed_plan import Standing, TreePlan
from mtp_spec.planning.sequence_memory import SequenceMemory
from mtp_spec.sequence import Sequence
from mtp_spec.speculation import MAX_DEPTH
from mtp_spec.tree import MODULES, ROOT, TokenTree

_NONE = torch.empty(0)


class HostState:
    """The CPU's side of one sequence.

    Args:
        lease: its pages, the first of which may already be filled.
        memory: of the planner; None without adaptive speculation.
    Attributes:
        reading: the prefill, or the MTP modules' catching up; None between steps.
        wanted: the pass that `reading` waits for.
        read: the round in which its last prefill chunk ran.
        rows: number of rows of the last verified root and tree.
        plan: of the next step, until it is committed.
    """

    def __init__(
        self, model: HostModel, technique: Technique, sequence: Sequence, lease: HostLease,
        memory: SequenceMemory | None,
    ) -> None:  # fmt: skip
        self.model, self.technique, self.sequence, self.memory = model, technique, sequence, memory
        self.lease, self.cache, speculation = lease, lease.cache, sequence.speculation
        self.sampler, self.stats = sequence.sampler, sequence.stats
        self.history = self.sampler.history(sequence.tokens)
        self.rule = None if speculation is None else RULES.get(speculation.acceptance)
        self.choices = SeededChoices(self.sampler.params.known_seed)
        self.drafter: Drafter | None = None
        self.proposals: Proposals | None = None
        self._given: Seq[Continuation] = ()
        self._told, self._nodes = len(sequence.tokens), 0 if speculation is None else speculation.nodes
        if sequence.request.drafters:
            self.proposals = Proposals(sequence.request.drafters, sequence.tokens, model.config.vocab_size)
        self.distributions = list[Distribution]()
        self.replay = None if speculation is None else speculation.replay
        if sequence.request.modules:
            table = None if self.replay is None else self.replay.table(MAX_DEPTH, model.config.vocab_size)
            self.drafter = Drafter(model, lease.mtp_caches, self.rule, self.choices, sequence.observer, table,
                                   sequence.prompt_tokens)  # fmt: skip
            self.distributions = self.drafter.distributions
            if not lease.drafted:
                self.drafter.leave_out(lease.reused)
        self.stats.reused_tokens = lease.reused
        self.reading: Work[Accepted | None] | None = self._prefill()
        self.wanted: Pass | None = next(self.reading)
        self.read, self.rows = 0, 1
        self.plan: TreePlan | None = None

    @property
    def tokens(self) -> list[int]:
        """The sequence's tokens."""
        return self.sequence.tokens

    # reading

    def _prefill(self) -> Work[Accepted | None]:
        """Fills the cache with the prompt and draws the first token."""
        prompt, hidden, logits = self.tokens, _NONE, _NONE
        with self.stats.phase("prefill"):
            for first in range(self.cache.length, len(prompt), MOST_ROWS):
                chunk = prompt[first : first + MOST_ROWS]
                last = first + len(chunk) == len(prompt)
                read = MainRows(chunk, self.cache, range(-1, len(chunk) - 1), scored=int(last), prompt=True,
                                kept=int(last) if self.drafter is None else None)  # fmt: skip
                yield read
                self._keep(read.hidden, range(len(chunk)))
                hidden, logits = read.hidden[-1:], read.logits
        self.stats.record_prefill(len(prompt))
        return self.accept(TokenTree(), hidden, logits)

    def _show_prompt(self) -> Work[Accepted | None]:
        """Runs the MTP modules over a long backlog of tokens that they have not seen."""
        assert self.drafter is not None
        with self.stats.phase("draft"):
            yield from self.drafter.settle(self.tokens)
        return None

    def go_on(self) -> Accepted | None:
        """Continues `reading` after the pass that it waited for; returns the first token once it is drawn."""
        assert self.reading is not None
        try:
            self.wanted = next(self.reading)
            return None
        except StopIteration as end:
            accepted: Accepted | None = end.value
            self.reading = self.wanted = None
            return accepted

    def ask(self) -> None:
        """Asks the other drafters what may follow, for the next step.

        Raises:
            Exception: a drafter's own.
        """
        if self.proposals is None:
            return
        tokens = self.sequence.tokens
        if (count := len(tokens)) > self._told:
            self.proposals.commit(tokens[self._told :])
            self._told = count
            self._given = self.proposals.propose((), min(self._nodes, self.sequence.end - count - 1))

    @property
    def _deepest(self) -> int:
        """Depth of the deepest useful draft: the target adds a token of its own, so it is one short of the limit."""
        return self.sequence.end - len(self.tokens) - 1

    def standing(self) -> Standing:
        """Returns the state that the planner needs."""
        drafter, count, left = self.drafter, len(self.tokens), self.sequence.end - len(self.tokens)
        pending = 0 if drafter is None else drafter.pending
        return Standing(self.sequence.speculation, self.memory, count, pending, left, self.rows, self.plan,
                        drafter is not None, self._given)  # fmt: skip

    def begins_step(self, plan: TreePlan) -> bool:
        """Takes the plan of the next step; returns false if the MTP modules have to catch up first.

        Catching up takes passes as long as a prefill's, and other sequences' steps must not wait for them.
        """
        self.plan = plan
        if plan.drafts and self.drafter is not None and self.drafter.pending > MOST_BEHIND:
            self.reading = self._show_prompt()
            self.wanted = next(self.reading)
            return False
        return True

    # the parts of a step

    def draft(self) -> Work[TokenTree]:
        """Returns the tree of the next step, empty for a plain one."""
        plan, drafter, proposals = self.plan, self.drafter, self.proposals
        if plan is None:
            return TokenTree()
        if not plan.drafts or drafter is None:
            if drafter is not None:
                drafter.skip()
            if self.rule is not None:
                self.distributions[:] = [certain(token, self.model.config.vocab_size) for token in plan.given.tokens]
            return plan.given
        propose = None if proposals is None else proposals.propose
        with self.stats.phase("draft"):
            tree = yield from drafter.draft(self.tokens, plan, self._deepest, self.sampler, self.history, propose)
            self.stats.dropped = drafter.dropped
            return tree

    def verify(self, tree: TokenTree) -> MainRows:
        """Returns the pass that verifies a tree, for hidden states and logits of the root and the nodes."""
        ids = [self.tokens[-1], *tree.tokens]
        parents = [-1, *(parent + 1 for parent in tree.parents)]
        self.rows = len(ids)
        return MainRows(ids, self.cache, parents, scored=len(ids), prompt=False)

    def accept(self, tree: TokenTree, hidden: Tensor, logits: Tensor) -> Accepted:
        """Returns the accepted path of a tree, given the hidden states and logits of root and nodes."""
        sequence, position = self.sequence, len(self.tokens)
        with self.stats.phase("sample"):
            common = (logits, self.sampler, self.history, position, sequence.is_last)
            try:
                if self.rule is None or not len(tree):
                    accepted = accept_coupled(tree, *common)
                else:
                    accepted = accept_by_rule(self.rule, self.choices, tree, self.distributions, *common)
                for node in (ROOT, *accepted.nodes):
                    self.sampler.check(logits[node + 1], position)
            except NotFiniteError as error:
                raise MTPSpecError(f"{error}; {self._origin(tree, error.node, hidden[error.node + 1])}") from error
        if sequence.observer is not None and sequence.steps:
            sequence.observer.verified(tree, logits, self.history, accepted)
        return accepted

    def commit_step(self, tree: TokenTree, hidden: Tensor, accepted: Accepted) -> None:
        """Keeps the accepted path in the caches and records the step."""
        self._keep(hidden, [0, *(node + 1 for node in accepted.nodes)])
        if len(tree) and self.technique != "batched" and not math.isfinite(float(hidden.sum())):
            self.cache.clean(len(tree))  # a rejected draft may have left NaN there
        ranks = [tree.ranks[node] for node in accepted.nodes]
        sources, others = [tree.sources[node] for node in accepted.nodes], [s for s in tree.sources if s != MODULES]
        if self.replay is not None:
            sources, others = [self.replay.name] * len(ranks), [self.replay.name] * len(tree)
        self.stats.record_step(tree.depth, len(tree), ranks, len(accepted.drawn), sources, others)

    def take(self, accepted: Accepted) -> None:
        """Commits the accepted tokens, and lets other sequences share the pages that are full by now."""
        self.history = accepted.history
        self.sequence.commit(accepted.drawn, accepted.stopped)
        if self.technique == "batched":
            drafted = self.drafter is not None and not self.drafter.skips
            held = self.drafter.held if self.drafter is not None and drafted else self.cache.length
            self.lease.publish(self.tokens, held, drafted)
            if self.memory is not None and (self.stats.steps or self.sequence.finished):
                self.lease.publish(self.tokens, self.cache.length, False)  # others need not wait for drafts
        elif self.stats.steps <= 1:
            # rows depend on the pass that computed them: share only those of whole prefill chunks
            whole = (self.sequence.prompt_tokens - len(self.model.mtp)) // MOST_ROWS * MOST_ROWS
            drafted = self.drafter is not None and not self.drafter.skips and self.drafter.held >= whole
            self.lease.publish(self.tokens, whole, drafted)

    def _keep(self, hidden: Tensor, rows: Seq[int]) -> None:
        """Keeps the cache slots of these rows and passes their hidden states to the drafter, if there is one."""
        self.cache.commit(rows)
        if self.drafter is not None:
            # copy unless this is the only row of its storage: a view would keep the memory of all other rows
            whole = hidden.shape[0] == 1 and hidden.untyped_storage().nbytes() == hidden.nbytes
            self.drafter.observe(hidden if whole else hidden[list(rows)])

    def _origin(self, tree: TokenTree, node: int, hidden: Tensor) -> str:
        """Returns where the first NaN or infinity is, as far as caches and a row's hidden state `[D]` show."""
        path, start = tree.path(node), self.cache.length
        rows = [] if start == len(self.tokens) else [start, *(start + 1 + one for one in path)]  # of the last pass
        tokens = [*self.tokens[: start + 1], *(tree.tokens[one] for one in path)]
        found = self.cache.first_unsound([*range(start), *rows])
        if found is not None:
            layer, place = found
            before = f"model.layers.{layer - 1}" if layer else "the embedding"
            return (
                f"the first one is at token position {place} (id {tokens[place]}): made by {before}, or by the input "
                f"norm or kv_a_proj of model.layers.{layer}"
            )
        if bool(hidden.isfinite().all()):
            return "the row's hidden state is finite: made by lm_head"
        return f"the caches hold none: made by model.layers.{len(self.cache.slots) - 1} or model.norm"
