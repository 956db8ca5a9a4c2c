"""`Speculation`: the tree that is drafted for each verify pass, and the rule that accepts it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from mtp_spec.acceptance import RULES
from mtp_spec.option_checks import integer, invalid

MAX_DEPTH = 8
MAX_NODES = 64
DEFAULT_DEPTH = 3
ACCEPTANCE_RULES = ("coupled", *RULES)


@dataclass(frozen=True, slots=True, init=False)
class Speculation:
    """The shape of the tree that is drafted for each verify pass.

    Args:
        depth: how many tokens ahead are drafted, 1 to 8. Default: the length of ``branching``, else 3.
        branching: children of every node, depth by depth; (1, 1, 1) is a chain, (3, 2, 1) a tree of 15 nodes. Missing
            depths are 1.
        budget: at most this many nodes are drafted, the most promising first; up to 64.
        acceptance: the rule that accepts drafts. "coupled" keeps the text identical to plain decoding; "rejection",
            "hybrid", "block" (chains) and "traversal" keep its distribution; "typical" and "relaxed" change it.
        adaptive: draft deeper only if acceptance is likely; depth and branching are then upper limits.

    Raises:
        OptionError: a value of the wrong kind or outside its range, or a tree of more than 64 nodes.
    """

    depth: int
    branching: tuple[int, ...]
    budget: int | None
    acceptance: str
    adaptive: bool

    def __init__(
        self,
        depth: int | None = None,
        branching: Sequence[int] | None = None,
        budget: int | None = None,
        acceptance: str = "coupled",
        adaptive: bool = False,
    ) -> None:
        widths = () if branching is None else _branching(branching)
        if depth is None:
            depth = len(widths) or DEFAULT_DEPTH
        depth = integer("depth", depth, 1, MAX_DEPTH, f"an integer from 1 to {MAX_DEPTH}; speculation=None is off")
        if len(widths) > depth:
            raise invalid("branching", branching, f"at most one number for each of the {depth} depths; raise depth")
        if budget is not None:
            budget = integer("budget", budget, 1, MAX_NODES, f"an integer from 1 to {MAX_NODES}, or None")
        if not isinstance(adaptive, bool):
            raise invalid("adaptive", adaptive, "True or False")
        _check_acceptance(acceptance, widths, budget, adaptive)
        values = (depth, widths + (1,) * (depth - len(widths)), budget, acceptance, adaptive)
        for field, value in zip(fields(self), values, strict=True):
            object.__setattr__(self, field.name, value)
        if self.nodes > MAX_NODES:
            allowed = f"at most {MAX_NODES} nodes (this tree has {self.nodes}); give budget={MAX_NODES} or less"
            raise invalid("branching", self.branching, allowed)

    @property
    def nodes(self) -> int:
        """The largest number of nodes that one step drafts."""
        total, width = 0, 1
        for children in self.branching:
            width *= children
            total += width
        return total if self.budget is None else min(total, self.budget)

    def room(self, depth: int, drafted: int) -> int:
        """Returns how many nodes a depth may add to those drafted, keeping room for one at every deeper depth."""
        left = (self.nodes if self.budget is None else self.budget) - drafted
        return min(left, max(1, left - (self.depth - depth)))

    @property
    def is_chain(self) -> bool:
        """Whether every node has one child."""
        return max(self.branching) == 1


def resolve_speculation(value: object) -> Speculation | Literal["auto"] | None:
    """Returns what ``speculation=`` stands for: "auto", a :class:`Speculation`, or None (off).

    An integer is the depth of a chain; 0 is off.

    Raises:
        OptionError: anything else.
    """
    if value is None or isinstance(value, Speculation):
        return value
    if isinstance(value, str) and value == "auto":
        return "auto"
    allowed = f'"auto", None (off), a chain depth from 0 to {MAX_DEPTH}, or mtp_spec.Speculation(...)'
    depth = integer("speculation", value, 0, MAX_DEPTH, allowed)
    return Speculation(depth=depth) if depth else None


def _branching(value: object) -> tuple[int, ...]:
    allowed = f"1 to {MAX_DEPTH} integers from 1 to {MAX_NODES}, such as (3, 2, 1)"
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not 1 <= len(value) <= MAX_DEPTH:
        raise invalid("branching", value, allowed)
    return tuple(integer("branching entry", width, 1, MAX_NODES, allowed) for width in value)


def _check_acceptance(name: object, widths: Sequence[int], budget: int | None, adaptive: bool) -> None:
    if name not in ACCEPTANCE_RULES:
        raise invalid("acceptance", name, "one of " + ", ".join(f'"{rule}"' for rule in ACCEPTANCE_RULES))
    rule = RULES.get(str(name))
    if rule is None:
        return
    if rule.chains_only and max(widths, default=1) > 1:
        raise invalid("branching", tuple(widths), f'1 at every depth: "{name}" judges chains, "traversal" trees')
    if rule.samples and (budget is not None or adaptive):
        option, value, only = ("adaptive", adaptive, False) if budget is None else ("budget", budget, None)
        raise invalid(option, value, f'{only} with acceptance="{name}", which allows no pruning by what was drawn')
