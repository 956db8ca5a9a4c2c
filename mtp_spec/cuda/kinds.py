"""The kind of a request determines which steps are captured: sequences of one kind take the same steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from mtp_spec.option_checks import invalid
from mtp_spec.request import Request
from mtp_spec.speculation import LONGEST_CHAIN, Speculation
from mtp_spec.tree import MODULES
from mtp_spec.tree_shape import TreeShape

# the deepest chain that "auto" drafts
PLANNED_DEPTH = 5
AUTO = Speculation(depth=PLANNED_DEPTH, adaptive=True)
# depths of the chains of other drafters among which a planner chooses; with 15 in place of 8 drafts from the text alone
# brought 1.31 times plain decoding in place of 1.55 (edits, one H200, bundled model)
CHAINS = (8, LONGEST_CHAIN)
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
        scripted: of how many shapes, the last ones, the drafts are other drafters' (`script`); plain decoding is first
            then.
        eager: whether every step drafts: such a shape is taken if there are such drafts, unless the modules' fixed tree
            promises more.
    """

    shapes: tuple[TreeShape, ...]
    acceptance: str = "coupled"
    guided: Guided | None = None
    watched: bool = False
    replay: bool = False
    modules: bool = False
    scripted: int = 0
    eager: bool = False

    @property
    def own(self) -> tuple[TreeShape, ...]:
        """The shapes without drafts of other drafters."""
        return self.shapes[: len(self.shapes) - self.scripted]

    def extend(self, rows: int) -> int:
        """Returns the most tokens that a step may leave for the modules; 0 if they do not draft. Steps that may commit
        more show them all but one.

        Args:
            rows: chains of other drafters leave no more than so many.
        """
        depths = [*(shape.depth for shape in self.own), *(depth for depth in self.chains if depth < rows)]
        return max(depths) + 1 if self.modules else 0

    @property
    def chains(self) -> tuple[int, ...]:
        """The depths of the shapes whose drafts are other drafters'."""
        return tuple(shape.depth for shape in self.shapes[len(self.shapes) - self.scripted :])

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
    others, modules = bool(request.drafters) and not watched, request.modules
    eager = others and speculation is not None and not speculation.adaptive
    shapes, scripted = _shapes(speculation, modules, others)
    return Kind(shapes, rule, guided, watched, replay, modules, scripted, eager)


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
def _shapes(speculation: Speculation | None, modules: bool, others: bool) -> tuple[tuple[TreeShape, ...], int]:
    """Returns the shapes of steps: the fixed tree; if there are several plain decoding, then the modules' trees, of
    growing depth for adaptive speculation, then the chains of other drafters; and how many these are."""
    if speculation is None or not (modules or others):
        return (TreeShape(),), 0
    chains = [TreeShape.chain(depth) for depth in (CHAINS if speculation.adaptive else (speculation.depth,)) if others]
    trees = [speculation] if modules and not speculation.adaptive else []
    if modules and speculation.adaptive:
        trees = [Speculation(depth, speculation.branching[:depth], speculation.budget, speculation.acceptance)
                 for depth in range(1, speculation.depth + 1)]  # fmt: skip
    shapes = [*map(TreeShape.of, trees), *chains]
    several = speculation.adaptive or chains
    return ((TreeShape(), *shapes) if several else tuple(shapes)), len(chains)
