"""The backend of a model on a CPU, or by torch on any device: its cache pages, planners and runners."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext

import torch

from mtp_spec.cache.pages import HostLease, HostPages, Lease, check_pages
from mtp_spec.cpu.passes import MOST_ROWS, Passes
from mtp_spec.cpu.pending_times import PendingTimes
from mtp_spec.cpu.planners import Planners
from mtp_spec.cpu.state import HostState
from mtp_spec.cpu.step import HostStep, TreePlanner
from mtp_spec.drafting import Text
from mtp_spec.memory import PagePlan
from mtp_spec.model.cache import PAGE, pages_for
from mtp_spec.model.errors import RankError
from mtp_spec.model.host import HostModel
from mtp_spec.model.undisturbed import undisturbed
from mtp_spec.planning.fixed_plan import FixedPlanner, TreeBatch
from mtp_spec.request import Request
from mtp_spec.sequence import Sequence
from mtp_spec.speculation import MAX_DEPTH, MAX_NODES, Speculation
from mtp_spec.step import step
from mtp_spec.text import Tokenizer

# most prefill rows in a round, unless a single chunk has more
PROMPT_ROWS = MOST_ROWS
# the largest trees that "auto" drafts, with MTP modules and without
AUTO = Speculation(branching=(2,) * MAX_DEPTH, budget=MAX_NODES, adaptive=True)
ALONE = Speculation(budget=MAX_NODES, adaptive=True, drafters=(Text.name,))


class HostBackend:
    """The CPU backend of a model, see `mtp_spec.step.Backend`.

    Args:
        max_context: most tokens of prompt and generated text.
        max_batch: most sequences that share steps.
        cache_tokens: tokens that their pages hold; None for the full context of all.
        measure: measure step times for "auto" unless they are stored.
        progress: show a bar while measuring.
    """

    captured, mixes = False, True

    def __init__(
        self, model: HostModel, tokenizer: Tokenizer | None, max_context: int, max_batch: int = 1,
        cache_tokens: int | None = None, measure: bool = True, progress: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.technique = model, model.technique
        self.auto = AUTO if model.mtp else ALONE
        self.planners = Planners(model, model.technique, tokenizer, max_context, measure, progress)
        self._sizes = max_context, max_batch, cache_tokens
        self._pages: HostPages | None = None
        self._threads = 0

    def check(self, speculation: Speculation) -> None:
        """Does nothing: every drafter can take part."""

    def exclusive(self) -> AbstractContextManager[None]:
        """Does nothing: on a CPU threads may compute concurrently."""
        return nullcontext()

    def trim(self) -> None:
        """Frees the pages if no sequence uses them."""
        if self._pages is not None and not self._pages.leased:
            self._pages = None

    def runner(self, shared: bool) -> HostRunner:
        """Returns a runner; see `mtp_spec.step.Backend`."""
        return HostRunner(self, shared)

    def pages(self, shared: bool) -> HostPages | None:
        """Returns the pages of all sequences; None if each has memory of its own, which is so for torch on a GPU.

        Raises:
            MTPSpecError: sequences that share steps could need more memory than the machine has.
        """
        model = self.model
        if model.device.type != "cpu":
            return None
        if self._pages is None or shared:
            max_context, max_batch, cache_tokens = self._sizes
            plan = PagePlan.of(model.config, model.dtype, max_context, max_batch, cache_tokens, refuse=shared)
            if self._pages is None:
                unit = 1 if self.technique == "batched" else MOST_ROWS // PAGE
                self._pages = HostPages(model.new_layers(plan.pages), len(model.mtp), unit, plan.most_idle)
        return self._pages

    def lease(self, sequence: Sequence, running: Seq[Sequence], shared: bool) -> HostLease | None:
        """Returns pages for a sequence; None if it has to wait for those of others that run beside it."""
        request, pages = sequence.request, self.pages(shared)
        if pages is not None:
            prompt = request.ids if self._same_way(pages) else []
            others = [(one.lease, one.request.ids, one.request.strict) for one in running
                      if isinstance(one.lease, Lease)]  # fmt: skip
            if not pages.is_being_read(prompt, request.strict, others):
                lease = pages.lease(prompt, request.room, request.strict)
                if lease is not None:
                    return lease
            if shared and running:  # else only streams hold them, which nobody may be reading: waiting might never end
                return None
        layers = self.model.new_layers(pages_for(request.room))
        return HostPages(layers, len(self.model.mtp)).lease([], request.room, False)

    def _same_way(self, pages: HostPages) -> bool:
        """Whether rows have the same bits as those in the pages: with torch they depend on the number of threads."""
        threads = torch.get_num_threads()
        if self.model.runs_on != "torch" or threads == self._threads:
            return True
        if pages.leased:
            return False
        pages.forget()
        self._threads = threads
        return True


class HostRunner:
    """Runs sequences on a CPU, see `mtp_spec.step.Runner`."""

    def __init__(self, backend: HostBackend, shared: bool) -> None:
        self._backend, self._shared = backend, shared
        self._passes = Passes(backend.model, backend.technique)
        self._fixed: TreePlanner = FixedPlanner()
        self._adaptive: TreePlanner = self._fixed  # for rounds with adaptive speculation, once there is one
        self._pending = PendingTimes(backend.model.ranks.size == 1)
        self._rounds = 0

    def check(self, request: Request) -> None:
        """Rejects a request that could never fit; see `mtp_spec.step.Runner`."""
        pages = self._backend.pages(self._shared)
        if pages is not None and self._shared:
            check_pages(request, request.room, pages.total)

    def crowded(self, request: Request) -> bool:
        """Whether others hold memory that a request needs; see `mtp_spec.step.Runner`."""
        pages = self._backend.pages(self._shared)
        return pages is not None and pages.free + pages.idle < pages_for(request.room)

    def begins(self, threads: int) -> None:
        """Computes with as many threads as the submitter does."""
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)

    def measured(self) -> list[float]:
        """Returns the measured seconds of steps; see `mtp_spec.step.Runner`."""
        return self._pending.measured()

    def learn(self, times: Seq[float]) -> None:
        """Learns the first rank's times in place of its own."""
        self._pending.learn(times)

    def admit(self, sequence: Sequence, running: Seq[Sequence]) -> bool:
        """Leases pages for a sequence; see `mtp_spec.step.Runner`."""
        backend, speculation, memory = self._backend, sequence.speculation, None
        if speculation is not None and speculation.adaptive:
            self._adaptive = planner = backend.planners.here()
            memory = planner.begin()
        sequence.lease = lease = backend.lease(sequence, running, self._shared)
        if lease is None:
            return False
        sequence.state = HostState(backend.model, backend.technique, sequence, lease, memory)
        return True

    @undisturbed()
    def round(self, running: Seq[Sequence]) -> list[Sequence]:
        """Runs a step of all prefilled sequences together with the next prefill chunks; see `mtp_spec.step.Runner`."""
        states, failed = [one.state for one in running], list[Sequence]()
        stepping = list[HostState]()
        for state in (state for state in states if state.reading is None):
            try:
                state.ask()
                stepping.append(state)
            except Exception as error:  # of this sequence's own drafter
                state.sequence.fail(error)
                failed.append(state.sequence)
        planner = self._adaptive if any(state.memory is not None for state in stepping) else self._fixed
        plans = planner.plan(TreeBatch([state.standing() for state in stepping], len(running) == 1))
        batch = [state for state, plan in zip(stepping, plans, strict=True) if state.begins_step(plan)]
        reading = self._next([state for state in states if state.reading is not None])
        try:
            return failed + step(HostStep(self._passes, batch, reading, planner, self._pending))
        except RankError:  # ends all sequences of all rounds
            raise
        except Exception as error:  # of a shared pass: every sequence in it fails
            broken = [state.sequence for state in (*batch, *reading)]
            for one in broken:
                if one.error is None:
                    one.fail(error)
            return failed + broken

    def release(self, sequence: Sequence) -> None:
        """Gives the sequence's pages back; see `mtp_spec.step.Runner`."""
        if sequence.lease is not None:
            sequence.lease.end()
        sequence.state = None

    def close(self) -> None:
        """Has nothing to end."""

    def _next(self, reading: list[HostState]) -> list[HostState]:
        """Returns the sequences whose next prefill chunk runs in this round, longest waiting first, as far as they fit.

        So a long prompt delays neither the steps nor the other prompts.
        """
        found, rows = list[HostState](), 0
        self._rounds += 1
        for state in sorted(reading, key=lambda state: state.read):
            assert state.wanted is not None
            if found and rows + state.wanted.rows > PROMPT_ROWS:
                continue
            found.append(state)
            rows, state.read = rows + state.wanted.rows, self._rounds
        return found
