"""Runs the forward passes that sequences request; rows of several sequences share one pass.

Work that needs passes is a generator (`Work`): it yields each pass it needs and resumes once the pass holds its
results. `Passes.together` runs the work of several sequences in lockstep, so that the code for drafting is the same for
one sequence and for many. With the technique "batched" a row's bits do not depend on the other rows of its pass; with
other techniques passes are not joined.

Legend: `M` rows, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TypeVar, cast

import torch
from torch import Tensor

from mtp_spec.model.attention import JointPlan, RowPlan, plan_rows
from mtp_spec.model.cache import LatentCache
from mtp_spec.model.host import HostModel, Technique
from mtp_spec.model.rows import row_logits, verify_rows

_NONE = torch.empty(0)
# most rows of a joint pass, and of a prefill chunk
MOST_ROWS = 256


@dataclass(slots=True, eq=False)
class MainRows:
    """Rows through the main model: a prefill chunk, or a root and its tree.

    Attributes:
        parents: the row that each one follows; -1 follows the committed context.
        scored: number of last rows that get logits.
        prompt: whether it is a prefill chunk, which is one pass even if rows are otherwise computed one by one.
        kept: number of last rows with hidden states, None for all; of the others the last layer need only be cached.
        hidden: `[kept, D]`, result.
        logits: `[scored, V]`, result.
    """

    ids: Sequence[int]
    cache: LatentCache
    parents: Sequence[int]
    scored: int
    prompt: bool
    kept: int | None = None
    hidden: Tensor = field(default=_NONE, repr=False)
    logits: Tensor = field(default=_NONE, repr=False)

    @property
    def rows(self) -> int:
        return len(self.ids)


@dataclass(slots=True, eq=False)
class ModuleRows:
    """Rows through an MTP module.

    Attributes:
        hidden: `[M, D]`, the module's input.
        prompt: whether they belong to a prefill, which may wait for more urgent passes.
        scored: number of last rows that get draft logits.
        kept: number of last rows with outputs, None for all.
        outputs: `[kept, D]`, result.
        logits: `[scored, V]`, result.
    """

    module: int
    ids: Sequence[int]
    hidden: Tensor
    cache: LatentCache
    plan: RowPlan
    prompt: bool
    scored: int = 0
    kept: int | None = None
    outputs: Tensor = field(default=_NONE, repr=False)
    logits: Tensor = field(default=_NONE, repr=False)

    @property
    def rows(self) -> int:
        return len(self.ids)


@dataclass(slots=True, eq=False)
class HeadRows:
    """Draft logits of `hidden` `[M, D]`; the result is `logits` `[M, V]`.

    `own` is the module whose own head computes them, None for the model's head.
    """

    hidden: Tensor
    own: int | None = None
    logits: Tensor = field(default=_NONE, repr=False)
    prompt: bool = False

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]


@dataclass(frozen=True, slots=True)
class Failed:
    """The error that ended work early."""

    error: Exception


Pass = MainRows | ModuleRows | HeadRows
T = TypeVar("T")
Work = Generator[Pass, None, T]


class Passes:
    """Runs passes.

    Args:
        technique: how rows are computed on this machine (`model.rows`).
        most: most rows of a joint pass.
    """

    def __init__(self, model: HostModel, technique: Technique, most: int = MOST_ROWS) -> None:
        self.model, self.technique = model, technique
        self._most = most if technique == "batched" else 0

    def together(
        self, works: Sequence[Work[T]], failing: Callable[[int, Exception], None] | None = None
    ) -> list[T | Failed]:
        """Runs work of different sequences to completion, passes of one kind together.

        Returns the result of each work, or its error.

        Args:
            failing: called with the index and error of a work that fails, before the others' next pass; an exception
                from it ends all work.
        """
        results, wanted = list[T | Failed | None]([None] * len(works)), dict[int, Pass]()

        def go_on(number: int) -> None:
            wanted.pop(number, None)
            try:
                wanted[number] = next(works[number])
            except StopIteration as end:
                results[number] = end.value
            except Exception as error:  # of this work only, for example from a logits processor
                results[number] = Failed(error)
                if failing is not None:
                    failing(number, error)

        for number in range(len(works)):
            go_on(number)
        while wanted:
            self.run(list(wanted.values()))
            for number in list(wanted):
                go_on(number)
        return cast(list[T | Failed], results)

    def alone(self, work: Work[T]) -> T:
        """Runs one sequence's work to completion and returns its result."""
        (result,) = self.together([work])
        if isinstance(result, Failed):
            raise result.error
        return result

    def run(self, passes: Sequence[Pass]) -> None:
        """Computes the passes of different sequences, those of one kind together."""
        for _, some in groupby(sorted(passes, key=_kind), key=_kind):
            for group in self._groups(list(some)):
                self._run(group)

    def _groups(self, passes: list[Pass]) -> Iterator[list[Pass]]:
        """Splits passes of one kind into groups with no more rows than a joint pass may have."""
        group, rows = list[Pass](), 0
        for one in passes:
            if group and rows + one.rows > self._most:
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
        ids = [token for one in group for token in one.ids]
        _share(group, *model.scored_rows(ids, plan, _scored(group), _kept(group)))

    def _module(self, module: int, group: list[ModuleRows]) -> None:
        ids = [token for one in group for token in one.ids]
        hidden = group[0].hidden if len(group) == 1 else torch.cat([one.hidden for one in group])
        plan = JointPlan.of(*((one.cache, one.plan) for one in group))
        _share(group, *self.model.scored_mtp_rows(module, ids, hidden, plan, _scored(group), _kept(group)))


def _scored(group: Sequence[MainRows | ModuleRows]) -> list[int]:
    """Returns which rows of a joint pass get logits."""
    return _last(group, [one.scored for one in group])


def _kept(group: Sequence[MainRows | ModuleRows]) -> list[int] | None:
    """Returns which rows of a joint pass get hidden states, None for all."""
    return None if all(one.kept is None for one in group) else _last(group, _kept_counts(group))


def _kept_counts(group: Sequence[MainRows | ModuleRows]) -> list[int]:
    return [one.rows if one.kept is None else one.kept for one in group]


def _last(group: Sequence[MainRows | ModuleRows], counts: Sequence[int]) -> list[int]:
    """Returns the indices in a joint pass of so many last rows of each."""
    found, end = list[int](), 0
    for one, count in zip(group, counts, strict=True):
        end += one.rows
        found += range(end - count, end)
    return found


def _share(group: Sequence[MainRows | ModuleRows], hidden: Tensor, logits: Tensor) -> None:
    """Splits the results of a joint pass among its passes."""
    if len(group) == 1:
        parts = [(hidden, logits)]
    else:
        kept, scored = _kept_counts(group), [one.scored for one in group]
        parts = list(zip(hidden.split(kept), logits.split(scored), strict=True))
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
