"""What one sequence drafts in one step (`TreePlan`), and the simplest plan: a fixed tree.

The drafter (`cpu.draft`) asks a plan level by level which leaves get children and how each child scores, and at the end
which nodes are verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mtp_spec.planning.base import Outcome
from mtp_spec.planning.text_memory import TextMemory
from mtp_spec.speculation import Speculation
from mtp_spec.tree import TokenTree


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
        drafts: whether anything is drafted.
        limits: the largest tree.
        root: the root's score.
        tokens: expected number of tokens from the step.
        seconds: expected time of the step.
        levels: for each level so far, the number of leaves that got children.
        nodes: number of nodes that are verified, once chosen.
    """

    standing: Standing
    drafts: bool
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
    """

    limits: Speculation | None
    memory: TextMemory | None
    context: int
    pending: int
    left: int
    rows: int = 1
    planned: TreePlan | None = None

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

    root, tokens = 0.0, 1.0

    def __init__(self, standing: Standing, drafts: bool, seconds: float = 0.0) -> None:
        self.standing, self.drafts, self.seconds = standing, drafts, seconds
        self.levels, self.nodes = list[int](), 0

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
