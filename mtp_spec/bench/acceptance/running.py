"""The loop: groups of cells, their questions, the turns of each, and every way to generate in turn."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from mtp_spec.acceptance import RULES
from mtp_spec.api import LM
from mtp_spec.bench.acceptance.cells import PEERS, AutoBy, Cell, Group, Way
from mtp_spec.bench.acceptance.contexts import Message, prompt_ids
from mtp_spec.bench.acceptance.journal import Journal, Text
from mtp_spec.bench.acceptance.questions import Question
from mtp_spec.bench.bound import FirstDepth
from mtp_spec.bench.peer import MTP, counted_steps, transformers_ways
from mtp_spec.bench.turns import Generate, check_kept, prefills, settled, warm_tokens
from mtp_spec.errors import OptionError
from mtp_spec.progress import Report
from mtp_spec.speculation import TEXT, Speculation
from mtp_spec.stats import GenerationStats

Load = Callable[[int | str | None], LM]


@dataclass(slots=True)
class Runner:
    """Generates what the journal does not hold yet.

    Args:
        load: returns the model that drafts from a vocabulary.

    Attributes:
        absent: the reasons why ways of transformers do not run.
        too_long: turns that are left out, with their lengths.
    """

    load: Load
    questions: list[Question]
    journal: Journal
    args: argparse.Namespace
    absent: dict[str, str] = field(default_factory=dict)
    too_long: dict[str, int] = field(default_factory=dict)
    _peers: dict[str, Generate] = field(default_factory=dict)
    _warm: set[tuple[str, frozenset[int]]] = field(default_factory=set)

    def run(self, groups: list[Group], report: Report | None) -> None:
        """Generates the texts of all groups, in order; `report` is told how many there are, of how many."""
        turns = sum(len(question.turns) for question in self.questions)
        total = turns * sum(len(group.ways) for group in groups)
        with self._transformers(groups):
            for group in groups:
                for first in range(0, len(self.questions), group.batch):
                    self._questions(group, range(first, min(first + group.batch, len(self.questions))))
                    if report is not None:
                        report(len(self.journal.texts), total)

    @contextmanager
    def _transformers(self, groups: list[Group]) -> Iterator[None]:
        if not self.args.transformers:
            yield
            return
        with TemporaryDirectory() as folder:
            self._peers, self.absent = transformers_ways(self.load(groups[0].vocabulary), Path(folder), self.args)
            yield

    def _questions(self, group: Group, numbers: Sequence[int]) -> None:
        """Generates the texts of questions, turn by turn, each turn as a batch."""
        ways = {cell: shape for cell, shape in group.ways.items() if cell.draft not in self.absent}
        cells, turns = list(ways), {number: self.questions[number].turns for number in numbers}
        keys = ((cell.name, number, turn) for cell in cells for number in numbers for turn in range(len(turns[number])))
        if all(key in self.journal.texts for key in keys):
            return
        lm, talks = self.load(group.vocabulary), {number: list(self.questions[number].before) for number in numbers}
        for turn in range(max(map(len, turns.values()))):
            talks = {
                number: [*talk, {"role": "user", "content": turns[number][turn]}]
                for number, talk in talks.items()
                if turn < len(turns[number])
            }
            prompts = self._prompts(lm, group, talks, turn)
            if not prompts:
                return
            first = (numbers[0] // group.batch + turn) % len(cells)
            # another way goes first each time, so that none always finds warm caches
            for cell in cells[first:] + cells[:first]:
                if any((cell.name, number, turn) not in self.journal.texts for number in prompts):
                    self._warm_up(lm, group, cell, prompts)
                    tokens = [self.args.max_new_tokens] * len(prompts)
                    for text in self._texts(lm, group, cell, prompts, turn, tokens):
                        self.journal.add(text)
            # every way continues plain decoding's conversation: the next prompt is the same for all
            for number in prompts:
                answer = self.journal.texts[cells[0].name, number, turn].ids
                talks[number].append({"role": "assistant", "content": lm.decode(answer) if lm.tokenizer else ""})

    def _prompts(self, lm: LM, group: Group, talks: dict[int, list[Message]], turn: int) -> dict[int, list[int]]:
        """Returns the ids of conversations; those that are too long are counted and end here."""
        found, room = dict[int, list[int]](), lm.max_context - self.args.max_new_tokens
        for number in list(talks):
            ids = prompt_ids(lm, talks[number], group.context, self.args.raw, number)
            if len(ids) > room:
                self.too_long[f"question {number}, turn {turn}, context {group.context}"] = len(ids)
                del talks[number]
            else:
                found[number] = ids
        return found

    def _warm_up(self, lm: LM, group: Group, cell: Cell, prompts: dict[int, list[int]]) -> None:
        """Compilation, capture and measuring are no part of a text's time."""
        # a length that takes other passes has them captured
        new = {number: ids for number, ids in prompts.items() if (cell.name, prefills(lm, ids)) not in self._warm}
        if new:
            self._texts(lm, group, cell, new, 0, warm_tokens(lm, len(new)))
            self._warm |= {(cell.name, prefills(lm, ids)) for ids in new.values()}

    def _texts(
        self, lm: LM, group: Group, cell: Cell, prompts: dict[int, list[int]], turn: int, tokens: Sequence[int]
    ) -> list[Text]:
        """Returns the texts after prompts by their question, each of at most its number of tokens."""
        ways = {number: _way(lm, group.ways[cell], self.questions[number]) for number in prompts}
        options: dict[int, dict[str, Any]] = {
            number: {"temperature": group.temperature, "seed": self.questions[number].seed, "max_new_tokens": most}
            for number, most in zip(prompts, tokens, strict=True)
        }
        if group.batch == 1:
            return [
                self._text(lm, cell, ways[number], ids, options[number], number, turn)
                for number, ids in prompts.items()
            ]
        lm.close()  # so that no batch finds an earlier batch's prompts in the cache
        start = settled(lm)
        try:
            handles = [lm.submit(ids, speculation=ways[number], **options[number]) for number, ids in prompts.items()]
            texts = [handle.result() for handle in handles]
        except BaseException:
            lm.close()  # cancels the others
            raise
        share, together = (perf_counter() - start) / len(texts), tuple(prompts)
        return [
            Text(cell.name, number, turn, text.token_ids, share, [], text.stats, together=together)
            for number, text in zip(prompts, texts, strict=True)
        ]

    def _text(
        self, lm: LM, cell: Cell, shape: Any, ids: list[int], options: dict[str, Any], number: int, turn: int
    ) -> Text:
        if cell.draft in PEERS:
            out, seconds, stats = _peer_text(self._peers[cell.draft], cell.draft, ids, options)
            return Text(cell.name, number, turn, out, seconds, [], stats)
        start, first = settled(lm), None
        if self.args.bound and has_bound(cell):
            assert isinstance(shape, Speculation)
            first = FirstDepth(cell.rule, shape.branching[0])
        stream = lm.stream(ids, speculation=shape, observer=first, **options)
        if first is not None:
            first.sampler = stream.sequence.sampler
        marks = {0: 0.0}
        for event in stream:
            # as many steps as there were: tokens may be held back until a character is whole
            marks[event.step + 1] = stream.result.stats.total_seconds
        seconds, steps = perf_counter() - start, sorted(marks)
        step_ms = [round(1000 * (marks[step] - marks[before]) / (step - before), 3) for before, step in pairwise(steps)]
        sums = None if first is None else {name: getattr(first, name) for name in FIRST_DEPTH}
        return Text(cell.name, number, turn, stream.result.token_ids, seconds, step_ms, stream.result.stats, sums)


def _way(lm: LM, way: Way, question: Question) -> Any:
    """Returns what `speculation=` is for a question."""
    if isinstance(way, AutoBy):
        way = lm.backend.auto.drafted_by(way.drafters)
    if not question.references or way is None:
        return way
    shape = lm.backend.auto if way == "auto" else way
    drafters = shape.chosen(lm.backend.mixes).drafters or ()
    return shape.drafted_by(drafters, question.references) if TEXT in drafters else way


FIRST_DEPTH = ("nodes", "accepted", "bound", "redrawn")


def has_bound(cell: Cell) -> bool:
    """Whether a rule is lossless and its first depth's drafts are a fixed number."""
    lossless = cell.rule not in RULES or RULES[cell.rule].lossless
    return lossless and cell.draft.startswith(("chain", "tree"))


def check_model(lm: LM, groups: list[Group], args: argparse.Namespace) -> None:
    """Rejects what this model cannot run: contexts without room for the text, bounds or too many ways on a GPU, and
    several processes."""
    for context in (group.context for group in groups):
        if context is not None and context + args.max_new_tokens > lm.max_context:
            raise OptionError(
                f"--contexts {context} and --max-new-tokens {args.max_new_tokens} are more than the "
                f"model's {lm.max_context}"
            )
    if lm.model.ranks.size > 1:
        raise OptionError("bench acceptance keeps one journal, of one process: start it without torchrun")
    if args.bound and lm.backend.captured:
        raise OptionError(
            "--bound looks at every step, and watched steps on a GPU are not captured, so their times say nothing: "
            "--device cpu"
        )
    for group in groups:
        check_kept(lm, len(group.ways), group.batch)


def _peer_text(
    generate: Generate, name: str, ids: list[int], options: dict[str, Any]
) -> tuple[list[int], float, GenerationStats]:
    """Returns a text of transformers, with what it reports of its steps."""
    stats = GenerationStats()
    if name != MTP:
        out, seconds, _ = generate(ids, options)
        stats.record_prefill(len(ids))
        for _ in out[1:]:
            stats.record_step(0, 0, (), 1)
    else:
        with counted_steps() as steps:
            out, seconds, _ = generate(ids, options)
        stats.record_prefill(len(ids))
        for drafted, accepted in steps[1:]:
            # the last step's tokens may go past the end
            left = max(1, len(out) - stats.new_tokens)
            stats.record_step(drafted, drafted, [0] * accepted, min(accepted + 1, left))
    stats.total_seconds = seconds
    return out, seconds, stats
