"""What one sequence drafts in one step (`TreePlan`), and the plan that is settled beforehand: a fixed tree.

The drafter (`cpu.draft`) follows a plan level by level: which leaves get children, what each child scores, and in the
end which nodes are verified.
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
    """The best children that a node could get. What takes time to know is worked out when asked for.

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
        standing: the sequence's, when it was planned.
        drafts: whether anything is drafted.
        limits: the largest tree.
        root: the root's score.
        tokens, seconds: expected of the step.
        levels: leaves of each level that got children so far.
        nodes: that are verified, once chosen.
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
        """Returns which of the leaves that have these scores get children.

        Args:
            nodes: of the tree so far; without any the only leaf is the root.
        """
        ...

    def score(self, node: int, score: float, children: Children, depth: int) -> list[float]:
        """Returns the scores of a node's children at this depth, best first; further children are left out.

        Args:
            score: the node's own.
        """
        ...

    def choose(self, tree: TokenTree, scores: Sequence[float]) -> list[int]:
        """Returns the nodes that are verified, ascending, each with its parent."""
        ...


@dataclass(frozen=True, slots=True)
class Standing:
    """One sequence before a step.

    Attributes:
        limits: the largest tree that it may draft; None where it drafts nothing.
        memory: what its text has taught; None where its tree is fixed.
        context: its committed tokens.
        pending: those of them that the MTP modules have not seen.
        left: tokens that it may still get.
        rows: of it in the last pass that verified.
        planned: what was planned for it before and has not been run.
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
        """Whether a draft could be of use: the target adds a token of its own."""
        return self.limits is not None and self.left > 1


@dataclass(frozen=True, slots=True)
class TreeBatch:
    """The sequences that take a step together, each with a tree of its own.

    Attributes:
        alone: whether there are no others at all, such as those whose prompts are read meanwhile.
    """

    sequences: Sequence[Standing]
    alone: bool


class FixedPlan:
    """A fixed tree, or none; see `TreePlan`. The most probable nodes are drafted where the budget is short.

    Args:
        drafts: False for a plain step.
        seconds: expected of it.
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
        """Returns log-probabilities of paths, which only a budget needs."""
        if self.limits.budget is None:
            return [score] * children.count
        return [score + logprob for logprob in children.logprobs()]

    def choose(self, tree: TokenTree, scores: Sequence[float]) -> list[int]:
        """Returns all nodes."""
        self.nodes = len(tree)
        return list(range(len(tree)))


class FixedPlanner:
    """Gives every sequence the tree that was asked for; see `base.Planner`."""

    def plan(self, batch: TreeBatch) -> list[TreePlan]:
        """Returns a plan for each sequence."""
        return [one.planned or FixedPlan(one, one.may_draft) for one in batch.sequences]

    def learn(self, plan: Sequence[TreePlan], outcome: Outcome) -> None:
        """Has nothing to learn."""
