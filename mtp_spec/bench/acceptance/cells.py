"""The grid: every combination of the listed options is a cell, in a fixed order.

Cells that share temperature, context, batch and draft vocabulary form a group: their texts are generated in turn,
prompt by prompt, together with those of plain decoding, the baseline of speed-ups. To add an axis, add a field of
`Cell`, an option, and a loop in `sweep`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Final, Literal

from mtp_spec.bench.acceptance.questions import EDITS
from mtp_spec.bench.peer import MTP
from mtp_spec.bench.peer import PLAIN as PEER_PLAIN
from mtp_spec.drafting import Text
from mtp_spec.errors import OptionError
from mtp_spec.speculation import DRAFTERS, Speculation
from mtp_spec.tree import MODULES

PLAIN = "plain"
AUTO: Final = "auto"
Drafters = tuple[str, ...]
COUPLED = "coupled"
# of edits only greedy texts repeat their documents
TEMPERATURES, EDIT_TEMPERATURES = (0.0, 0.8), (0.0,)
EDIT_DRAFTERS = ((MODULES,), (Text.name,), DRAFTERS)
DEPTHS = (1, 2, 3, 4, 5)
TREES = ((2, 1, 1), (3, 2, 1), (2, 2, 2, 1))
# default shapes for comparing rules
RULE_DEPTHS, RULE_TREES = (1, 3), ((2,), (2, 2, 1))
# ways that run in another library
PEERS = (PEER_PLAIN, MTP)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One line of the result.

    Attributes:
        draft: "plain", "chain 3", "tree 3,2,1", "auto", these with drafters, or a way of transformers.
        rule: the acceptance rule.
        context: tokens that prompts are cut or padded to; None leaves them unchanged.
        batch: batch size.
        vocabulary: tokens that may be drafted, or the file that lists them; None is all.
    """

    temperature: float
    draft: str
    rule: str = COUPLED
    context: int | None = None
    batch: int = 1
    vocabulary: int | str | None = None

    @property
    def name(self) -> str:
        """The unique name of the cell."""
        parts = [self.draft] + ([self.rule] if self.rule != COUPLED else [])
        parts += [f"context {self.context}"] if self.context is not None else []
        parts += [f"batch {self.batch}"] if self.batch > 1 else []
        parts += [f"vocabulary {self.vocabulary}"] if self.vocabulary is not None else []
        return f"{', '.join(parts)} at {self.temperature}"


@dataclass(frozen=True, slots=True)
class AutoBy:
    """The largest tree of "auto", with these drafters."""

    drafters: Drafters


Way = Speculation | AutoBy | Literal["auto"] | None


@dataclass(slots=True)
class Group:
    """Cells whose texts are generated in turn; the first is plain decoding.

    Attributes:
        ways: cell -> its `speculation=`; None also for ways of another library.
    """

    temperature: float
    context: int | None
    vocabulary: int | str | None
    batch: int = 1
    ways: dict[Cell, Way] = field(default_factory=dict)

    def add(self, draft: str, speculation: Way, rule: str = COUPLED) -> None:
        cell = Cell(
            temperature=self.temperature,
            draft=draft,
            rule=rule,
            context=self.context,
            batch=self.batch,
            vocabulary=self.vocabulary,
        )
        self.ways[cell] = speculation


def sweep(args: argparse.Namespace) -> tuple[list[Group], dict[str, str]]:
    """Returns the groups, and the reasons for omitted combinations: cell -> reason.

    Raises:
        OptionError: no combination is possible.
    """
    groups, left_out = [], dict[str, str]()
    temperatures = args.temperatures or (EDIT_TEMPERATURES if args.suite == EDITS else TEMPERATURES)
    axes = (args.draft_vocabulary, temperatures, args.contexts, sorted(set(args.batch)))
    for vocabulary, temperature, context, batch in product(*axes):
        group = Group(temperature, context, vocabulary, batch)
        group.add(PLAIN, None)
        every = product(args.rules or [COUPLED], _shapes(args).items(), _drafters(args))
        for rule, (draft, shape), drafters in every:
            name = draft if drafters is None else f"{draft} {'+'.join(drafters)}"
            if draft == AUTO:
                if rule == COUPLED:
                    group.add(name, AUTO if drafters is None else AutoBy(drafters))
                else:
                    left_out[f"{name}, {rule}"] = "auto plans for the coupled rule"
                continue
            try:
                group.add(name, Speculation(**shape, acceptance=rule, drafters=drafters), rule)
            except OptionError as error:
                left_out[f"{name}, {rule}"] = str(error)
        if len(group.ways) == 1:
            raise OptionError("nothing to measure: " + "; ".join(left_out.values()))
        if args.transformers and temperature == 0 and batch == 1:
            for name in PEERS:
                group.add(name, None)
        groups.append(group)
    if args.transformers and not (0 in temperatures and 1 in args.batch):
        raise OptionError("--transformers compares single greedy texts: it needs 0 among --temperatures, 1 in --batch")
    if args.bound and max(args.batch) > 1:
        raise OptionError("--bound watches one text at a time: leave --batch out")
    return groups, left_out


def _shapes(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Returns what is drafted: the options of `Speculation` by name, chains first; "auto" last."""
    depths, trees, auto = args.depths, args.trees, args.auto
    if depths is trees is None and args.suite == EDITS:
        auto = True
    if depths is trees is None and not auto:
        depths, trees, auto = (RULE_DEPTHS, RULE_TREES, False) if args.rules else (DEPTHS, TREES, True)
    shapes: dict[str, dict[str, Any]] = {f"chain {depth}": {"depth": depth} for depth in depths or ()}
    shapes |= {f"tree {','.join(map(str, tree))}": {"branching": tree} for tree in trees or ()}
    return {**shapes, **({AUTO: {}} if auto else {})}


def _drafters(args: argparse.Namespace) -> Sequence[Drafters | None]:
    """Returns who drafts; None is the default."""
    if args.drafters is not None:
        found: Sequence[Drafters] = args.drafters
        return found
    return EDIT_DRAFTERS if args.suite == EDITS else (None,)
