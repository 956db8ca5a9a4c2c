"""Runs the MTP modules depth by depth and grows the token tree.

Module d turns (hidden state of depth d - 1 at position i, token i + d) into the hidden state from which token
i + d + 1 is predicted (V3 report, 2412.19437, eq. 21-23). Each module keeps its own latent cache. Before a tree is
grown, the caches are extended with the true hidden states of the tokens committed since the last step; the slots that
drafting wrote are dropped. Deeper levels reuse the last module on its own output.

Legend: `n` position of the root (the last committed token), `D` hidden size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtp_spec.acceptance import Choices, Rule
from mtp_spec.acceptance.base import Distribution, certain, mixed
from mtp_spec.cpu.passes import MOST_ROWS, HeadRows, ModuleRows, Work
from mtp_spec.drafting import Continuation
from mtp_spec.model.attention import plan_drafts, plan_rows
from mtp_spec.model.cache import LatentCache
from mtp_spec.model.host import HostModel
from mtp_spec.planning.fixed_plan import Propose, TreePlan
from mtp_spec.planning.given import LEAST_BESIDE
from mtp_spec.sampling.sampler import History, Sampler
from mtp_spec.sequence import Observer
from mtp_spec.tree import MODULES, ROOT, TokenTree

# If plain steps leave more than MOST_BEHIND tokens that the modules have not seen, only the last KEPT_BEHIND are kept,
# so that a pause costs nothing: drafts need the recent context most (Windowed-MTP, 2607.21535).
MOST_BEHIND, KEPT_BEHIND = 48, 24


@dataclass(slots=True)
class Leaf:
    """A node that may get children: what its module needs and where its ancestors lie in that module's cache.

    Attributes:
        hidden: `[1, D]`, the output that predicts this node's children; None if its parent's module did not run.
        score: given by the plan.
        given: other drafters' continuations.
    """

    node: int
    hidden: Tensor | None
    history: History
    slots: tuple[int, ...]
    score: float
    given: list[Continuation] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Child:
    """A candidate child of a leaf; `rest` is what another drafter proposes after it."""

    score: float
    rank: int
    token: int
    parent: Leaf
    distribution: Distribution | None
    source: str = MODULES
    rest: Continuation | None = None


class Best:
    """The best children of a node, see `planning.fixed_plan.Children`."""

    def __init__(self, tokens: list[int], row: Tensor, position: int, sampler: Sampler) -> None:
        self.count, self._tokens = len(tokens), tokens
        self._row, self._position, self._sampler = row, position, sampler

    def lead(self) -> float:
        """Returns the lead of the best one over the next."""
        return self._sampler.lead(self._row, self._position, self._tokens[0])

    def logprobs(self) -> list[float]:
        """Returns their log-probabilities under the draft."""
        logprobs = self._row.log_softmax(-1)
        return [float(logprobs[token]) for token in self._tokens]


class Picked:
    """The best child of a node, and its lead; see `planning.fixed_plan.Children`."""

    count = 1

    def __init__(self, picked: tuple[int, float], row: Tensor, history: History, sampler: Sampler) -> None:
        self._picked, self._row, self._history, self._sampler = picked, row, history, sampler

    def lead(self) -> float:
        """Returns the lead of the best one over the next."""
        return self._picked[1]

    def logprobs(self) -> list[float]:
        """Returns its log-probability under the draft."""
        return [float(self._sampler.process(self._row, self._history).log_softmax(-1)[self._picked[0]])]


class Drafter:
    """The MTP side of one sequence.

    Args:
        model: with at least one MTP module.
        caches: one for each module.
        rule: draws the drafts; None for the coupled rule, whose drafts follow from the shared noise.
        choices: the rule's randomness.
        observer: gets every row that drafts come from, see `sequence.Observer`.
        replay: `[T + 1, D]` of `drafting.Replay`, which replaces the drafts of a chain.
        prompt: number of tokens before T.
    Attributes:
        distributions: for each node of the last tree the distribution it was drawn from; empty without a rule.
        dropped: number of rows so far that gave no draft because they held NaN or infinity.
    """

    def __init__(
        self,
        model: HostModel,
        caches: Sequence[LatentCache],
        rule: Rule | None = None,
        choices: Choices | None = None,
        observer: Observer | None = None,
        replay: npt.NDArray[np.int64] | None = None,
        prompt: int = 0,
    ) -> None:
        self._replay, self._prompt = replay, prompt
        self.model, self.rule, self.choices, self.observer = model, rule, choices, observer
        self.distributions: list[Distribution] = []
        self.dropped = 0
        self.caches = list(caches)
        # per module: inputs not yet in its cache, hidden states of consecutive positions
        self._pending: list[list[Tensor]] = [[] for _ in model.mtp]
        self.pending = 0  # committed positions that the first module has not seen
        self._left_out = 0  # tokens before that of slot 0
        # the first module's output at the last position it has seen, and its logits, once known
        self._root_hidden: Tensor | None = None
        self._root_logits: Tensor | None = None

    def settle(self, tokens: Sequence[int]) -> Work[int]:
        """Brings every module's cache up to the committed tokens; returns `held`."""
        if self._pending[0]:
            yield from self._extend(tokens)
        return self.held

    @property
    def held(self) -> int:
        """The first positions that all modules' caches hold."""
        return 0 if self._left_out else min(cache.length for cache in self.caches)

    def leave_out(self, tokens: int) -> None:
        """Starts after the first tokens, whose hidden states are not known."""
        self._left_out = tokens
        for cache in self.caches:
            cache.restart(tokens)

    @property
    def skips(self) -> bool:
        """Whether tokens were left out, so that the caches do not hold the whole sequence."""
        return self._left_out > 0

    def observe(self, hidden: Tensor) -> None:
        """Takes the main model's normed hidden states `[k, D]` of newly committed positions, in order."""
        self._pending[0].append(hidden)
        self.pending += hidden.shape[0]

    def skip(self) -> None:
        """Records a step without drafting; if more than `MOST_BEHIND` hidden states wait, keeps the last few."""
        if self.pending > MOST_BEHIND:
            hidden = torch.cat(self._pending[0])
            self._left_out += self.caches[0].length + hidden.shape[0] - KEPT_BEHIND
            self._pending = [[hidden[-KEPT_BEHIND:]], *([] for _ in self.caches[1:])]
            self.pending = KEPT_BEHIND
            for cache in self.caches:
                cache.restart(self._left_out)

    def draft(
        self,
        tokens: Sequence[int],
        plan: TreePlan,
        depth: int,
        sampler: Sampler,
        history: History,
        propose: Propose | None = None,
    ) -> Work[TokenTree]:
        """Returns the tree of drafts that follow `tokens`.

        Args:
            tokens: the committed ids 0..n; hidden states of 0..n - 1 were observed.
            plan: decides which nodes the tree has.
            depth: draft no deeper than this.
            history: the sampler's history at the root.
            propose: the other drafters, if there are any.
        """
        root, limits = len(tokens) - 1, plan.limits
        hidden = yield from self._extend(tokens)
        tree, scores, dropped = TokenTree(), list[float](), self.dropped
        leaves = [Leaf(ROOT, hidden, history, (), plan.root)]
        self.distributions.clear()
        for level in range(1, min(depth, limits.depth) + 1):
            if leaves:
                leaves = [leaves[i] for i in plan.expand([leaf.score for leaf in leaves], len(tree))]
            if not leaves:
                break
            width = limits.branching[level - 1]
            if plan.mixes and propose is not None:
                for leaf in leaves:
                    found = leaf.given or propose(tree.path_tokens(leaf.node), min(depth, limits.depth) - level + 1)
                    leaf.given = [one for one in found if one.chances[0] >= LEAST_BESIDE][:width]
            feeding = [leaf for leaf in leaves if leaf.hidden is not None and len(leaf.given) < width]
            rows = dict[int, Tensor]()
            if feeding:
                logits = (
                    yield from self._advance(tree, feeding, level, root) if level > 1 else self._root_scores(hidden)
                )
                rows = {leaf.node: row for leaf, row in zip(feeding, logits, strict=True)}
            leaves = self._grow(tree, leaves, rows, level, root + level, plan, sampler)
            scores += [leaf.score for leaf in leaves]
        if propose is not None:
            plan.graft(tree, scores, lambda path, most: propose(path, min(most, depth - len(path))))
        if self.dropped > dropped:
            for cache in self.caches:
                cache.clean(limits.nodes)
        return self._chosen(tree, plan.choose(tree, scores))

    def _root_scores(self, hidden: Tensor) -> Work[Tensor]:
        """Returns the logits `[1, V]` that the root's children come from."""
        if self._root_logits is None:
            rated = HeadRows(hidden, self.model.config.head_of(0))
            yield rated
            self._root_logits = rated.logits
        return self._root_logits

    def _chosen(self, tree: TokenTree, nodes: list[int]) -> TokenTree:
        if len(nodes) == len(tree):
            return tree
        if self.observer is not None:
            self.observer.pruned(nodes)
        return tree.part(nodes)

    def _extend(self, tokens: Sequence[int]) -> Work[Tensor]:
        """Brings every module's cache up to the committed tokens; returns the root's hidden state `[1, D]`."""
        if not self._pending[0] and self._root_hidden is not None:  # settled since
            return self._root_hidden
        for module, cache in enumerate(self.caches):
            hidden = torch.cat(self._pending[module])
            # rows whose next input token is known
            ready = max(0, len(tokens) - 1 - module - self._left_out - cache.length)
            outputs = yield from self._run(module, tokens, hidden[:ready])
            self._pending[module] = [hidden[ready:]] if ready < hidden.shape[0] else []
            if module == 0:
                self._root_hidden, self.pending = outputs[-1:], hidden.shape[0] - ready
            if module + 1 < len(self.caches):
                self._pending[module + 1].append(outputs)
        assert self._root_hidden is not None
        return self._root_hidden

    def _run(self, module: int, tokens: Sequence[int], hidden: Tensor) -> Work[Tensor]:
        """Appends and commits rows for true hidden states; returns the module's outputs, those of the last module only
        as far as the root's needs them."""
        cache, outputs = self.caches[module], [hidden[:0]]
        table = self.model.table(self._left_out + cache.capacity + len(self.caches))
        prompt, last = hidden.shape[0] > MOST_BEHIND, module + 1 == len(self.caches)
        for part in hidden.split(MOST_ROWS) if hidden.shape[0] else ():
            offset = self._left_out + module + 1
            ids = tokens[offset + cache.length :][: part.shape[0]]
            plan = plan_rows(table, cache.length, range(-1, len(ids) - 1), offset)
            extended = ModuleRows(module, ids, part, cache, plan, prompt, scored=int(module == 0),
                                  kept=int(module == 0) if last else None)  # fmt: skip
            yield extended
            outputs.append(extended.outputs)
            if module == 0:
                self._root_logits = extended.logits
            cache.commit(range(len(ids)))
        return torch.cat(outputs)

    def _advance(self, tree: TokenTree, leaves: list[Leaf], level: int, root: int) -> Work[Tensor]:
        """Runs the module of this level on the leaves' own tokens; returns the logits `[M, V]` of their children."""
        module = min(level, len(self.caches)) - 1
        cache = self.caches[module]
        if level <= len(self.caches):  # a module's first level: nothing drafted is in its cache yet
            for leaf in leaves:
                leaf.slots = ()
        start = max((slot + 1 for leaf in leaves for slot in leaf.slots), default=cache.length)
        table = self.model.table(root + level + 1)
        ancestors = [leaf.slots for leaf in leaves]
        plan = plan_drafts(table, start, cache.length, root + level - 1, ancestors)
        ids = [tree.tokens[leaf.node] for leaf in leaves]
        hidden = torch.cat([leaf.hidden for leaf in leaves if leaf.hidden is not None])
        drafted = ModuleRows(module, ids, hidden, cache, plan, prompt=False, scored=len(ids))
        yield drafted
        for row, leaf in enumerate(leaves):
            leaf.hidden, leaf.slots = drafted.outputs[row : row + 1], (*leaf.slots, start + row)
        return drafted.logits

    def _grow(
        self,
        tree: TokenTree,
        leaves: list[Leaf],
        rows: dict[int, Tensor],
        level: int,
        position: int,
        plan: TreePlan,
        sampler: Sampler,
    ) -> list[Leaf]:
        """Adds this level's children, the best ones if there is a budget; returns the new leaves.

        Args:
            rows: the modules' logits `[V]` for leaves whose children are not all given.
        """
        width, limits = plan.limits.branching[level - 1], plan.limits
        children: list[Child] = []
        for parent in leaves:
            processed, row = None, rows.get(parent.node)
            if row is not None and not parent.given and width == 1 and (picked := self._picked(row, position, sampler)):
                best = Picked(picked, row, parent.history, sampler)
                children += [Child(score, 0, picked[0], parent, None)
                             for score in plan.score(parent.node, parent.score, best, level)]  # fmt: skip
                continue
            if row is not None:
                processed = sampler.process(row, parent.history)
                if sampler.guides:  # the modules cannot go on below a token that is not allowed
                    parent.given = [one for one in parent.given if float(processed[one.tokens[0]]) != -math.inf]
            first = [one.tokens[0] for one in parent.given]
            for rank, one in enumerate(parent.given):
                distribution = None if self.rule is None else certain(first[rank], self.model.config.vocab_size)
                rest = one.rest() if len(one.tokens) > 1 else None
                score = plan.proposed(parent.score, one)
                children.append(Child(score, rank, first[rank], parent, distribution, one.source, rest))
            if processed is None or row is None:
                continue
            if self.observer is not None:
                self.observer.drafted(parent.node, processed)
            if sampler.leaves_nothing(processed):
                if float(processed.max()) != -math.inf:
                    self._drop(level, row)
                continue
            top, distributions = self._propose(processed, position, width, sampler, first)
            if not top:
                continue
            scores = plan.score(parent.node, parent.score, Best(top, processed, position, sampler), level)
            top = self._replayed(top, position, level)
            children += [Child(score, len(first) + number, top[number], parent, distributions[number])
                         for number, score in enumerate(scores)]  # fmt: skip
        if limits.budget is not None:
            children = sorted(children, key=lambda child: -child.score)[: limits.room(level, len(tree))]
        grown = []
        for child in children:
            parent = child.parent
            node = tree.add(parent.node, child.token, child.rank, child.source)
            if child.distribution is not None:
                self.distributions.append(child.distribution)
            hidden = parent.hidden if parent.node in rows else None
            given = [] if child.rest is None else [child.rest]
            grown.append(Leaf(node, hidden, parent.history.child(child.token), parent.slots, child.score, given))
        return grown

    def _picked(self, row: Tensor, position: int, sampler: Sampler) -> tuple[int, float] | None:
        """Returns the only child of a row and its lead, if nothing else has to be known of the row."""
        if self.rule is not None or self.observer is not None or self._replay is not None:
            return None
        return sampler.pick(row, position)

    def _replayed(self, top: list[int], position: int, level: int) -> list[int]:
        """Returns what is drafted for a position, which the modules have drafted as `top`."""
        row = position - level + 1 - self._prompt
        if self._replay is None or row >= len(self._replay) or (token := int(self._replay[row, level - 1])) < 0:
            return top
        return [token]

    def _drop(self, level: int, row: Tensor) -> None:
        """Counts a row that no draft can be drawn from, and warns once of the module that computed it."""
        self.dropped += 1
        module, model = min(level, len(self.caches)) - 1, self.model
        if module in model.unsound or not bool((row.isnan() | row.isposinf()).any()):  # a logits processor's
            return
        model.unsound.add(module)
        name = f"model.layers.{model.config.num_hidden_layers + module}"
        warnings.warn(
            f"MTP module {module + 1} of {len(self.caches)} ({name}) gives NaN or infinity: its drafts are dropped, "
            "and the text goes on as without them; check its weights, or load with a wider dtype",
            stacklevel=2,
        )  # fmt: skip

    def _propose(
        self, processed: Tensor, position: int, width: int, sampler: Sampler, given: Sequence[int]
    ) -> tuple[list[int], list[Distribution | None]]:
        """Returns the modules' children beside those given, best first, and the distributions they were drawn from."""
        if self.rule is None or self.choices is None:
            top = [token for token in sampler.top(processed, position, width) if token not in given]
            top = top[: width - len(given)]
            return top, [None] * len(top)
        distribution = sampler.distribution(processed, position)
        proposals = mixed(self.rule, given, distribution, processed.numpy(), width, self.choices)[len(given) :]
        return [proposal.token for proposal in proposals], [proposal.distribution for proposal in proposals]
