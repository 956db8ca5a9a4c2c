"""What one sequence drafts in one step (`TreePlan`), and the simplest plan: a fixed tree.

The drafter (`cpu.draft`) asks a plan level by level which leaves get children and how each child scores, and at the end
which nodes are verified.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from typing import Protocol

from mtp_spec.drafting import Continuation
from mtp_spec.planning.base import Outcome
from mtp_spec.planning.given import fixed_tree
from mtp_spec.planning.sequence_memory import SequenceMemory
from mtp_spec.speculation import Speculation
from mtp_spec.tree import TokenTree

# path below the root and most tokens -> proposals, see `drafting.together.Proposals`
Propose = Callable[[Sequence[int], int], Sequence[Continuation]]
LEAST_CHANCE = 1e-6  # of a proposal, where its logarithm is needed


class Children(Protocol):
    """The best candidate children of a node. Whatever takes time is computed only on demand.

    Attributes:
        count: how many there are.
    """

    count: int

    def lead(self) -> float:
        """Returns the lead of the best one over the next, in units of the noise."""
        ...

    def logprobs(self) -> list[float]:
        """Returns their log-probabilities under the draft, best first."""
        ...


class TreePlan(Protocol):
    """What one sequence drafts in one step.

    Attributes:
        standing: of the sequence when the step was planned.
        drafts: whether the MTP modules draft.
        given: the tree of other drafters' proposals that is verified instead; empty if the modules draft.
        mixes: whether other drafters' proposals come before the modules' children of a node.
        learns: whether a planner learns from the step if no other sequence takes part.
        limits: the largest tree.
        root: the root's score.
        tokens: expected number of tokens from the step.
        seconds: expected time of the step.
        levels: for each level so far, the number of leaves that got children.
        nodes: number of nodes that are verified, once chosen.
    """

    standing: Standing
    drafts: bool
    given: TokenTree
    mixes: bool
    learns: bool
    root: float
    tokens: float
    seconds: float
    levels: list[int]

    @property
    def limits(self) -> Speculation: ...

    @property
    def nodes(self) -> int: ...

    def expand(self, scores: Sequence[float], nodes: int) -> list[int]:
        """Returns which leaves get children, given their scores.

        Args:
            nodes: number of nodes in the tree so far; if 0 the only leaf is the root.
        """
        ...

    def score(self, node: int, score: float, children: Children, depth: int) -> list[float]:
        """Returns the scores of the children at this depth that the node gets, best first.

        Args:
            score: the node's own.
        """
        ...

    def proposed(self, score: float, one: Continuation) -> float:
        """Returns the score of another drafter's child of a node with this score, if the plan `mixes`."""
        ...

    def graft(self, tree: TokenTree, scores: list[float], propose: Propose) -> None:
        """Adds other drafters' proposals to the modules' tree."""
        ...

    def choose(self, tree: TokenTree, scores: Sequence[float]) -> list[int]:
        """Returns the nodes that are verified, ascending; a node's parent is always among them."""
        ...


@dataclass(frozen=True, slots=True)
class Standing:
    """The state of one sequence before a step.

    Attributes:
        limits: the largest tree that it may draft; None if it drafts nothing.
        memory: what its planner has learned of it; None if its tree is fixed.
        context: number of committed tokens.
        pending: how many of them the MTP modules have not seen.
        left: most tokens that it may still generate.
        rows: its rows in the last pass that verified.
        planned: an earlier plan that has not been run.
        modules: whether the MTP modules may draft.
        given: what other drafters propose after the committed tokens, likeliest first.
    """

    limits: Speculation | None
    memory: SequenceMemory | None
    context: int
    pending: int
    left: int
    rows: int = 1
    planned: TreePlan | None = None
    modules: bool = True
    given: Sequence[Continuation] = ()

    @property
    def may_draft(self) -> bool:
        """Whether a draft could help: every step yields one token of the target without drafts."""
        return self.limits is not None and self.left > 1


@dataclass(frozen=True, slots=True)
class TreeBatch:
    """A batch of sequences that take a step together, each with a tree of its own.

    Attributes:
        alone: whether there is one sequence only, and none in prefill either.
    """

    sequences: Sequence[Standing]
    alone: bool


class FixedPlan:
    """A fixed tree, or none; see `TreePlan`. If there is a budget, the most probable nodes are drafted.

    Args:
        drafts: False for a plain step.
        seconds: expected time.
    """

    root, tokens, mixes, learns = 0.0, 1.0, True, False

    def __init__(self, standing: Standing, drafts: bool, seconds: float = 0.0) -> None:
        self.standing, self.seconds, self.given = standing, seconds, TokenTree()
        if drafts and standing.given:
            self.given = fixed_tree(standing.given, self.limits, standing.left - 1, standing.modules)
        self.drafts = drafts and standing.modules and not len(self.given)
        self.levels, self.nodes = list[int](), len(self.given)

    @property
    def limits(self) -> Speculation:
        """The tree."""
        assert self.standing.limits is not None
        return self.standing.limits

    def expand(self, scores: Sequence[float], nodes: int) -> list[int]:
        """Returns all leaves."""
        self.levels.append(len(scores))
        return list(range(len(scores)))

    def score(self, node: int, score: float, children: Children, depth: int) -> list[float]:
        """Returns log-probabilities of paths, which are needed only with a budget."""
        if self.limits.budget is None:
            return [score] * children.count
        return [score + logprob for logprob in children.logprobs()]

    def proposed(self, score: float, one: Continuation) -> float:
        """Returns the log-probability of a path, likewise."""
        return score if self.limits.budget is None else score + log(max(one.chances[0], LEAST_CHANCE))

    def graft(self, tree: TokenTree, scores: list[float], propose: Propose) -> None:
        """Adds nothing: the proposals are in the tree."""

    def choose(self, tree: TokenTree, scores: Sequence[float]) -> list[int]:
        """Returns all nodes."""
        self.nodes = len(tree)
        return list(range(len(tree)))


class FixedPlanner:
    """Gives every sequence the tree that its request asks for; see `base.Planner`."""

    def plan(self, batch: TreeBatch) -> list[TreePlan]:
        """Returns a plan for each sequence."""
        return [one.planned or FixedPlan(one, one.may_draft) for one in batch.sequences]

    def learn(self, plan: Sequence[TreePlan], outcome: Outcome) -> None:
        """Has nothing to learn."""
