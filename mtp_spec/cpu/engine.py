"""The generation loop of one sequence: prefill, then [draft, verify, accept, commit] until it ends.

Plain decoding is the same loop with an empty tree; it runs the same rows and never touches the drafter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from time import perf_counter

import torch
from torch import Tensor

from mtp_spec.acceptance import RULES
from mtp_spec.acceptance.accept import Accepted, Drawn, accept_by_rule, accept_coupled
from mtp_spec.acceptance.base import SeededChoices
from mtp_spec.cache.pages import HostLease
from mtp_spec.cache.prefix import Prefix
from mtp_spec.cpu.draft import Drafter
from mtp_spec.cpu.passes import MainRows, Runner, Work
from mtp_spec.errors import MTPSpecError, NotFiniteError
from mtp_spec.model.undisturbed import undisturbed
from mtp_spec.planning.node_planner import ALONE, TextPlanner
from mtp_spec.sampling.sampler import History, Sampler
from mtp_spec.speculation import Speculation
from mtp_spec.stats import GenerationStats
from mtp_spec.tree import ROOT, TokenTree

_NONE = torch.empty(0)
# prompt tokens that pass through the main model at once
PREFILL_CHUNK = 256


class Decoder:
    """One sequence being generated.

    Args:
        runner: the model, with its MTP modules, and how its passes are run.
        prompt: token ids, at least one.
        sampler: draws the tokens.
        speculation: shape of the trees, or None for plain decoding.
        limit: most tokens that will be drawn.
        is_last: told each token as it is drawn; true ends the text there.
        planner: decides the trees of adaptive speculation.
        prefix, reused: an earlier text's caches and how many of its first tokens to take from them.
        lease: pages to write to, which may hold the first tokens; without, the text has memory of its own.
    """

    def __init__(
        self,
        runner: Runner,
        prompt: Sequence[int],
        sampler: Sampler,
        speculation: Speculation | None,
        limit: int,
        is_last: Callable[[int], bool],
        planner: TextPlanner | None = None,
        prefix: Prefix | None = None,
        reused: int = 0,
        lease: HostLease | None = None,
    ) -> None:
        model = runner.model
        self.model, self.runner, self.sampler = model, runner, sampler
        self.speculation, self.is_last = speculation, is_last
        self.tokens = list(prompt)
        self.end = len(self.tokens) + limit
        self.history = sampler.history(prompt)
        room = self.end + (0 if speculation is None else speculation.nodes)
        self.lease = lease
        self.cache = model.new_cache(room + 1) if lease is None else lease.cache
        self.rule = None if speculation is None else RULES.get(speculation.acceptance)
        self.choices = SeededChoices(sampler.params.known_seed)
        self.planner, self.drafter = planner, None
        if speculation is not None:
            caches = [model.new_mtp_cache(room + 1) for _ in model.mtp] if lease is None else lease.mtp_caches
            self.drafter = Drafter(model, caches, self.rule, self.choices, planner)
            if lease is not None and not lease.drafted:
                self.drafter.leave_out(lease.reused)
        self.stats = GenerationStats(reused_tokens=reused if lease is None else lease.reused)
        self.finished = False
        # false while caches are being written: a step that was cut short leaves them as they must not be used
        self._at_rest = False
        self._prompt, self._threads = len(self.tokens), torch.get_num_threads()
        # the modules' caches stay where this text does not draft
        self._undrafted = prefix if self.drafter is None else None
        if prefix is not None:
            self.cache.take(prefix.cache, reused)
            if self.drafter is not None:
                self.drafter.take(prefix.mtp_caches, reused)
        # shown every verified tree, with the target's rows and what was accepted: see `mtp_spec.analysis.explain`
        self.watch: Callable[[TokenTree, Tensor, History, Accepted], None] | None = None

    def prefill(self) -> list[Drawn]:
        """Fills the cache with the prompt and returns the first token."""
        return self.runner.finish(self.prefilling())

    def step(self) -> list[Drawn]:
        """Drafts a tree, verifies it in one pass, accepts a path, commits it; returns the new tokens."""
        return self.runner.finish(self.stepping())

    def prefilling(self) -> Work[list[Drawn]]:
        """`prefill`, pass by pass."""
        prompt, hidden, logits = self.tokens, _NONE, _NONE
        with self.stats.phase("prefill"):
            for first in range(self.cache.length, len(prompt), PREFILL_CHUNK):
                chunk = prompt[first : first + PREFILL_CHUNK]
                last = first + len(chunk) == len(prompt)
                read = MainRows(chunk, self.cache, range(-1, len(chunk) - 1), scored=int(last), prompt=True)
                yield read
                self._commit(read.hidden, range(len(chunk)))
                hidden, logits = read.hidden[-1:], read.logits
        self.stats.record_prefill(len(prompt))
        self._at_rest = True
        return self._take(self._accept(TokenTree(), hidden, logits))

    def stepping(self) -> Work[list[Drawn]]:
        """`step`, pass by pass."""
        start, self._at_rest = perf_counter(), False
        tree = yield from self._draft()
        drafted = perf_counter()
        hidden, logits = yield from self._verify(tree)
        before = self.history
        accepted = self._accept(tree, hidden, logits)
        if self.watch is not None:
            self.watch(tree, logits, before, accepted)
        self._commit(hidden, [0, *(node + 1 for node in accepted.nodes)])
        if len(tree) and self.runner.technique != "batched" and not math.isfinite(float(hidden.sum())):
            self.cache.clean(len(tree))  # a draft that was not accepted may have left NaN there
        if self.planner is not None:
            ended = perf_counter()
            if self.planner.beside is ALONE:
                self.stats.record_plan(self.planner.tokens, self.planner.seconds, len(accepted.drawn), ended - start)
            if not accepted.stopped:
                times = [drafted - start, ended - drafted]
                if self.planner.beside is ALONE:  # else they are not looked at
                    times = self.model.ranks.first(times)
                self.planner.learn(tree, accepted.nodes, *times)
        ranks = [tree.ranks[node] for node in accepted.nodes]
        self.stats.record_step(tree.depth, len(tree), ranks, len(accepted.drawn))
        self._at_rest = True
        return self._take(accepted)

    @undisturbed()
    def prefix(self) -> Prefix | None:
        """Returns the caches for the next text; None where a step was cut short."""
        if not self._at_rest:
            return None
        if self.drafter is not None:
            caches, drafted = self.drafter.caches, self.runner.finish(self.drafter.settle(self.tokens))
        elif self._undrafted is not None:
            caches, drafted = self._undrafted.mtp_caches, self._undrafted.shared(self.tokens, True, 1)
        else:
            caches, drafted = [self.model.new_mtp_cache(0) for _ in self.model.mtp], 0
        return Prefix(list(self.tokens), self._prompt, self.cache, caches, drafted, self._threads)

    def _draft(self) -> Work[TokenTree]:
        # the target adds a token of its own, so that the deepest useful draft is one short of the limit
        depth = self.end - len(self.tokens) - 1
        if self.drafter is None or self.speculation is None:
            return TokenTree()
        wanted = self.planner is None or self.planner.drafts(len(self.tokens), self.drafter.pending)
        if depth < 1 or not wanted:
            self.drafter.rest()
            return TokenTree()
        with self.stats.phase("draft"):
            tree = yield from self.drafter.draft(self.tokens, self.speculation, depth, self.sampler, self.history)
            self.stats.dropped = self.drafter.dropped
            return tree

    def _verify(self, tree: TokenTree) -> Work[tuple[Tensor, Tensor]]:
        """Returns hidden states `[1 + N, D]` and logits `[1 + N, V]` of the root and the tree's nodes."""
        ids = [self.tokens[-1], *tree.tokens]
        parents = [-1, *(parent + 1 for parent in tree.parents)]
        with self.stats.phase("verify"):
            verified = MainRows(ids, self.cache, parents, scored=len(ids), prompt=False)
            yield verified
            return verified.hidden, verified.logits

    def _accept(self, tree: TokenTree, hidden: Tensor, logits: Tensor) -> Accepted:
        with self.stats.phase("sample"):
            position = len(self.tokens)
            common = (logits, self.sampler, self.history, position, self.is_last)
            try:
                if self.rule is None or self.drafter is None or not len(tree):
                    accepted = accept_coupled(tree, *common)
                else:
                    accepted = accept_by_rule(self.rule, self.choices, tree, self.drafter.laws, *common)
                for node in (ROOT, *accepted.nodes):
                    self.sampler.check(logits[node + 1], position)
                return accepted
            except NotFiniteError as error:
                raise MTPSpecError(f"{error}; {self._origin(tree, error.node, hidden[error.node + 1])}") from error

    def _origin(self, tree: TokenTree, node: int, hidden: Tensor) -> str:
        """Returns where the first NaN or infinity is, as far as caches and a row's hidden state `[D]` tell."""
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

    def _commit(self, hidden: Tensor, rows: Sequence[int]) -> None:
        """Keeps the cache slots of these rows and shows their hidden states to the drafter."""
        self.cache.commit(rows)
        if self.drafter is not None:
            # a copy where other rows, of this text or of others, lie beside these: they are not to be held with them
            whole = hidden.shape[0] == 1 and hidden.untyped_storage().nbytes() == hidden.nbytes
            self.drafter.observe(hidden if whole else hidden[list(rows)])

    def _take(self, accepted: Accepted) -> list[Drawn]:
        self.tokens += [drawn.token for drawn in accepted.drawn]
        self.history = accepted.history
        self.finished = accepted.stopped
        if self.lease is not None:
            drafted = self.drafter is not None and not self.drafter.skips
            held = self.drafter.held if self.drafter is not None and drafted else self.cache.length
            self.lease.publish(self.tokens, held, drafted)
            if self.planner is not None and (self.stats.steps or self.finished):  # others need not wait for drafts
                self.lease.publish(self.tokens, self.cache.length, False)
        return accepted.drawn
