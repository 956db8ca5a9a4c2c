"""The state on the device that one sequence, or a batch, keeps from step to step."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtp_spec.kernels import commit as commits
from mtp_spec.kernels.mla import Cache
from mtp_spec.kernels.sampler import COLUMNS, IN_PROMPT, Settings, Stages, seed_bits, settings_row
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.sampling.params import SamplingParams
from mtp_spec.speculation import LONGEST_CHAIN, MAX_NODES

ROWS = MAX_NODES + 1
MOST = LONGEST_CHAIN + 1  # tokens of a step
# sizes of prefill passes; the last chunk takes the smallest that holds it
PREFILL_ROWS = (16, 64, 256)
# most undrafted tokens queued for the MTP modules, in adaptive speculation only
WAITING = 128
MAIL = 8  # most transfers in flight at once
# slots for two steps that run before the host has decided to stop, and for padded passes when modules catch up
SLACK = 2 * MOST + max(ROWS, WAITING)
# slots that work may write to while it is captured or timed on a sequence of one token
WORK_ROWS = ROWS + WAITING
# names of the tensors that hold a row for every sequence; settings are kept separately
KEPT = ("length", "begun", "hidden", "fed", "ring", "ring_tokens", "carried", "path", "tokens", "record", "drawn")


class State:
    """Caches, tokens of the last step and sampling parameters of B sequences.

    Args:
        tokens: most tokens of prompt and generated text.
        caches: of all layers and the MTP modules, with room for `tokens` and `SLACK`; allocated here if not given.
        pages: `[B, P]` int32, where in the caches each sequence's slots are (`kernels.mla.Plan`); None for a single
            sequence that has the caches to itself.
    Attributes:
        length: `[B]` int32, committed slots of the main model; a module's cache has one fewer for each module before.
        begun: `[B]` int32, slots that were filled by an earlier sequence, in every cache: they are not written to.
        user: the owner of the sequence in the caches.
        hidden: `[B, ROWS, D]` of the last pass.
        path: `[B, MOST]` of the last step, see `kernels.commit.accept`.
        tokens: `[B, MOST]`, likewise.
        record: likewise.
        drawn: `[B]` int64, number of random numbers that a rule has used, see `cuda.rules`.
        fed: `[B]` int32, slots of the main model that the modules have processed, in adaptive speculation.
        ring: `[B, WAITING, D]`, rows of plain steps, see `kernels.commit.keep`.
        ring_tokens: `[B, WAITING]` int64, their tokens.
        carried: `[B, modules - 1, D]`, each module's output at its last slot, which the next module has not seen.
        live: `[B]` int32, 0 for an unused slot, which does not advance; None if all are in use.
        logits: buffer for the logits of a group's steps; None if each step has its own.
        script: `[B, RING]` int64, the token that other drafters expect at a position, modulo RING, -1 for none
            (`cuda.script`). None if only the modules draft.
        replayed: `[B, S, MAX_DEPTH]` int64, what replaces the modules' drafts after the root at a position, -1 for
            nothing (`drafting.Replay`). None if nothing does.
    """

    def __init__(
        self, model: DeviceModel, tokens: int, caches: list[Cache] | None = None, pages: Tensor | None = None
    ) -> None:
        config, device = model.config, model.device
        held = model.new_caches(tokens + SLACK, ROWS) if caches is None else caches
        self.caches, self.mtp_caches = held[: config.num_hidden_layers], held[config.num_hidden_layers :]
        self.store, self.pages = held[0].store, pages
        self.live: Tensor | None = None
        self.logits: Tensor | None = None
        self.script: Tensor | None = None
        self.replayed: Tensor | None = None
        model.table(held[0].capacity + MOST)
        sequences, width = 1 if pages is None else len(pages), config.hidden_size
        self.length = torch.zeros(sequences, dtype=torch.int32, device=device)
        self.hidden = torch.zeros(sequences, ROWS, width, dtype=model.activations, device=device)
        self.begun, self.fed = torch.zeros_like(self.length), torch.zeros_like(self.length)
        self.ring = self.hidden.new_zeros(sequences, WAITING, width)
        self.ring_tokens = torch.zeros(sequences, WAITING, dtype=torch.int64, device=device)
        self.carried = self.hidden.new_zeros(sequences, max(0, len(self.mtp_caches) - 1), width)
        self.path = torch.zeros(sequences, MOST, dtype=torch.int64, device=device)
        self.tokens = torch.zeros_like(self.path)
        self.record = torch.zeros(sequences, commits.record_size(MOST), dtype=torch.int32, device=device)
        vocabulary = config.vocab_size
        self.settings = Settings(
            values=torch.tensor([settings_row()], dtype=torch.float64)
            .expand(sequences, COLUMNS)
            .contiguous()
            .to(device),
            seed=torch.zeros(sequences, dtype=torch.int64, device=device),
            bias=torch.zeros(sequences, vocabulary, dtype=torch.float32, device=device),
            seen=torch.zeros(sequences, vocabulary, dtype=torch.int32, device=device),
        )
        self.drawn = torch.zeros(sequences, dtype=torch.int64, device=device)
        self._parts: dict[tuple[int, int], State] = {}
        self._held: list[Tensor] | None = None

    @property
    def sequences(self) -> int:
        """B."""
        return self.length.shape[0]

    def part(self, first: int, count: int) -> State:
        """Returns a view of the state of some of the sequences."""

        def some(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[first : first + count]

        found = self._parts.get((first, count))
        if found is not None:
            return found
        part = copy.copy(self)
        part._parts, part._held = {}, None
        for name in (*KEPT, "pages", "live", "script", "replayed"):
            setattr(part, name, some(getattr(self, name)))
        settings = self.settings
        part.settings = Settings(settings.values[first : first + count], settings.seed[first : first + count],
                                 some(settings.bias), some(settings.seen))  # fmt: skip
        self._parts[first, count] = part
        return part

    def replay(self, sequence: int, first: int, drafts: npt.NDArray[np.int64]) -> None:
        """Sets what is drafted for a sequence after slot `first` and the following ones, `[T, MAX_DEPTH]`."""
        assert self.replayed is not None
        self.replayed[sequence] = -1
        rows = min(len(drafts), self.replayed.shape[1] - first)
        self.replayed[sequence, first : first + rows] = self.sent(drafts[:rows], torch.int64)

    def reset(self, params: SamplingParams, prompt: list[int], reused: int = 0) -> None:
        """Prepares for a new sequence, the only one.

        Args:
            reused: number of its first slots that the caches already hold.
        """
        if self.pages is None:
            # old slots could hold NaN, which masks do not remove
            torch._foreach_zero_([cache.slots[reused:] for cache in (*self.caches, *self.mtp_caches)])
            self.store[self.caches[0].spare :].zero_()
        torch._foreach_zero_(self._words())
        self.begun.fill_(reused)
        settings = self.settings
        settings.values.copy_(self.sent([settings_of(params)], torch.float64))
        settings.seed.fill_(seed_bits(params.known_seed))
        assert settings.seen is not None
        self.add_bias(0, params)
        settings.seen[0, self.sent(sorted(set(prompt)), torch.int64)] = IN_PROMPT

    def add_bias(self, sequence: int, params: SamplingParams) -> None:
        """Writes a sequence's `logit_bias` into a row of zeros."""
        if params.logit_bias:
            assert self.settings.bias is not None
            ids, amounts = zip(*params.logit_bias.items(), strict=True)
            self.settings.bias[sequence, self.sent(ids, torch.int64)] = self.sent(amounts, torch.float32)

    def forget(self) -> None:
        """Zeroes the state of earlier sequences, except caches and settings."""
        torch._foreach_zero_([getattr(self, name) for name in KEPT])

    def sent(self, values: Sequence[object] | npt.NDArray[Any], dtype: torch.dtype) -> Tensor:
        """Copies values to the device asynchronously: the host does not wait for earlier work."""
        given = torch.tensor(values, dtype=dtype)
        return (
            given.pin_memory().to(self.length.device, non_blocking=True)
            if self.length.is_cuda
            else given.to(self.length.device)
        )

    def blank(self) -> None:
        """Sets every sequence to one token, for work that is captured or timed."""
        self.record.zero_()
        self.record[:, commits.COUNT] = self.record[:, commits.UNSEEN] = 1
        self.length.fill_(1)
        self.fed.zero_()
        self.begun.zero_()

    @contextmanager
    def set_aside(self, idle: Tensor) -> Iterator[None]:
        """Saves the state and restores it after work is captured or timed on it.

        Args:
            idle: `[P]` int32, pages that the work may write to.
        """
        names = [name for name in (*KEPT, "pages") if getattr(self, name) is not None]
        held = {name: getattr(self, name).clone() for name in names}
        seen = None if self.settings.seen is None else self.settings.seen.clone()
        try:
            if self.pages is not None:
                self.pages.copy_(idle)
            self.blank()
            yield
        finally:
            for name, kept in held.items():
                getattr(self, name).copy_(kept)
            if self.settings.seen is not None and seen is not None:
                self.settings.seen.copy_(seen)

    def blank_unused(self) -> None:
        """Does the same for unused slots only."""
        assert self.live is not None
        unused = self.live == 0
        self.record.masked_fill_(unused[:, None], 0)
        for column in (commits.COUNT, commits.UNSEEN):
            self.record[:, column].masked_fill_(unused, 1)
        self.length.masked_fill_(unused, 1)
        self.fed.masked_fill_(unused, 0)
        self.begun.masked_fill_(unused, 0)

    def _words(self) -> list[Tensor]:
        """Returns what is held of every sequence, except its pages, as int32: one kernel copies tensors of one type."""
        if self._held is None:
            settings = self.settings
            parts = [
                *(getattr(self, name) for name in KEPT),
                settings.values,
                settings.seed,
                settings.bias,
                settings.seen,
            ]
            self._held = [part.view(torch.int32) for part in parts if part is not None and part.numel()]
        return self._held

    def start(self, token: Tensor, hidden: Tensor, length: Tensor, seen: bool) -> None:
        """Starts decoding from first tokens `[B]` int64, drawn from the last hidden states `[B, D]` of prompts of
        `length` `[B]` int64 tokens."""
        sequence, place = torch.arange(self.sequences, device=length.device), (length - 1) % WAITING
        self.length.copy_(length)
        self.fed.copy_(length - 1)  # the modules process a token once the next one is known
        self.hidden[:, 0] = self.ring[sequence, place] = hidden  # as a plain step would leave it
        self.path.zero_()
        self.tokens[:] = token[:, None]
        self.ring_tokens[sequence, place] = token
        self.record.zero_()
        self.record[:, commits.COUNT] = self.record[:, commits.UNSEEN] = 1
        if seen and self.settings.seen is not None:
            self.settings.seen.scatter_add_(1, token[:, None], torch.ones_like(token, dtype=torch.int32)[:, None])


def settings_of(params: SamplingParams) -> list[float]:
    """Returns a request's row of `Settings.values`."""
    return settings_row(params.temperature, params.top_k, params.top_p, params.min_p, params.repetition_penalty,
                        params.presence_penalty, params.frequency_penalty)  # fmt: skip


def prefill_rows(left: int) -> int:
    """Returns the rows of the next prefill pass when `left` tokens of the prompt are left."""
    return next((size for size in PREFILL_ROWS if left <= size), PREFILL_ROWS[-1])


def stages_of(params: SamplingParams) -> Stages:
    """Returns the sampling stages that a request needs; unneeded ones would cost time in a captured step."""
    noise = params.temperature > 0
    penalised = (params.repetition_penalty != 1.0, params.presence_penalty != 0.0, params.frequency_penalty != 0.0)
    return Stages(
        bias=bool(params.logit_bias), penalty=any(penalised), noise=noise, top_k=noise and params.top_k > 0,
        top_p=noise and params.top_p < 1.0, min_p=noise and params.min_p > 0,
    )  # fmt: skip


def copy_states(targets: Sequence[State], sources: Sequence[State]) -> None:
    """Copies states, except their pages, to others with as many sequences, in one call: this runs between steps."""
    torch._foreach_copy_([words for state in targets for words in state._words()],
                         [words for state in sources for words in state._words()])  # fmt: skip


class Mail:
    """Sends numbers to the device through pinned buffers, so that the host does not wait.

    Args:
        numbers: most numbers in one `send`.
    """

    def __init__(self, numbers: int, device: torch.device) -> None:
        self._cuda, self._free = device.type == "cuda", deque[tuple[Tensor, torch.cuda.Event]]()
        if self._cuda:
            room = torch.empty(MAIL, numbers, dtype=torch.int64, pin_memory=True)
            self._free.extend((part, torch.cuda.Event()) for part in room)

    def send(self, target: Tensor, numbers: Sequence[Sequence[int]] | npt.NDArray[np.int64]) -> None:
        """Copies as many integers as `target`, int64 of any shape, holds."""
        values = torch.from_numpy(np.asarray(numbers, dtype=np.int64)).view(target.shape)
        if not self._cuda:
            target.copy_(values)
            return
        room, arrived = self._free.popleft()
        arrived.synchronize()
        waiting = room[: values.numel()].view(values.shape)
        waiting.copy_(values)
        target.copy_(waiting, non_blocking=True)
        arrived.record()
        self._free.append((room, arrived))


def union(stages: Collection[Stages]) -> Stages:
    """Returns the sampling stages that any sequence needs: they have no effect on the others."""
    return Stages(**{one.name: any(getattr(its, one.name) for its in stages) for one in fields(Stages)})
