"""Texts on a GPU that take their steps together.

Every text has a slot of one state, the first ones are taken. A step is captured for the first so many slots (1, 2, 4,
...): where fewer texts are left, the others stay where they are, on rows that nobody reads. Which pages of the caches a
slot has stands on the device, so texts come, go and change their slots without anything being captured again.

All take a step of one shape. Where it may change from step to step ("auto"), a `Ladder` for every number of texts says
what steps cost, and one `TextLadder` chooses by what all of them have accepted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import torch
from torch import Tensor

from mtp_spec.cuda.constants import Shape
from mtp_spec.cuda.engine import DeviceRuntime, SharedDecoder
from mtp_spec.cuda.pages import STEP_ROWS, STEP_TEXTS, DevicePages, planned_pages
from mtp_spec.cuda.planned import CATCH_UP_ROWS, Rungs, ladder_of, planned_shapes
from mtp_spec.cuda.prefill import Reader
from mtp_spec.cuda.state import MOST, WAITING, Mail, State, union
from mtp_spec.cuda.step import Step
from mtp_spec.kernels import commit as commits
from mtp_spec.kernels.sampler import Stages
from mtp_spec.memory import check_room, group_bytes, pages_bytes
from mtp_spec.planning.shape_planner import MODEL_MEMORY, PLAIN, Chances, Ladder, TextLadder
from mtp_spec.request import Request
from mtp_spec.speculation import Speculation

# groups that are kept, with the steps that were captured for them
GROUPS = 8


@dataclass(slots=True)
class Part:
    """The captured work of some slots that step together.

    Attributes:
        first: the first slot.
        steps: one for every shape.  rungs: with what lies between them, where shapes take turns.
    """

    first: int
    state: State
    steps: list[Step]
    rungs: Rungs | None


@dataclass(slots=True)
class Launched:
    """A step on its way.

    Attributes:
        texts: those that take it, by slot.  rung: which shape.  ladder: that the shape was chosen from.
        logits: of the texts that asked for them, `[E, V]` each, by slot.
    """

    texts: list[SharedDecoder]
    rung: int
    record: Tensor
    logits: dict[int, Tensor]
    ladder: Ladder | None
    begun: torch.cuda.Event | None
    ended: torch.cuda.Event | None


class Group:
    """Texts whose steps have the same shape, or the same shapes that take turns.

    Args:
        most: slots.
    """

    def __init__(self, runtime: DeviceRuntime, pages: DevicePages, shapes: tuple[Shape, ...], most: int) -> None:
        self.runtime, self.pages, self.most = runtime, pages, most
        self.shapes, self.planned, deepest = shapes, len(shapes) > 1, max(shape.depth for shape in shapes)
        self.drafts, self.extend = deepest > 0, deepest + 1 if deepest else 0
        model, device = runtime.model, runtime.model.device
        if device.type == "cuda":
            check_room(group_bytes(model, most), device, f"A batch of {most} texts")
        self.state = State(model, runtime.max_context, pages.caches, pages.one(pages.idle_row).repeat(most, 1))
        self.state.live = torch.zeros(most, dtype=torch.int32, device=device)
        self.state.logits = torch.empty(STEP_ROWS, model.config.vocab_size, dtype=torch.float32, device=device)
        self.state.blank()
        self._inbox = torch.zeros(2, most, dtype=torch.int64, device=device)
        self._mail = Mail(2 * most, device)
        self._slots: list[SharedDecoder | None] = []
        self._launched: deque[Launched] = deque()
        self._hosts = [torch.empty(most, commits.record_size(MOST), dtype=torch.int32,
                                   pin_memory=device.type == "cuda") for _ in range(2)]  # fmt: skip
        self._chances = Chances(MODEL_MEMORY)
        self._planner: TextLadder | None = None
        self._stages = Stages(noise=False)
        self.untold = list[tuple[Ladder, int, float]]()  # steps' seconds, of which the first rank's will count
        self._changed = self._disturbed = self._unseen = False
        self._ended: torch.cuda.Event | None = None

    @property
    def texts(self) -> list[SharedDecoder]:
        """Those that take its steps."""
        return [text for text in self._slots if text is not None]

    def join(self, texts: Sequence[SharedDecoder], state: State) -> None:
        """Gives texts, whose prompts were read, slots; `state` holds them."""
        if None not in self._slots:
            self.state.part(len(self._slots), len(texts)).take(state)
            self._slots += texts
        else:
            for number, text in enumerate(texts):
                place = self._slots.index(None) if None in self._slots else len(self._slots)
                self._slots[place : place + 1] = [text]
                self.state.part(place, 1).take(state.part(number, 1))
        self._changed = True

    def leave(self, text: SharedDecoder) -> None:
        """Takes a text out, if it is there."""
        if text in self._slots:
            self._slots[self._slots.index(text)] = None
            self._changed = True

    def clear(self) -> None:
        """Takes all texts out, and waits for what is on its way."""
        self._slots, self._changed, self._planner = [], True, None
        while self._launched:
            self.runtime.model.ranks.wait(self._launched.popleft().ended)

    def launch(self, alone: bool) -> None:
        """Starts the next step of all texts.

        Args:
            alone: whether the GPU does nothing else meanwhile, so that from step to step is what a step takes.
        """
        if self._changed:
            self._settle_down()
        texts = self.texts
        parts = self._parts(len(texts))
        rung = self._choose(parts) if self.planned else PLAIN
        if self.planned:
            self._turn([part.rungs for part in parts if part.rungs is not None], rung, texts)
        begun = self._mark() if self._disturbed or not alone or self._ended is None else self._ended
        self._disturbed = False
        logits = dict[int, Tensor]()
        for part in parts:
            part.steps[rung]()
            logits |= self._logits(part, rung)
        host = self._hosts[0]
        self._hosts.reverse()
        host.copy_(self.state.record, non_blocking=True)
        self._ended = self._mark()
        ladder = None if self._planner is None else self._planner.ladder
        self._launched.append(Launched(texts, rung, host, logits, ladder, begun, self._ended))

    def finish(self) -> list[SharedDecoder]:
        """Waits for the step before the one launched last; returns its texts, whose turns have their results."""
        if len(self._launched) < 2:
            return []
        done = self._launched.popleft()
        self.runtime.model.ranks.wait(done.ended)
        shape = self.shapes[done.rung]
        records = done.record[: len(done.texts)].tolist()
        for slot, (text, (count, failed, *numbers)) in enumerate(zip(done.texts, records, strict=True)):
            turn = text.turn
            turn.tokens, turn.path = numbers[:count], numbers[MOST : MOST + count]
            turn.failed, turn.nodes, turn.depth = bool(failed), shape.ranks, shape.depth
            turn.logits = done.logits.get(slot)
        if self._planner is not None:
            self._learn(done, self._planner)
        return done.texts

    def _logits(self, part: Part, rung: int) -> dict[int, Tensor]:
        """Returns copies of what texts asked for, by slot: the next pass writes where they are."""
        rows, room, texts = self.shapes[rung].rows, self.state.logits, self.texts[part.first :]
        assert room is not None
        return {part.first + slot: room[slot * rows : (slot + 1) * rows].clone()
                for slot, text in enumerate(texts[: part.state.texts]) if text.sampler.params.logprobs}  # fmt: skip

    def _mark(self) -> torch.cuda.Event | None:
        if self.runtime.model.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    # slots

    def _settle_down(self) -> None:
        """Moves the last texts into the slots of those that have left, and tells the device who is where."""
        for place in range(len(self._slots)):
            while self._slots and self._slots[-1] is None:
                self._slots.pop()
            if place < len(self._slots) and self._slots[place] is None:
                self.state.part(place, 1).take(self.state.part(len(self._slots) - 1, 1))
                self._slots[place] = self._slots.pop()
        state, texts = self.state, self.texts
        assert state.pages is not None
        assert state.live is not None
        gone = self.most - len(texts)
        places = [*(text.lease.row for text in texts), *[self.pages.idle_row] * gone]
        self._mail.send(self._inbox, [places, [1] * len(texts) + [0] * gone])
        torch.index_select(self.pages.tables, 0, self._inbox[0], out=state.pages)
        state.live.copy_(self._inbox[1])
        if gone:
            state.part(len(texts), gone).blank()
        self._stages = union([text.stages for text in texts])
        self._changed, self._disturbed = False, True

    def _together(self) -> int:
        """Returns the most slots of a captured step: what fits, by powers of two."""
        rows = max(self.extend, *(shape.rows for shape in self.shapes))
        return min(STEP_TEXTS, 1 << (max(1, STEP_ROWS // rows).bit_length() - 1))

    def _parts(self, count: int) -> list[Part]:
        """Returns the captured work of the first `count` slots, a few more where fewer were not captured."""
        size, found = self._together(), list[Part]()
        for first in range(0, count, size):
            left = min(count - first, size)
            slots = min(1 << (left - 1).bit_length(), self.most - first)
            key = (self, first, slots, self._stages)
            found.append(self.runtime.kept(key, partial(self._capture, first, slots)))
        return found

    def _capture(self, first: int, slots: int) -> Part:
        state, runtime = self.state.part(first, slots), self.runtime
        with state.set_aside(self.pages.tables[self.pages.idle_row]):
            steps = [Step(runtime.model, state, shape, self._stages, self.extend) for shape in self.shapes]
            if runtime.graphs is not None:
                for step in steps:
                    step.capture(runtime.graphs)
            rungs = None
            if self.planned:
                rungs = Rungs.capture(runtime, state, steps, STEP_ROWS)
        self._disturbed = True
        return Part(first, state, steps, rungs)

    # shapes that take turns

    def _choose(self, parts: list[Part]) -> int:
        key = (self, "ladder", tuple(part.state.texts for part in parts), self._stages)
        ladder = self.runtime.kept(key, lambda: self._measured(parts))
        if self._planner is None:
            self._planner = TextLadder(ladder)
        planner, texts = self._planner, self.texts
        planner.ladder, planner.texts = ladder, len(texts)
        planner.left = max(text.end - len(text.tokens) for text in texts)
        planner.behind = max(text.waiting for text in texts)
        return planner.choose()

    def _measured(self, parts: list[Part]) -> Ladder:
        """Times the steps on tokens of all kinds, whose rows go to as many experts as those of texts."""
        measured = list[list[float]]()
        for part in parts:
            with part.state.set_aside(self.pages.tables[self.pages.idle_row]):
                generator = torch.Generator().manual_seed(0)
                vocabulary, state = self.runtime.model.config.vocab_size, part.state
                state.tokens.copy_(torch.randint(vocabulary, state.tokens.shape, generator=generator))
                state.hidden.copy_(torch.randn(state.hidden.shape, generator=generator))
                assert part.rungs is not None
                measured.append(part.rungs.seconds(state))
        self._disturbed = True
        seconds = [sum(times) for times in zip(*measured, strict=True)]
        return ladder_of(self.shapes, self.runtime.model.ranks.first(seconds), self._chances)

    def _turn(self, rungs: list[Rungs], rung: int, texts: list[SharedDecoder]) -> None:
        """Does what lies between steps, as `PlannedDecoder`; texts may be behind by different numbers of rows."""
        behind = max(text.waiting for text in texts)
        if rung == PLAIN:
            if self._unseen:  # what a drafting step committed lies where the next step writes
                for one in rungs:
                    one.settle()
                self._unseen, self._disturbed = False, True
                behind = self._set_waiting(texts, 0)
            if behind == WAITING:
                behind = self._catch_up(rungs, behind, texts)
            for text in texts:
                text.waiting += 1
        else:
            if behind > 1:  # the step itself reads the last row
                self._catch_up(rungs, behind, texts)
            self._unseen = True
            self._set_waiting(texts, 0)

    def _catch_up(self, rungs: list[Rungs], behind: int, texts: list[SharedDecoder]) -> int:
        rows = next(rows for rows in CATCH_UP_ROWS if behind - 1 <= rows)
        for one in rungs:
            one.catch_up[rows]()
        self._disturbed = True
        return self._set_waiting(texts, 1)

    def _set_waiting(self, texts: list[SharedDecoder], rows: int) -> int:
        for text in texts:
            text.waiting = rows
        return rows

    def _learn(self, done: Launched, planner: TextLadder) -> None:
        paths = [[row - 1 for row in text.turn.path[1:]] for text in done.texts if not text.finished]
        if done.ladder is not None and done.begun is not None and done.ended is not None:
            self._took(done.ladder, done.rung, done.begun.elapsed_time(done.ended) / 1e3)
        if paths:
            planner.learn_all(done.rung, paths, None)

    def _took(self, ladder: Ladder, rung: int, seconds: float) -> None:
        if self.runtime.model.ranks.size == 1:
            ladder.learn(rung, seconds)
        else:
            self.untold.append((ladder, rung, seconds))


class Groups:
    """What texts side by side share, kept from batch to batch: pages, groups, and who reads their prompts.

    Args:
        most: texts side by side.
        cache_tokens: of their pages; None for what all of them can need.
    """

    def __init__(self, runtime: DeviceRuntime, most: int, cache_tokens: int | None = None) -> None:
        self.runtime, self.most = runtime, most
        self.page_count = planned_pages(runtime.max_context, most, cache_tokens)
        self._groups: dict[tuple[Shape, ...], Group] = {}

    @cached_property
    def pages(self) -> DevicePages:
        """The texts' caches, made when the first of them comes."""
        model, tokens = self.runtime.model, self.runtime.max_context
        if model.device.type == "cuda":
            check_room(pages_bytes(model, tokens, self.page_count), model.device, f"A batch of {self.most} texts")
        return DevicePages(model, tokens, self.page_count, self.most)

    @cached_property
    def reader(self) -> Reader:
        return Reader(self.runtime, self.pages)

    def of(self, request: Request) -> Group:
        """Returns the group that a text belongs to, one that `shares`."""
        shapes = shapes_of(request.speculation)
        if shapes not in self._groups:
            for idle in [key for key, group in self._groups.items() if not group.texts][: 1 - GROUPS or None]:
                self.runtime.forget(self._groups.pop(idle))
            self._groups[shapes] = Group(self.runtime, self.pages, shapes, self.most)
        return self._groups[shapes]

    def stepping(self) -> list[Group]:
        """Returns the groups that have texts."""
        return [group for group in self._groups.values() if group.texts]

    def measured(self) -> list[float]:
        """Returns the seconds of steps that ranks have measured and nothing was learned from yet."""
        return [seconds for group in self._groups.values() for *_, seconds in group.untold]

    def learn(self, times: Sequence[float]) -> None:
        """Takes the first rank's in their place."""
        told = iter(times)
        for group in self._groups.values():
            for ladder, rung, _ in group.untold:
                ladder.learn(rung, next(told))
            group.untold.clear()


def shares(request: Request) -> bool:
    """Whether a text can take its steps together with others: drafts are accepted by the coupled rule, and the host
    draws nothing."""
    speculation = request.speculation
    return not request.sampler.on_host and (speculation is None or speculation.acceptance == "coupled")


def drafting(request: Request) -> bool:
    """Whether a text's steps may draft, so that its prompt is read for the MTP modules too."""
    return any(shape.parents for shape in shapes_of(request.speculation))


@lru_cache  # asked for every text in every round while prompts are read
def shapes_of(speculation: Speculation | None) -> tuple[Shape, ...]:
    """Returns the shapes that a text's steps may have."""
    if speculation is not None and speculation.adaptive:
        return planned_shapes(speculation)
    return (Shape.of(speculation),)
