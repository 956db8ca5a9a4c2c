"""The generation loop of a sequence on a GPU: prefill, then captured steps, read one step behind.

Same interface and same contract as `engine.Decoder`; the difference is where things happen. A step is launched before
the tokens of the one before it are looked at, so that the GPU never waits for text, stop strings or a terminal.
`DeviceDecoder` is a text with steps of its own, `SharedDecoder` one of several whose steps somebody else launches
(`device_group`).
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from mtp_spec.acceptance.accept import Drawn
from mtp_spec.cache.prefix import Left
from mtp_spec.cpu.passes import Turn
from mtp_spec.cuda.constants import Shape
from mtp_spec.cuda.lock import Turns
from mtp_spec.cuda.pages import DeviceLease
from mtp_spec.cuda.state import MOST, WAITING, State, prefill_rows, stages_of
from mtp_spec.cuda.step import Graphs, Prefill, Step
from mtp_spec.errors import MTPSpecError
from mtp_spec.kernels import commit as commits
from mtp_spec.kernels.sampler import Stages, sample
from mtp_spec.memory import check_room, plan_memory, rule_bytes
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.model.undisturbed import undisturbed
from mtp_spec.sampling.sampler import Sampler
from mtp_spec.speculation import Speculation
from mtp_spec.stats import GenerationStats

# captured steps and passes, and what was learned of them; a batch has some for every size
KEPT = 256
T = TypeVar("T")


class DeviceRuntime:
    """The states and captured steps of a loaded model, kept from text to text.

    Args:
        max_context: most tokens of prompt and text.
    Attributes:
        turns: to be entered by whoever uses the GPU: threads may write texts of one model.
    """

    def __init__(self, model: DeviceModel, max_context: int) -> None:
        self.model, self.max_context, self.turns = model, max_context, Turns()
        self.graphs = Graphs(model.device, model.ranks.size > 1) if model.device.type == "cuda" else None
        self._states: list[State] = []
        self._paged: list[State] = []
        self._kept: dict[Hashable, object] = {}

    def acquire(self, lease: DeviceLease | None = None, wanted: State | None = None) -> State:
        """Returns a state that no other text uses, with caches of its own; with a lease it is still on idle pages.

        Args:
            wanted: one of those.
        """
        states = self._states if lease is None else self._paged
        state = wanted or next((state for state in states if not state.busy), None)
        if lease is not None:
            store = lease.store
            if state is None:
                state = State(self.model, self.max_context, store.caches, store.one(store.idle_row))
                states.append(state)
            assert state.pages is not None
            state.pages.copy_(store.tables[store.idle_row])
        elif state is None:
            if self.graphs is not None:
                others = f" beside {len(self._states)} more" if self._states else ""
                check_room(plan_memory(self.model, self.max_context).caches, self.model.device, f"A text{others}")
            state = State(self.model, self.max_context)
            self._states.append(state)
        state.busy = True
        return state

    def step(self, state: State, shape: Shape, stages: Stages, extend: int, acceptance: str, draws: bool) -> Step:
        """Returns the step of a tree, captured where there is a GPU. The state must not hold a text yet."""

        def make() -> Step:
            step = Step(self.model, state, shape, stages, extend, acceptance, draws)
            if self.graphs is not None:
                needed = rule_bytes(self.model.config, len(shape.parents)) if acceptance != "coupled" else 0
                check_room(needed, self.model.device, f'acceptance="{acceptance}" on {len(shape.parents)} nodes')
                step.capture(self.graphs)
            return step

        return self.kept((id(state), shape, stages, extend, acceptance, draws), make)

    def kept(self, key: Hashable, make: Callable[[], T]) -> T:
        """Returns what was made for a key; what was not asked for the longest is dropped."""
        found = self._kept.pop(key, None)
        if found is None:
            found = make()
            while len(self._kept) >= KEPT:
                self._kept.pop(next(iter(self._kept)))
        self._kept[key] = found  # the most recent last
        return cast(T, found)

    def forget(self, owner: object) -> None:
        """Drops what was made for keys that begin with an object."""
        self._kept = {key: kept for key, kept in self._kept.items()
                      if not (isinstance(key, tuple) and key[0] is owner)}  # fmt: skip

    def prefill(self, state: State, tokens: int, first: int, draft: bool) -> Prefill:
        """Returns the pass for a prompt's next chunk, captured where there is a GPU and room for its padding."""
        left = tokens - first
        rows = prefill_rows(left)
        if self.graphs is None or first + rows > state.caches[0].capacity:
            return Prefill(self.model, state, min(left, rows), draft)
        graphs = self.graphs
        return self.kept((id(state), rows, draft), lambda: Prefill(self.model, state, rows, draft, graphs))


class DeviceText:
    """What is common to texts on a GPU: their tokens, and where they end.

    Args:
        sampler: draws the tokens.  is_last: told each token; true ends the text there.
        lease: where its caches are; None for some of its own.
        late: tokens that MTP modules may not have seen yet, see `late_of`; None where the text does not draft.
    """

    def __init__(
        self, model: DeviceModel, prompt: Sequence[int], sampler: Sampler, is_last: Callable[[int], bool],
        lease: DeviceLease | None, late: int | None,
    ) -> None:  # fmt: skip
        self.lease, self._late = lease, late
        self.model, self.sampler, self.is_last = model, sampler, is_last
        self.tokens, self.prompt_tokens, self.stages = list(prompt), len(prompt), stages_of(sampler.params)
        self.stats = GenerationStats(reused_tokens=0 if lease is None else lease.reused)
        self.finished = False

    def has_read(self, count: int) -> None:
        """Lets others share what is read of the prompt, or about to be: its first `count` tokens."""
        self._share(count, min(count, len(self.tokens) - 1))

    def _publish(self) -> None:
        """Lets others share what the caches hold of the text."""
        held = len(self.tokens) - 1
        self._share(held, held - (self._late or 0))

    def _share(self, held: int, fed: int) -> None:
        """Lets others share pages with these slots of the main model, and of the first MTP module if it drafts."""
        if self.lease is not None:
            drafts = self._late is not None
            self.lease.publish(self.tokens, fed - len(self.model.mtp) + 1 if drafts else held, drafts)

    def _stepped(self, done: Turn) -> list[Drawn]:
        """Commits what a step brought, and counts it."""
        if done.failed:
            self._fail(done.logits[done.path[-1]] if done.logits is not None else None)
        drawn = self._take(done)
        ranks = [done.nodes[row - 1] for row in done.path[1 : len(drawn) + 1]]
        self.stats.record_step(done.depth, len(done.nodes), ranks, len(drawn))
        return drawn

    def _take(self, done: Turn) -> list[Drawn]:
        """Commits tokens one by one until the text ends; row path[j] of the logits drew token j."""
        wanted, drawn = self.sampler.params.logprobs, []
        for j, token in enumerate(done.tokens):
            logprob = None
            if wanted and done.logits is not None:
                logprob = self.sampler.logprobs(done.logits[done.path[j]], token, wanted)
            drawn.append(Drawn(token, j + 1 if j + 1 < len(done.tokens) else 0, logprob))
            self.tokens.append(token)
            if self.is_last(token):
                self.finished = True
                break
        self._publish()
        return drawn

    def _fail(self, row: Tensor | None) -> None:
        reason = "no token is left after logit_bias, or the logits hold NaN or infinity"
        if row is not None and not bool(row.isfinite().any()):
            reason = "the logits hold no finite number"
        position = len(self.tokens)
        raise MTPSpecError(
            f"no token can be drawn at position {position} or after: {reason}; check the weights, or allow more tokens"
        )


class SharedDecoder(DeviceText):
    """One of several texts, whose prompt is read and whose steps are taken by somebody else; arguments as `DeviceText`.

    Args:
        limit: most tokens that it will get.
    Attributes:
        turn: what it waits for.
        end: tokens of the prompt and of the longest text.
        waiting: rows that plain steps put aside for the MTP modules, see `device_planned`.
    """

    lease: DeviceLease

    def __init__(
        self, model: DeviceModel, prompt: Sequence[int], sampler: Sampler, is_last: Callable[[int], bool],
        lease: DeviceLease, late: int | None, limit: int,
    ) -> None:  # fmt: skip
        super().__init__(model, prompt, sampler, is_last, lease, late)
        self.turn, self.waiting, self.end = Turn(prompt=True), 1, len(prompt) + limit

    def taken(self) -> list[Drawn]:
        """Commits what the turn has brought and waits for the next one; returns the tokens."""
        turn = self.turn
        if not turn.prompt:
            return self._stepped(turn)
        if turn.failed:
            self._fail(turn.logits[0] if turn.logits is not None else None)
        self.stats.record_prefill(len(self.tokens))
        turn.prompt = False
        return self._take(turn)


@dataclass(slots=True)
class Launched:
    """A step on its way; without a GPU it is done, and there are no events."""

    step: Step
    record: Tensor
    begun: torch.cuda.Event | None
    ended: torch.cuda.Event | None


class DeviceDecoder(DeviceText):
    """One sequence being generated; arguments as for `engine.Decoder`, with the runtime for the model.

    Args:
        lease: where its caches are; None for some of its own.
        after: an earlier text with caches of its own: they become this text's if no other has used them since.
    Attributes:
        draws: whether steps draw their own tokens; `device_guided` draws them on the host.
    """

    draws = True

    def __init__(
        self,
        runtime: DeviceRuntime,
        prompt: Sequence[int],
        sampler: Sampler,
        speculation: Speculation | None,
        is_last: Callable[[int], bool],
        lease: DeviceLease | None = None,
        after: DeviceDecoder | None = None,
    ) -> None:
        super().__init__(runtime.model, prompt, sampler, is_last, lease, late_of(speculation))
        self.runtime, self.drafts = runtime, speculation is not None
        self._read = False  # whether the caches hold the prompt
        with undisturbed(), runtime.turns, self.model.ranks.together():
            left = None if after is None else after.leave()
            state = runtime.acquire(lease, None if left is None or after is None else after.state)
            self.state: State = state
            self._release = weakref.finalize(self, _free, state)
            self._user = state.user = object()
            # the modules' caches stay where this text does not draft
            self._undrafted = None if self.drafts else left
            if left is not None:
                self.stats.reused_tokens = left.shared(prompt, self.drafts)
            with state.first_slots_aside() if left is not None and self.stats.reused_tokens else nullcontext():
                self.one_step = self._prepare(speculation)
            if lease is not None and state.pages is not None:
                state.pages.copy_(lease.store.tables[lease.row])
        self._launched: deque[Launched] = deque()
        cuda = self.model.device.type == "cuda"
        size = commits.record_size(MOST)
        self._hosts = [torch.empty(1, size, dtype=torch.int32, pin_memory=cuda) for _ in range(2)]

    def _prepare(self, speculation: Speculation | None) -> Step:
        """Returns the step of this text."""
        shape = Shape.of(speculation)
        extend = 0 if speculation is None else shape.depth + 1
        acceptance = "coupled" if speculation is None else speculation.acceptance
        return self.runtime.step(self.state, shape, self.stages, extend, acceptance, self.draws)

    def leave(self) -> Left | None:
        """Gives the caches up for a text that begins alike, and this text with them; None where another text has used
        them since."""
        state, held, drafted = self.state, 0, 0
        if state.user is not self._user:
            return None
        if self._read:
            self._catch_up()
            # of what was launched, steps that nobody has looked at included; these write behind the tokens known here
            length, fed = torch.cat((state.length, state.fed)).tolist()
            held = min(length, len(self.tokens) - 1)
            drafted = fed - len(state.mtp_caches) + 1 if self.drafts else 0
            if self._undrafted is not None:
                drafted = self._undrafted.shared(self.tokens, True)
        self._release()
        state.user = None
        return Left(list(self.tokens), held, drafted, len(state.mtp_caches))

    def _catch_up(self) -> None:
        """Shows the modules what plain steps have put aside."""

    def _check_own(self) -> None:
        if not self.finished and self.state.user is not self._user:
            raise MTPSpecError("this stream was left for the one that came after it (after=), which has taken its "
                               "caches: begin it again")  # fmt: skip

    @undisturbed()
    def prefill(self) -> list[Drawn]:
        """Fills the caches with the prompt and returns the first token."""
        state, prompt, model = self.state, self.tokens, self.model
        with self.stats.phase("prefill"), self.runtime.turns:
            self._check_own()
            first, hidden = self.stats.reused_tokens, None
            state.reset(self.sampler.params, prompt, first, self._undrafted is None)
            ids = torch.tensor(prompt, dtype=torch.int64).to(model.device)
            while first < len(prompt):
                hidden = self.runtime.prefill(state, len(prompt), first, self.drafts)(ids, first)
                first += len(hidden)
            assert hidden is not None
            last = hidden[-1:]
            logits = model.logits(last)
            model.ranks.wait()
            token, failed = self._first(logits)
            drawn, length = (torch.full((1,), number, device=last.device) for number in (token, len(prompt)))
            state.start(drawn, last, length, self.stages.penalty)
        self._read = True
        self.has_read(len(prompt))
        if failed:
            self._fail(logits[0])
        self.stats.record_prefill(len(prompt))
        return self._take(Turn(True, [token], [0], logits=logits))

    def _first(self, logits: Tensor) -> tuple[int, bool]:
        """Returns the text's first token, drawn from the prompt's last row `[1, V]`, and whether there was none."""
        position = torch.full((1,), len(self.tokens), dtype=torch.int64, device=logits.device)
        request = torch.zeros(1, dtype=torch.int32, device=logits.device)
        drawn = sample(logits, request, position, self.state.settings, self.stages)
        return int(drawn.tokens[0, 0]), bool(drawn.failed[0])

    @undisturbed()
    def step(self) -> list[Drawn]:
        """Returns the tokens of the next step; the step after it is already on its way."""
        wanted = self.sampler.params.logprobs
        with self.stats.phase("step"), self.runtime.turns:
            self._check_own()
            while len(self._launched) < (1 if wanted else 2):
                self._launch()
            launched = self._launched.popleft()
            self.model.ranks.wait(launched.ended)
            count, failed, *numbers = launched.record[0].tolist()
            # another thread's step may write where they are
            logits = launched.step.logits.clone() if wanted else None
        path, shape = numbers[MOST : MOST + count], launched.step.shape
        drawn = self._stepped(Turn(False, numbers[:count], path, bool(failed), shape.ranks, shape.depth, logits))
        self._learn(launched, [row - 1 for row in path[1 : len(drawn) + 1]], len(drawn))
        return drawn

    def _launch(self) -> None:
        begun = self._mark()
        self.one_step()
        host = self._hosts[0]
        self._hosts.reverse()
        host.copy_(self.state.record, non_blocking=True)
        self._launched.append(Launched(self.one_step, host, begun, self._mark()))

    def _mark(self) -> torch.cuda.Event | None:
        if self.model.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _learn(self, launched: Launched, accepted: list[int], committed: int) -> None:
        """Takes the outcome of a step: its accepted nodes, and how many tokens it committed."""

    def _take(self, done: Turn) -> list[Drawn]:
        drawn = super()._take(done)
        if self.finished:
            self._release()
        return drawn

    def _fail(self, row: Tensor | None) -> None:
        self._release()
        self._read = False
        super()._fail(row)


def late_of(speculation: Speculation | None) -> int | None:
    """Returns how many tokens of a text, at most, its MTP modules have not seen; None where it does not draft."""
    if speculation is None:
        return None
    return 2 * MOST + (WAITING if speculation.adaptive else 0)  # of steps on their way, and put aside by plain ones


def _free(state: State) -> None:
    state.busy = False
