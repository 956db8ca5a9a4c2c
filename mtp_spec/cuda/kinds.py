"""The kind of a request determines which steps are captured: sequences of one kind take the same steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from mtp_spec.option_checks import invalid
from mtp_spec.request import Request
from mtp_spec.speculation import MAX_DEPTH, Speculation
from mtp_spec.tree import MODULES
from mtp_spec.tree_shape import TreeShape

# the deepest chain that "auto" drafts
PLANNED_DEPTH = 5
AUTO = Speculation(depth=PLANNED_DEPTH, adaptive=True)
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
        modules: whether the MTP modules draft.
        scripted: whether the drafts of the last shape are other drafters' (`script`); plain decoding is first then.
        eager: whether every step drafts: that shape is taken if there are such drafts, unless the modules' fixed tree
            promises more.
    """

    shapes: tuple[TreeShape, ...]
    acceptance: str = "coupled"
    guided: Guided | None = None
    watched: bool = False
    replay: bool = False
    modules: bool = False
    scripted: bool = False
    eager: bool = False

    @property
    def extend(self) -> int:
        """Most tokens that a step may commit and the MTP modules then have to process; 0 if they do not draft."""
        return max(shape.depth for shape in self.shapes) + 1 if self.modules else 0

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
    # an observer wants rows that drafts come from
    scripted, modules = bool(request.drafters) and not watched, request.modules
    eager = scripted and speculation is not None and not speculation.adaptive
    return Kind(_shapes(speculation, modules, scripted), rule, guided, watched, replay, modules, scripted, eager)


def check_mixed(speculation: Speculation) -> None:
    """Rejects drafters that cannot take part in captured steps.

    Raises:
        OptionError: it names what is allowed.
    """
    if not speculation.others:
        return
    if speculation.acceptance != "coupled":
        allowed = f'("{MODULES}",) with acceptance="{speculation.acceptance}" on a GPU; others need "coupled", or a CPU'
        raise invalid("drafters", speculation.drafters, allowed)
    if not speculation.modules and not speculation.is_chain:
        raise invalid("branching", speculation.branching, "a chain on a GPU, if the MTP modules do not draft")


@lru_cache  # called for every sequence in every round of its prefill
def _shapes(speculation: Speculation | None, modules: bool, scripted: bool) -> tuple[TreeShape, ...]:
    """Returns the shapes of steps: the fixed tree; if there are several plain decoding, then the modules' trees, of
    growing depth for adaptive speculation, then the chain of other drafters."""
    if speculation is None or not (modules or scripted):
        return (TreeShape(),)
    if not modules:
        chain = Speculation(depth=MAX_DEPTH if speculation.adaptive else speculation.depth)
        return (TreeShape(), TreeShape.of(chain))
    if not speculation.adaptive:
        fixed = TreeShape.of(speculation)
        return (TreeShape(), fixed, TreeShape.of(Speculation(speculation.depth))) if scripted else (fixed,)
    trees = [
        Speculation(depth, speculation.branching[:depth], speculation.budget, speculation.acceptance)
        for depth in range(1, speculation.depth + 1)
    ]
    if scripted:
        trees.append(Speculation(depth=MAX_DEPTH))
    return tuple(TreeShape.of(tree) for tree in (None, *trees))
