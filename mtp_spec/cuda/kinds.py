"""What has to be captured for a request: sequences of a kind take the same steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from mtp_spec.request import Request
from mtp_spec.speculation import Speculation
from mtp_spec.tree_shape import TreeShape

# what "auto" drafts at most
PLANNED_DEPTH = 5
AUTO = Speculation(depth=PLANNED_DEPTH, adaptive=True)
Guided = Literal["masks", "rows"]


@dataclass(frozen=True, slots=True)
class Kind:
    """What steps of a kind have in common.

    Attributes:
        shapes: of their trees; several take turns, plain decoding first.
        acceptance: the rule.
        guided: what the host sends between verify and accept (`guided`): which tokens may follow, for a grammar or
            `min_new_tokens`, or rows that a logits processor has changed; None: nothing.
        watched: somebody looks at drafts and rows, so that steps run as they stand and are not captured.
    """

    shapes: tuple[TreeShape, ...]
    acceptance: str = "coupled"
    guided: Guided | None = None
    watched: bool = False

    @property
    def depth(self) -> int:
        """Of the deepest tree."""
        return max(shape.depth for shape in self.shapes)

    @property
    def extend(self) -> int:
        """Tokens that a step may commit, which the MTP modules have then to be shown; 0 without drafts."""
        return self.depth + 1 if self.depth else 0

    @property
    def takes_turns(self) -> bool:
        """Whether the shape may change from step to step."""
        return len(self.shapes) > 1

    @property
    def shared(self) -> bool:
        """Whether several sequences can take a step together: neither randomness nor an observer is part of it."""
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
    return Kind(_shapes(speculation), "coupled" if speculation is None else speculation.acceptance, guided, watched)


@lru_cache  # asked for every sequence in every round while prompts are read
def _shapes(speculation: Speculation | None) -> tuple[TreeShape, ...]:
    """Returns the shapes of steps; of adaptive speculation plain decoding, then trees of growing depth."""
    if speculation is None or not speculation.adaptive:
        return (TreeShape.of(speculation),)
    trees = [
        Speculation(depth, speculation.branching[:depth], speculation.budget, speculation.acceptance)
        for depth in range(1, speculation.depth + 1)
    ]
    return tuple(TreeShape.of(tree) for tree in (None, *trees))
