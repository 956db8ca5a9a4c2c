"""What has to be captured for a request: sequences of a kind take the same steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from mtp_spec.errors import OptionError
from mtp_spec.request import Request
from mtp_spec.speculation import Speculation
from mtp_spec.tree_shape import TreeShape

# deepest chain that "auto" drafts, and where the host draws
PLANNED_DEPTH, HOST_DEPTH = 5, 3
AUTO = Speculation(depth=PLANNED_DEPTH, adaptive=True)


@dataclass(frozen=True, slots=True)
class Kind:
    """What steps of a kind have in common.

    Attributes:
        shapes: of their trees; several take turns, plain decoding first.
        acceptance: the rule.
        host_draws: whether tokens are drawn on the host: a logits processor, a grammar or `min_new_tokens` see rows.
    """

    shapes: tuple[TreeShape, ...]
    acceptance: str = "coupled"
    host_draws: bool = False

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
        """Whether several sequences can take a step together: their randomness, or the host, is no part of it."""
        return self.acceptance == "coupled" and not self.host_draws


def kind_of(request: Request) -> Kind:
    """Returns the kind of a request's steps.

    Raises:
        OptionError: an acceptance rule whose draft distributions do not leave the GPU, where the host has to draw.
    """
    speculation, host = speculation_of(request), request.sampler.on_host
    acceptance = "coupled" if speculation is None else speculation.acceptance
    if host and acceptance != "coupled":
        raise OptionError(
            f'acceptance="{acceptance}" with logits_processor, response_format or min_new_tokens runs on the CPU only: '
            'use "coupled" on a GPU'
        )
    return Kind(_shapes(speculation), acceptance, host)


def speculation_of(request: Request) -> Speculation | None:
    """Returns what a request drafts here.

    Where the host draws between steps, nothing is gained by taking turns: the depth that pays on most texts is taken.
    """
    speculation = request.speculation
    if speculation is None or not speculation.adaptive or not request.sampler.on_host:
        return speculation
    depth = min(speculation.depth, HOST_DEPTH)
    return Speculation(depth, speculation.branching[:depth], speculation.budget, speculation.acceptance)


@lru_cache  # asked for every sequence in every round while prompts are read
def _shapes(speculation: Speculation | None) -> tuple[TreeShape, ...]:
    """Returns the shapes of steps; of adaptive speculation plain decoding, then trees of growing depth."""
    if speculation is None or not speculation.adaptive:
        return (TreeShape.of(speculation),)
    trees = [
        Speculation(depth, speculation.branching[:depth], speculation.budget, speculation.acceptance)
        for depth in range(1, min(speculation.depth, PLANNED_DEPTH) + 1)
    ]
    return tuple(TreeShape.of(tree) for tree in (None, *trees))
