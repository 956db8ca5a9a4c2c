"""The backend of a model on a GPU: its cache pages, captured work and runners.

A round prefills prompts, in chunks, launches a step of every group, and then reads the tokens of the previous steps, so
that the GPU never waits for the host. A single prompt takes the same path as many: it is a group of one. A sequence's
text is the same as if it ran alone: its rows have the same bits, and everything else is computed separately.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from time import perf_counter

import torch

from mtp_spec.cache.pages import check_pages
from mtp_spec.cuda.group import Group
from mtp_spec.cuda.kinds import AUTO, Kind, check_mixed, kind_of
from mtp_spec.cuda.pages import DeviceLease, planned_pages, room_of
from mtp_spec.cuda.pool import GROUPS, Pool
from mtp_spec.cuda.prefill import First, Reader
from mtp_spec.cuda.runtime import DeviceRuntime
from mtp_spec.cuda.sequence import DeviceSequence, Results
from mtp_spec.cuda.step import Step
from mtp_spec.errors import MTPSpecError
from mtp_spec.model.cache import pages_for
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.model.errors import RankError
from mtp_spec.model.host import Technique
from mtp_spec.model.undisturbed import undisturbed
from mtp_spec.planning.shape_planner import ShapeTable
from mtp_spec.request import Request
from mtp_spec.sequence import Sequence
from mtp_spec.speculation import Speculation
from mtp_spec.tree_shape import TreeShape

# most prefill rows in a round, unless a single pass has more; and likewise while more sequences wait for their prefill
# than take steps
PROMPT_ROWS, HURRIED_ROWS = 256, 2048
# most rows of a long prompt's chunk beside steps of other sequences, unless more sequences wait than take steps
BESIDE_ROWS = 1024
FIRST = TreeShape()  # of a prompt's first token


class DeviceBackend:
    """The GPU backend of a model, see `mtp_spec.step.Backend`.

    Args:
        max_context: most tokens of prompt and generated text.
        max_batch: most sequences that share steps.
        cache_tokens: tokens that their pages hold; None for the full context of all.
    """

    # drafters other than the modules take part by name: what they bring has not been timed on a GPU
    auto, captured, mixes = AUTO, True, False
    technique: Technique = "batched"

    def __init__(
        self, model: DeviceModel, max_context: int, max_batch: int = 1, cache_tokens: int | None = None
    ) -> None:
        self.model, self.max_batch = model, max_batch
        self.runtime = DeviceRuntime(model, max_context)
        self.total = planned_pages(max_context, max_batch, cache_tokens)
        self._pools = list[Pool]()

    def check(self, speculation: Speculation) -> None:
        """Rejects drafters that cannot take part; see `mtp_spec.step.Backend`."""
        check_mixed(speculation)

    def exclusive(self) -> AbstractContextManager[None]:
        """Returns the lock: only one thread at a time may run captured work."""
        return self.runtime.lock

    def table(self) -> ShapeTable:
        """Returns the shape table of the newest adaptive group."""
        return next(group.table for group in reversed(self.pool.known) if group.table is not None)

    def steps_of(self, sequence: Sequence) -> list[Step]:
        """Returns the captured steps of a sequence that runs alone: one for each shape."""
        return next(group for group in self.pool.known if sequence.state in group.sequences).steps()

    def trim(self) -> None:
        """Does nothing: captured work, and the caches that it reads, are kept."""

    def runner(self, shared: bool) -> DeviceRunner:
        """Returns a runner; see `mtp_spec.step.Backend`."""
        return DeviceRunner(self, shared)

    @property
    def pool(self) -> Pool:
        """The pages of all sequences, allocated for the first one."""
        if not self._pools:
            self._pools.append(Pool(self.runtime, self.total, self.max_batch))
        return self._pools[0]

    def lease(
        self, request: Request, drafts: bool, shared: bool, beside: Pool | None
    ) -> tuple[Pool, DeviceLease] | None:
        """Returns pages for a request; None if it has to wait for those of others.

        Args:
            shared: whether it may wait.
            beside: the pool of the sequences that it shares steps with, if there are any.
        """
        room = room_of(request, self.runtime.max_context)
        if beside not in (None, self.pool):  # a pool beside the first one is for one sequence
            return None
        for pool in [self.pool] if beside else [self.pool, *self._pools[1:]]:
            lease = pool.pages.lease(request.ids, room, drafts)
            if lease is not None:
                return pool, lease
        if beside:
            return None
        if shared and self.model.ranks.size > 1:  # one might have the memory and another not
            return None
        # while streams hold all pages, another sequence gets a pool of its own: nobody may be reading them
        try:
            pool = Pool(self.runtime, planned_pages(self.runtime.max_context, 1), 1)
        except (MTPSpecError, torch.OutOfMemoryError):
            if shared:
                return None
            raise
        self._pools.append(pool)
        lease = pool.pages.lease(request.ids, room, drafts)
        assert lease is not None
        return pool, lease


class DeviceRunner:
    """Runs sequences on a GPU, see `mtp_spec.step.Runner`."""

    def __init__(self, backend: DeviceBackend, shared: bool) -> None:
        self._backend, self._shared, self._runtime = backend, shared, backend.runtime
        self._pool: Pool | None = None
        self._reader: Reader | None = None
        self._groups = list[Group]()
        self._unread, self._first = deque[DeviceSequence](), deque[First]()
        self._changed = list[Sequence]()

    def check(self, request: Request) -> None:
        """Rejects a request that could never fit; see `mtp_spec.step.Runner`."""
        if self._shared:
            check_pages(request, room_of(request, self._runtime.max_context), self._backend.total)

    def crowded(self, request: Request) -> bool:
        """Whether others hold memory that a request needs; see `mtp_spec.step.Runner`."""
        pages = self._backend.pool.pages
        return pages.free + pages.idle < pages_for(room_of(request, self._runtime.max_context))

    def begins(self, threads: int) -> None:
        """Does nothing: captured steps need no preparation."""

    def measured(self) -> list[float]:
        """Returns the measured seconds of steps; see `mtp_spec.step.Runner`."""
        return [seconds for group in self._groups for *_, seconds in group.pending]

    def learn(self, times: Seq[float]) -> None:
        """Learns the first rank's times in place of its own."""
        told = iter(times)
        for group in self._groups:
            group.learn([next(told) for _ in group.pending])

    @undisturbed()
    def admit(self, sequence: Sequence, running: Seq[Sequence]) -> bool:
        """Leases pages for a sequence; see `mtp_spec.step.Runner`."""
        request, ranks = sequence.request, self._backend.model.ranks
        kind = kind_of(request, sequence.observer is not None)
        with self._runtime.lock, nullcontext() if self._shared else ranks.together():
            # those that have been read have no pages left to fill
            others = ((sequence.lease, sequence.core.request.ids, sequence.drafts) for sequence in self._unread)
            drafts = kind.modules
            if self._backend.pool.pages.is_being_read(request.ids, drafts, others):
                return False
            beside = self._pool if self._shared and running else None
            found = self._backend.lease(request, drafts, self._shared, beside)
            if found is None:
                return False
            pool, lease = found
            if pool is not self._pool:  # reader and groups belong to theirs
                self.close()
                self._pool = pool
            sequence.lease = lease
            sequence.state = state = DeviceSequence(self._backend.model, sequence, kind, lease)
            if self._reader is None:
                self._reader = self._pool.reader()
            self._unread.append(state)
            return True

    @undisturbed()
    def round(self, running: Seq[Sequence]) -> list[Sequence]:
        """Runs a step of all prefilled sequences, and the next prefill passes; see `mtp_spec.step.Runner`."""
        with self._runtime.lock:
            start = perf_counter()
            self._changed, begun = [], [one.steps > 0 for one in running]
            sampled = [_sampled(one) for one in running] if self._guides() else None
            self._draw_first()
            read = self._read(len(running))
            groups = [group for group in self._groups if group.sequences]
            for group in self._groups:
                if not group.sequences:
                    group.clear()
            alone = not read and sum(len(group.sequences) for group in groups) == len(running)
            for group in groups:
                self._step(group, alone and len(groups) == 1)
            seconds = perf_counter() - start
            for number, (one, steps) in enumerate(zip(running, begun, strict=True)):
                other = 0.0 if sampled is None else _sampled(one) - sampled[number]
                one.stats.add_seconds("step" if steps else "prefill", seconds - other)
            return self._changed

    def release(self, sequence: Sequence) -> None:
        """Gives the sequence's pages back; see `mtp_spec.step.Runner`."""
        state, sequence.state = sequence.state, None
        if isinstance(state, DeviceSequence):
            if state in self._unread:
                self._unread.remove(state)
            if self._reader is not None:
                self._reader.drop(state)
            self._leave(state)
        if sequence.lease is not None:
            sequence.lease.end()

    def close(self) -> None:
        """Returns reader and groups to the pool; see `mtp_spec.step.Runner`."""
        self._first.clear()
        groups, self._groups = self._groups, []
        self._give_back(groups)
        if self._pool is not None:
            reader, self._reader = self._reader, None
            self._pool.give_back(reader, ())

    def _leave(self, sequence: DeviceSequence) -> None:
        for group in [one for one in self._groups if sequence in one.sequences]:
            group.leave(sequence)
            if not group.kind.shared:
                self._groups.remove(group)
                self._give_back([group])

    def _give_back(self, groups: Seq[Group]) -> None:
        if self._pool is not None:
            self._pool.give_back(None, groups)

    def _guides(self) -> bool:
        """Whether the host guides any of the sequences."""
        kinds = (*(group.kind for group in self._groups), *(sequence.kind for sequence in self._unread))
        return any(kind.guided for kind in kinds)

    # steps

    def _step(self, group: Group, alone: bool) -> None:
        sequences = group.sequences
        try:
            group.launch(alone)
            if (results := group.finish()) is not None:
                self._take(results)
            if group.kind.guided:
                self._draw_first()  # the guidance of this step needs the first tokens
                for sequence, error in group.guide():
                    self._fail([sequence], error)
        except RankError:  # ends all sequences of all rounds
            raise
        except Exception as error:
            self._fail([sequence for sequence in sequences if sequence.core.alive], error)

    def _take(self, results: Results) -> None:
        for slot, state in enumerate(results.sequences):
            sequence = state.core
            if sequence.state is not state or not sequence.alive:  # it ended while the step was in flight
                continue
            try:
                state.take(results, slot)
                self._changed.append(sequence)
                if sequence.finished:
                    self._leave(state)
            except Exception as error:
                self._fail([state], error)

    def _fail(self, sequences: Seq[DeviceSequence], error: Exception) -> None:
        for sequence in sequences:
            sequence.core.fail(error)
            self._changed.append(sequence.core)

    def _group_of(self, kind: Kind) -> Group:
        found = next((one for one in self._groups if one.kind == kind and not one.full), None)
        if found is None:
            assert self._pool is not None
            empty = [one for one in self._groups if not one.sequences]
            for idle in empty[: 1 - GROUPS or None]:
                self._groups.remove(idle)
                self._give_back([idle])
            found = self._pool.group(kind, self._shared)
            self._groups.append(found)
        return found

    # prompts

    def _draw_first(self) -> None:
        """Takes the first tokens of the prompts that were prefilled in the previous round."""
        while self._first:
            first = self._first.popleft()
            assert self._reader is not None
            self._runtime.model.ranks.wait(first.ended)
            lines = [[1, failed, 1, token] for token, failed in zip(*self._reader.done(first), strict=True)]
            logits = {} if first.logits is None else dict(enumerate(first.logits[: len(lines), None]))
            self._take(Results(first.sequences, lines, FIRST, logits, prompt=True))

    def _read(self, running: int) -> int:
        """Runs some prefill passes; returns their number of rows."""
        rows, unread = 0, self._unread
        # sequences that take steps wait for the pass
        most = BESIDE_ROWS if 2 * len(unread) <= running else self._backend.model.prefill_tokens
        while unread and (rows < PROMPT_ROWS or (2 * len(unread) > running and rows < HURRIED_ROWS)):
            some = [unread[0]]
            try:
                some, more, first = self._read_some(most)
                if first is not None:
                    self._first.append(first)
                    self._join(first)
            except RankError:
                raise
            except Exception as error:  # of these sequences only: the others continue
                for sequence in some:
                    if sequence in unread:
                        unread.remove(sequence)
                self._fail(some, error)
                continue
            rows += more
        return rows

    def _join(self, first: First) -> None:
        """Moves prefilled sequences into groups."""
        assert self._reader is not None
        state, slot = self._reader.state, 0
        for sequence in first.sequences:
            self._unread.remove(sequence)
        for kind, own in groupby(first.sequences, lambda sequence: sequence.kind):
            end = slot + len(list(own))
            while slot < end:
                group = self._group_of(kind)
                count = min(end - slot, group.most - len(group.sequences))
                group.join(first.sequences[slot : slot + count], state.part(slot, count))
                slot += count

    def _read_some(self, most: int) -> tuple[list[DeviceSequence], int, First | None]:
        """Prefills the sequence that has waited longest, with others that fit into the same pass, or a chunk of it.

        Args:
            most: most rows of a chunk.

        Returns the sequences, the pass's rows, and the first tokens of those whose prompts are complete.
        """
        reader, oldest = self._reader, self._unread[0]
        assert reader is not None
        reader.pages.prepare()
        rows, drafts = reader.rows(oldest), oldest.drafts
        if rows is None:
            others = [sequence for sequence in self._unread if sequence.drafts == drafts]
            more, read, first = reader.chunk(others, most, drafts)
            return read or [oldest], more, first
        some = reader.alike(self._unread, rows, drafts)
        return some, *reader.whole(some, rows, drafts)


def _sampled(sequence: Sequence) -> float:
    """Returns the seconds that the host has spent on sampling for a sequence."""
    return sequence.stats.phase_seconds["sample"]
