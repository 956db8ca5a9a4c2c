"""A batch of sequences on a GPU that step together: those of one kind (`kinds`).

A single prompt is a group of one. Every sequence has a slot of one state; slots are filled from the first. Steps are
captured for the first 1, 2, 4, ... slots: if there are fewer sequences, the unused slots compute rows that are ignored.
The pages of each slot are listed on the device, so sequences join, leave and change slots without a new capture.

All sequences take a step of the same shape. If it may change from step to step ("auto"), a `ShapeTable` for each batch
size holds the times of steps, and one `ShapePlanner` chooses by what all sequences have accepted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from functools import partial

import torch
from torch import Tensor

from mtp_spec.cuda.flight import Flight, Part
from mtp_spec.cuda.guided import Guide
from mtp_spec.cuda.kinds import CHAINS, Kind
from mtp_spec.cuda.memory import check_room, guided_bytes, rule_bytes
from mtp_spec.cuda.pages import STEP_ROWS, STEP_SEQUENCES, DevicePages
from mtp_spec.cuda.runtime import DeviceRuntime
from mtp_spec.cuda.script import NOTHING, RING, Script, promised
from mtp_spec.cuda.sequence import DeviceSequence, Drafts, Results
from mtp_spec.cuda.shapes import CATCH_UP_ROWS, Switching, table_of
from mtp_spec.cuda.state import MOST, WAITING, Mail, State, copy_states, union
from mtp_spec.cuda.step import Step
from mtp_spec.kernels import commit as commits
from mtp_spec.kernels.sampler import Stages
from mtp_spec.planning.base import Outcome, Seconds
from mtp_spec.planning.chances import MODEL_MEMORY, Chances
from mtp_spec.planning.shape_planner import PLAIN, ShapeBatch, ShapePlan, ShapePlanner, ShapeTable
from mtp_spec.speculation import MAX_DEPTH


class Group:
    """Sequences of one kind, each in a slot.

    Args:
        most: number of slots.
        logits: `[R, V]` float32, where every step leaves its logits.
    """

    def __init__(self, runtime: DeviceRuntime, pages: DevicePages, kind: Kind, most: int, logits: Tensor) -> None:
        self.runtime, self.pages, self.kind, self.most = runtime, pages, kind, most
        # all slots' rows fit into one pass that shows the modules what a step left
        slots = min(STEP_SEQUENCES, 1 << (most - 1).bit_length())
        self.shapes, self.extend = kind.shapes, kind.extend(min(CHAINS[0] + 1, STEP_ROWS // slots))
        model, device = runtime.model, runtime.model.device
        self.state = State(model, runtime.max_context, pages.caches, pages.one(pages.idle_row).repeat(most, 1))
        self.state.live = torch.zeros(most, dtype=torch.int32, device=device)
        self.state.logits = logits
        nothing = partial(torch.full, fill_value=NOTHING, dtype=torch.int64, device=device)
        self.state.script = nothing((most, RING)) if kind.scripted else None
        self.state.replayed = nothing((most, runtime.max_context, MAX_DEPTH)) if kind.replay else None
        self.state.blank()
        self._inbox = torch.zeros(2, most, dtype=torch.int64, device=device)
        self._mail = Mail(2 * most, device)
        self._script = Script(most, device) if kind.scripted else None
        # without a reference to this group: in a cycle, the memory of a dropped one would wait for a collection
        work = partial(_arrange, self.state, pages.tables, self._inbox)
        self._arrange = work if runtime.graphs is None else runtime.graphs.later(work)
        self._slots: list[DeviceSequence | None] = []
        self._present: list[DeviceSequence] | None = []  # the sequences in them; None until it is asked for
        self._launched: deque[Flight] = deque()
        self._hosts = [torch.empty(most, commits.record_size(MOST), dtype=torch.int32,
                                   pin_memory=device.type == "cuda") for _ in range(2)]  # fmt: skip
        self._chances = Chances(MODEL_MEMORY)
        self._planner: ShapePlanner | None = None
        self.table: ShapeTable | None = None  # of the last step
        self._stages, self._tells = Stages(noise=False), False  # whether any sequence asked for logits
        self.pending = list[tuple[ShapePlan, float]]()  # seconds of steps, until the first rank's replace them
        self._changed = self._disturbed = self._unseen = False
        self._waiting = 0  # most rows of plain steps that are stored for the MTP modules, of any sequence (`shapes`)
        self._ended: torch.cuda.Event | None = None

    @property
    def sequences(self) -> list[DeviceSequence]:
        """The sequences that take its steps."""
        if self._present is None:
            self._present = [sequence for sequence in self._slots if sequence is not None]
        return self._present

    def join(self, sequences: Seq[DeviceSequence], state: State) -> None:
        """Assigns slots to prefilled sequences; their state is copied from `state`."""
        count, end = len(sequences), len(self._slots)
        free = [place for place, sequence in enumerate(self._slots) if sequence is None]
        places = [*free, *range(end, end + count)][:count]
        self._slots += [None] * (max(places) + 1 - end)
        for place, sequence in zip(places, sequences, strict=True):
            self._slots[place] = sequence
        if free:
            copy_states([self.state.part(place, 1) for place in places], [state.part(i, 1) for i in range(count)])
        else:
            copy_states([self.state.part(end, count)], [state.part(0, count)])
        self._changed, self._present = True, None
        self._waiting = max(self._waiting, 1)

    def leave(self, sequence: DeviceSequence) -> None:
        """Removes a sequence, if it is there."""
        if sequence in self._slots:
            self._slots[self._slots.index(sequence)] = None
            self._changed, self._present = True, None

    @property
    def full(self) -> bool:
        """Whether all slots are taken."""
        return len(self.sequences) == self.most

    def clear(self) -> None:
        """Removes all sequences, and waits for launched steps."""
        self._slots, self._present, self._changed, self._planner, self._waiting = [], [], True, None, 0
        while self._launched:
            self.runtime.model.ranks.wait(self._launched.popleft().ended)

    def launch(self, alone: bool) -> None:
        """Launches the next step of all sequences; a guided step is completed by `guide`.

        Args:
            alone: whether the GPU runs nothing else, so that the time from step to step is that of a step.
        """
        if self._changed:
            self._settle_down()
        sequences = self.sequences
        parts = self._parts(len(sequences))
        plan = self._plan(parts) if self.kind.takes_turns else None
        shape = PLAIN if plan is None else plan.shape
        if plan is not None:
            self._turn([part.switching for part in parts if part.switching is not None], shape)
        begun = self._mark() if self._disturbed or not alone or self._ended is None else self._ended
        self._disturbed = False
        flight = Flight(sequences, parts, shape, plan, len(sequences) == 1, begun)
        if self._script is not None and self._scripted(shape):
            assert self.state.script is not None
            flight.sources = self._script.send(self.state.script, [(len(one.tokens), one.given) for one in sequences])
        if self.kind.guided:
            self._begin(flight, parts[0])
        else:
            for part in parts:
                part.steps[shape]()
                flight.logits |= self._logits(flight, part)
            self._end(flight)
        self._launched.append(flight)

    def guide(self) -> list[tuple[DeviceSequence, Exception]]:
        """Completes the guided step launched last, after all earlier tokens have been committed; returns the sequences
        that failed."""
        flight, failed = self._launched[-1], list[tuple[DeviceSequence, Exception]]()
        for part in flight.parts:
            if part is not flight.parts[0]:
                self._begin(flight, part)
            assert part.guide is not None
            own = flight.sequences[part.first : part.first + part.state.sequences]
            failed += part.guide.end(part.steps[flight.shape], own, self.runtime.model.ranks.wait)
        self._end(flight)
        return failed

    def _begin(self, flight: Flight, part: Part) -> None:
        assert part.guide is not None
        part.guide.begin(part.steps[flight.shape])
        flight.logits |= self._logits(flight, part)

    def _end(self, flight: Flight) -> None:
        """Starts the copy of a step's record to the host."""
        host = self._hosts[0]
        self._hosts.reverse()
        host.copy_(self.state.record, non_blocking=True)
        flight.record, flight.ended = host, self._mark()
        self._ended = flight.ended
        if self.kind.watched:
            self.runtime.model.ranks.wait(flight.ended)
            step = flight.parts[0].steps[flight.shape]
            places = ((node, row) for nodes, rows in step.drafted for node, row in zip(nodes, rows.cpu(), strict=True))
            flight.drafts = Drafts(step.shape, step.proposed(), dict(places))

    def finish(self) -> Results | None:
        """Waits for the step before the one launched last; returns its results."""
        if len(self._launched) < 2:
            return None
        done = self._launched.popleft()
        self.runtime.model.ranks.wait(done.ended)
        shape = self.shapes[done.shape]
        used = commits.HEADER + shape.depth + 1 if shape.is_chain else None
        lines = done.record[: len(done.sequences), :used].tolist()
        results = Results(done.sequences, lines, shape, done.logits, drafts=done.drafts, sources=done.sources)
        if self._planner is not None and done.plan is not None:
            self._learn(done, done.plan, self._planner, results)
        return results

    def steps(self) -> list[Step]:
        """Returns the steps, one for each shape, for its current sequences."""
        return [*self._parts(len(self.sequences))[0].steps.values()]

    def _logits(self, flight: Flight, part: Part) -> dict[int, Tensor]:
        """Returns copies of requested logits, by slot: the next pass overwrites the originals."""
        if not self._tells:
            return {}
        rows, room = self.shapes[flight.shape].rows, self.state.logits
        assert room is not None
        own = flight.sequences[part.first : part.first + part.state.sequences]
        return {part.first + slot: room[slot * rows : (slot + 1) * rows].clone()
                for slot, sequence in enumerate(own) if sequence.params.logprobs or self.kind.watched}  # fmt: skip

    def _mark(self) -> torch.cuda.Event | None:
        if self.runtime.model.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    # slots

    def _settle_down(self) -> None:
        """Moves the last sequences into free slots, and updates the slots' page tables on the device."""
        slots, targets, sources = self._slots, list[State](), list[State]()
        for place in range(len(slots)):
            while slots and slots[-1] is None:
                slots.pop()
            if place < len(slots) and slots[place] is None:
                targets.append(self.state.part(place, 1))
                sources.append(self.state.part(len(slots) - 1, 1))
                slots[place] = slots.pop()
        if targets:
            copy_states(targets, sources)
        self._present = None
        sequences = self.sequences
        gone = self.most - len(sequences)
        places = [*(sequence.lease.row for sequence in sequences), *[self.pages.idle_row] * gone]
        self._mail.send(self._inbox, [places, [1] * len(sequences) + [0] * gone])
        self._arrange()
        for slot, sequence in enumerate(sequences) if self.kind.replay else ():
            self.state.replay(slot, sequence.core.prompt_tokens - 1, sequence.script)
        self._stages = union({sequence.stages for sequence in sequences})
        self._tells = self.kind.watched or any(sequence.params.logprobs for sequence in sequences)
        self._changed, self._disturbed = False, True

    def _together(self) -> int:
        """Returns the most slots of a captured step: the largest power of two that fits with every shape that has to be
        there."""
        rows = max(self.extend, *(shape.rows for shape in (self.shapes if self.kind.eager else self.kind.own)))
        return min(STEP_SEQUENCES, 1 << (max(1, STEP_ROWS // rows).bit_length() - 1))

    def _parts(self, count: int) -> list[Part]:
        """Returns the captured work of the first `count` slots, rounded up to sizes that are captured."""
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
            kind, guide = self.kind, None
            # without chains for which all other steps would need more passes
            shapes = {number: shape for number, shape in enumerate(self.shapes)
                      if slots * shape.rows <= STEP_ROWS or kind.eager or number < len(kind.own)}  # fmt: skip
            rows = slots * max(shape.rows for shape in shapes.values())
            if kind.guided:
                guide = Guide(runtime.model.device, rows, runtime.model.config.vocab_size, kind.guided)
            masks = None if guide is None else guide.masks
            steps = {number: Step(runtime.model, state, shape, self._stages, self.extend, kind.acceptance, kind.guided,
                                  masks, kind.watched, self._scripted(number), kind.replay)
                     for number, shape in shapes.items()}  # fmt: skip
            if runtime.graphs is not None and not kind.watched:
                if guide is not None:
                    check_room(guided_bytes(runtime.model.config, rows), runtime.model.device,
                               f"A guided step of {rows} rows")  # fmt: skip
                if kind.acceptance != "coupled":
                    nodes = max(len(shape.parents) for shape in self.shapes)
                    check_room(rule_bytes(runtime.model.config, nodes), runtime.model.device,
                               f'acceptance="{kind.acceptance}" on {nodes} nodes')  # fmt: skip
                for step in steps.values():
                    step.capture(runtime.graphs)
            switching = None
            if self.kind.takes_turns:
                switching = Switching.capture(runtime, state, steps, STEP_ROWS)
        self._disturbed = True
        return Part(first, state, steps, switching, guide)

    # several shapes

    def _scripted(self, shape: int) -> bool:
        return shape >= len(self.kind.own)

    def _plan(self, parts: list[Part]) -> ShapePlan:
        key = (self, "table", tuple(part.state.sequences for part in parts), self._stages)
        self.table, sequences = self.runtime.kept(key, lambda: self._measured(parts)), self.sequences
        if self._planner is None:
            self._planner = ShapePlanner(self.table)
        left = max(sequence.left for sequence in sequences)
        given = self._promised(sequences) if self.kind.scripted else ()
        return self._planner.plan(ShapeBatch(self.table, len(sequences), left, self._waiting, given, self.kind.eager))

    def _promised(self, sequences: list[DeviceSequence]) -> Seq[float]:
        """Returns for each of their shapes the mean of the tokens that other drafters' proposals promise."""
        flying = sum(one.plan.tokens for one in self._launched if one.plan is not None)
        follows = sum(self.shapes[one.shape].depth for one in self._launched if one.sources)
        found = [promised(sequence.given, flying, self.kind.chains, follows) for sequence in sequences]
        return [sum(tokens) / len(sequences) for tokens in zip(*found, strict=True)]

    def _measured(self, parts: list[Part]) -> ShapeTable:
        """Times the steps on random tokens, whose rows activate as many experts as those of real sequences."""
        measured = list[list[float]]()
        for part in parts:
            with part.state.set_aside(self.pages.tables[self.pages.idle_row]):
                generator = torch.Generator().manual_seed(0)
                vocabulary, state = self.runtime.model.config.vocab_size, part.state
                state.tokens.copy_(torch.randint(vocabulary, state.tokens.shape, generator=generator))
                state.hidden.copy_(torch.randn(state.hidden.shape, generator=generator))
                if self.kind.scripted and state.script is not None:
                    state.script.copy_(torch.randint(vocabulary, state.script.shape, generator=generator))
                assert part.switching is not None
                measured.append(part.switching.seconds(state, len(self.shapes)))
                if self.kind.scripted and state.script is not None:
                    state.script.fill_(NOTHING)
        self._disturbed = True
        seconds = [sum(times) for times in zip(*measured, strict=True)]
        return table_of(self.shapes, self.runtime.model.ranks.first(seconds), self._chances, self.kind.scripted)

    def _turn(self, parts: list[Switching], shape: int) -> None:
        """Runs the transition to a shape; the sequences' backlogs may differ in rows."""
        if shape == PLAIN:
            if self._unseen:  # the next step would overwrite what a drafting step committed
                for one in parts:
                    one.settle()
                self._unseen, self._disturbed, self._waiting = False, True, 0
            if self._waiting == WAITING:
                self._catch_up(parts)
            self._waiting += 1
        else:
            if self._waiting > 1:  # the step itself processes the last row
                self._catch_up(parts)
            self._unseen, self._waiting = True, 0

    def _catch_up(self, parts: list[Switching]) -> None:
        rows = next(rows for rows in CATCH_UP_ROWS if self._waiting - 1 <= rows)
        for one in parts:
            one.catch_up[rows]()
        self._disturbed, self._waiting = True, 1

    def _learn(self, done: Flight, plan: ShapePlan, planner: ShapePlanner, results: Results) -> None:
        counts = [line[commits.COUNT] for line in results.lines]
        paths: list[Seq[int] | None] = [range(count - 1) for count in counts]
        if not results.chain:
            paths = [[row - 1 for row in results.path(slot)[1:]] for slot in range(len(counts))]
        for slot, sequence in enumerate(results.sequences):
            if sequence.core.finished:
                paths[slot] = None
        seconds = None
        if done.begun is not None and done.ended is not None:
            taken = done.begun.elapsed_time(done.ended) / 1e3
            if done.alone:
                (sequence,) = results.sequences
                sequence.core.stats.record_plan(plan.tokens, plan.seconds, len(results.tokens(0)), taken)
            if self.runtime.model.ranks.size == 1:
                seconds = Seconds(taken)
            else:
                self.pending.append((plan, taken))
        planner.learn(plan, Outcome(paths, seconds))

    def learn(self, seconds: Seq[float]) -> None:
        """Learns the first rank's seconds in place of the pending ones."""
        for (plan, _), taken in zip(self.pending, seconds, strict=True):
            plan.table.learn(plan.shape, taken)
        self.pending.clear()


def _arrange(state: State, tables: Tensor, inbox: Tensor) -> None:
    """Takes what was sent of the slots, `[2, B]`: their rows of the page tables, and which of them are in use."""
    assert state.pages is not None
    assert state.live is not None
    torch.index_select(tables, 0, inbox[0], out=state.pages)
    state.live.copy_(inbox[1])
    state.blank_unused()
