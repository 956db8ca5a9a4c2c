"""The passes through the model that a text asks for, run alone or together with those of other texts.

A text is a generator (`Work`): it yields each pass it needs and goes on once the pass holds its results. So the same
code writes one text, or many whose rows share passes: only who runs the passes differs. A row's bits do not
depend on the rows beside it where the model's technique is "batched"; elsewhere passes are run apart.

Legend: `M` rows, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

from mtp_spec.model.attention import JointPlan, RowPlan, plan_rows
from mtp_spec.model.cache import LatentCache
from mtp_spec.model.host import HostModel, Technique
from mtp_spec.model.rows import row_logits, verify_rows
from mtp_spec.model.undisturbed import undisturbed

_NONE = torch.empty(0)


@dataclass(slots=True, eq=False)
class MainRows:
    """Rows through the main model: a chunk of a prompt, or a root and its tree.

    Attributes:
        parents: the row that each one follows; -1 follows the committed context.
        scored: so many of the last rows get logits; all or one.
        prompt: rows of a prompt are taken as one pass even where rows are otherwise computed one by one.
        hidden: `[M, D]`.  logits: `[scored, V]`; results.
    """

    ids: Sequence[int]
    cache: LatentCache
    parents: Sequence[int]
    scored: int
    prompt: bool
    hidden: Tensor = field(default=_NONE, repr=False)
    logits: Tensor = field(default=_NONE, repr=False)

    @property
    def rows(self) -> int:
        return len(self.ids)


@dataclass(slots=True, eq=False)
class ModuleRows:
    """Rows through an MTP module.

    Attributes:
        hidden: `[M, D]` what the module is given.
        prompt: whether they stand for a prompt, which may wait where others are in a hurry.
        scored: so many of the last rows get logits that propose drafts.
        outputs: `[M, D]`.  logits: `[scored, V]`; results.
    """

    module: int
    ids: Sequence[int]
    hidden: Tensor
    cache: LatentCache
    plan: RowPlan
    prompt: bool
    scored: int = 0
    outputs: Tensor = field(default=_NONE, repr=False)
    logits: Tensor = field(default=_NONE, repr=False)

    @property
    def rows(self) -> int:
        return len(self.ids)


@dataclass(slots=True, eq=False)
class HeadRows:
    """Logits that propose drafts: of `hidden` `[M, D]`, `logits` `[M, V]`, the result.

    `own` is the module whose own head gives them, None for the model's.
    """

    hidden: Tensor
    own: int | None = None
    logits: Tensor = field(default=_NONE, repr=False)
    prompt: bool = False

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]


@dataclass(slots=True, eq=False)
class Turn:
    """What a text waits for on a GPU, where steps are captured: its prompt to be read, or its next step.

    Attributes:
        prompt: whether it is the prompt.
        tokens: committed by it; result, as the others.
        path: the row of the step that drew each of them; row 0 is the root.
        failed: whether a row had no token.
        nodes: ranks of the tree's nodes.  depth: of the tree.
        logits: `[E, V]` of the text's rows, where it asked for them.
    """

    prompt: bool
    tokens: list[int] = field(default_factory=list)
    path: list[int] = field(default_factory=list)
    failed: bool = False
    nodes: Sequence[int] = ()
    depth: int = 0
    logits: Tensor | None = field(default=None, repr=False)

    @property
    def rows(self) -> int:
        return 1 + len(self.nodes)


Pass = MainRows | ModuleRows | HeadRows
T = TypeVar("T")
# None: nothing to compute, a step has ended
Work = Generator[Pass | Turn | None, None, T]


class Runner:
    """Runs passes.

    Args:
        technique: how rows are computed on this machine (`model.rows`).
        together: most rows of a joint pass; 0 runs every text's passes apart.
    """

    def __init__(self, model: HostModel, technique: Technique, together: int = 0) -> None:
        self.model, self.technique = model, technique
        self.together = together if technique == "batched" else 0

    @undisturbed()
    def finish(self, work: Work[T]) -> T:
        """Runs a text's work to its end, alone; returns what it returns."""
        while True:
            try:
                wanted = next(work)
            except StopIteration as end:
                result: T = end.value
                return result
            if wanted is not None and not isinstance(wanted, Turn):
                self._run_all([wanted])

    @undisturbed()
    def advance(self, work: Work[T]) -> bool:
        """Runs a text's work up to its next rest, alone; returns whether it has ended."""
        for wanted in work:
            if wanted is None:
                return False
            if not isinstance(wanted, Turn):
                self._run_all([wanted])
        return True

    @undisturbed()
    def run(self, passes: Sequence[Pass]) -> None:
        """Computes the results of passes of different texts, those of a kind together."""
        self._run_all(passes)

    def _run_all(self, passes: Sequence[Pass]) -> None:
        for _, some in groupby(sorted(passes, key=_kind), key=_kind):
            for group in self._groups(list(some)):
                self._run(group)

    def _groups(self, passes: list[Pass]) -> Iterator[list[Pass]]:
        """Parts the passes of a kind into joint ones of no more rows than were tested."""
        group, rows = list[Pass](), 0
        for one in passes:
            if group and rows + one.rows > self.together:
                yield group
                group, rows = [], 0
            group.append(one)
            rows += one.rows
        yield group

    def _run(self, group: list[Pass]) -> None:
        first = group[0]
        if isinstance(first, MainRows):
            self._main([one for one in group if isinstance(one, MainRows)])
        elif isinstance(first, ModuleRows):
            self._module(first.module, [one for one in group if isinstance(one, ModuleRows)])
        else:
            heads = [one for one in group if isinstance(one, HeadRows)]
            logits = self.model.draft_logits(torch.cat([one.hidden for one in heads]), heads[0].own)
            for one, own in zip(heads, logits.split([one.rows for one in heads]), strict=True):
                one.logits = own

    def _main(self, group: list[MainRows]) -> None:
        model = self.model
        if len(group) == 1 and not group[0].prompt and self.technique != "batched":
            one = group[0]
            one.hidden = verify_rows(model, one.ids, one.cache, one.parents, self.technique)
            one.logits = row_logits(model, one.hidden[-one.scored :], self.technique)
            return
        plans = [plan_rows(model.table(one.cache.capacity), one.cache.length, one.parents) for one in group]
        plan = JointPlan.of(*zip((one.cache for one in group), plans, strict=True))
        _share(group, *model.scored_rows([token for one in group for token in one.ids], plan, _scored(group)))

    def _module(self, module: int, group: list[ModuleRows]) -> None:
        ids = [token for one in group for token in one.ids]
        hidden = group[0].hidden if len(group) == 1 else torch.cat([one.hidden for one in group])
        plan = JointPlan.of(*((one.cache, one.plan) for one in group))
        _share(group, *self.model.scored_mtp_rows(module, ids, hidden, plan, _scored(group)))


def _scored(group: Sequence[MainRows | ModuleRows]) -> list[int]:
    """Returns which rows of a joint pass get logits."""
    found, end = list[int](), 0
    for one in group:
        end += one.rows
        found += range(end - one.scored, end)
    return found


def _share(group: Sequence[MainRows | ModuleRows], hidden: Tensor, logits: Tensor) -> None:
    """Gives each pass its own results."""
    if len(group) == 1:
        parts = [(hidden, logits)]
    else:
        rows, scored = [one.rows for one in group], [one.scored for one in group]
        parts = list(zip(hidden.split(rows), logits.split(scored), strict=True))
    for one, (own, own_logits) in zip(group, parts, strict=True):
        one.logits = own_logits
        if isinstance(one, MainRows):
            one.hidden = own
        else:
            one.outputs = own


def _kind(one: Pass) -> tuple[int, int]:
    if isinstance(one, HeadRows):
        return 2, -1 if one.own is None else one.own
    return (1, one.module) if isinstance(one, ModuleRows) else (0, 0)
