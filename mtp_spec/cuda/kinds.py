"""The kind of a request determines which steps are captured: sequences of one kind take the same steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from mtp_spec.request import Request
from mtp_spec.speculation import Speculation
from mtp_spec.tree import MODULES
from mtp_spec.tree_shape import TreeShape

# the deepest chain that "auto" drafts
PLANNED_DEPTH = 5
AUTO = Speculation(depth=PLANNED_DEPTH, adaptive=True, drafters=(MODULES,))
Guided = Literal["masks", "rows"]


@dataclass(frozen=True, slots=True)
class Kind:
    """Properties common to all steps of a kind.

    Attributes:
        shapes: the tree shapes; if there are several, plain decoding is first and a planner chooses for each step.
        acceptance: the rule.
        guided: what the host sends between verify and accept (`guided`): masks of the allowed tokens, for a grammar or
            `min_new_tokens`, or rows that a logits processor has changed; None for nothing.
        watched: whether an observer sees drafts and rows, so that steps are not captured.
        replay: whether drafts are replaced by those of a `drafting.Replay`.
    """

    shapes: tuple[TreeShape, ...]
    acceptance: str = "coupled"
    guided: Guided | None = None
    watched: bool = False
    replay: bool = False

    @property
    def depth(self) -> int:
        """Depth of the deepest tree."""
        return max(shape.depth for shape in self.shapes)

    @property
    def extend(self) -> int:
        """Most tokens that a step may commit and the MTP modules then have to process; 0 without drafts."""
        return self.depth + 1 if self.depth else 0

    @property
    def takes_turns(self) -> bool:
        """Whether the shape may change from step to step."""
        return len(self.shapes) > 1

    @property
    def shared(self) -> bool:
        """Whether several sequences can share a step: it holds neither a rule's random numbers nor an observer."""
        return self.acceptance == "coupled" and not self.watched


def kind_of(request: Request, watched: bool = False) -> Kind:
    """Returns the kind of a request's steps.

    Args:
        watched: see `Kind`.
    """
    speculation, sampler = request.speculation, request.sampler
    guided: Guided | None = None
    if sampler.guides:
        guided = "masks" if sampler.masks else "rows"
    rule = "coupled" if speculation is None else speculation.acceptance
    replay = speculation is not None and speculation.replay is not None
    return Kind(_shapes(speculation), rule, guided, watched, replay)


@lru_cache  # called for every sequence in every round of its prefill
def _shapes(speculation: Speculation | None) -> tuple[TreeShape, ...]:
    """Returns the shapes of steps; for adaptive speculation plain decoding, then trees of growing depth."""
    if speculation is None or not speculation.adaptive:
        return (TreeShape.of(speculation),)
    trees = [
        Speculation(depth, speculation.branching[:depth], speculation.budget, speculation.acceptance)
        for depth in range(1, speculation.depth + 1)
    ]
    return tuple(TreeShape.of(tree) for tree in (None, *trees))
