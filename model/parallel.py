"""Several processes that compute one model: what they exchange, and how one that fails ends them all.

No sum is ever split: every matrix is divided by its outputs, heads by number, experts whole, and what the ranks
computed is put side by side. So a number is computed by one rank, by the arithmetic of a process alone, and the bits
are the same. Each rank then draws the same tokens from the same logits; nothing but measured times differs, and for
those the first rank's count.

Two ways of exchange. Tensors go through a process group (gloo or NCCL) in the order of the computation. Facts go
through the group's store, where a rank may be waited for as long as it shows that it is alive: loading, or sitting at
a prompt, takes as long as it takes.
"""

from __future__ import annotations

import atexit
import json
import os
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mtp_spec.kernels import exchange
from mtp_spec.kernels.launching import runs_triton
from mtp_spec.model.config import CheckpointError

# seconds: to find one another, and for an exchange; between signs of life; without one until a rank counts as dead
PATIENCE, BEAT, SILENCE = 30.0, 2.0, 25.0
SHORT, LONG = 0.0005, 0.02  # pauses between looks at the store


# its name since torch 2.13, and before
_all_gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class RankError(RuntimeError):
    """Another rank failed, differs or does not answer."""


class Ranks:
    """This process's place among those that compute one model.

    Args:
        rank, size: of `size` processes this is number `rank`.
        group: exchanges tensors, on the CPU in any case; None alone.
        control: exchanges facts; None alone.
    Attributes:
        rooms: through which GPUs of one host exchange small tensors; None where the group does it all.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None, control: Control | None = None
    ) -> None:
        self.rank, self.size, self._group, self._control = rank, size, group, control
        self.rooms: exchange.Rooms | None = None

    def share(self, count: int, name: str, block: int = 1) -> int:
        """Returns this rank's part of `count` things, each rank's in whole blocks.

        Raises:
            CheckpointError: they cannot be divided.
        """
        if self.size > 1 and count % (self.size * block):
            whole = f" in whole blocks of {block}" if block > 1 else ""
            raise CheckpointError(
                f"{name} {count} cannot be divided among {self.size} ranks{whole}: start another number of them"
            )
        return count // self.size

    def own(self, count: int) -> slice:
        """Returns which of `count` things are this rank's."""
        return slice(self.rank * (count // self.size), (self.rank + 1) * (count // self.size))

    def part(self, count: int, block: int = 1, rank: int | None = None) -> range:
        """Returns which of `count` things are this rank's, or another's, in whole blocks; not all have as many."""
        blocks, number = -(-count // block), self.rank if rank is None else rank
        low, high = (min(edge * blocks // self.size * block, count) for edge in (number, number + 1))
        return range(low, high)

    def gather(self, x: Tensor) -> Tensor:
        """Returns all ranks' x `[..., n]` side by side, `[..., size * n]`."""
        return self.gather_all(x)[0]

    def gather_all(self, *tensors: Tensor) -> Any:
        """Returns a tuple of `gather` of each."""
        if self.size == 1:
            return tensors
        if self.rooms is not None and tensors[0].is_cuda and exchange.fits(tensors):
            return tuple(exchange.exchange(tensors, self.rooms))
        return tuple(self.stack(x).movedim(0, -2).flatten(-2).contiguous() for x in tensors)

    def gather_parts(self, x: Tensor, count: int, block: int) -> Tensor:
        """Returns all ranks' parts x `[..., n]`, as `part` has it, side by side, `[..., count]`."""
        sizes = [len(self.part(count, block, rank)) for rank in range(self.size)]
        if min(sizes) == max(sizes):
            return self.gather(x)
        padded = self.gather(F.pad(x, (0, max(sizes) - x.shape[-1]))).unflatten(-1, (self.size, -1)).unbind(-2)
        return torch.cat([one[..., :size] for one, size in zip(padded, sizes, strict=True)], dim=-1)

    def join(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Returns all ranks' x `[counts[rank], ...]` below one another; every rank knows all counts."""
        if self.size == 1:
            return x
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = x
        return torch.cat([part[:count] for part, count in zip(self.stack(padded), counts, strict=True)])

    def stack(self, x: Tensor) -> Tensor:
        """Returns all ranks' x `[...]` as `[size, ...]`."""
        out = x.new_empty(self.size, *x.shape)
        if x.numel():
            # as bytes: not every backend knows every type
            given, taken = (t.contiguous().flatten().view(torch.uint8) for t in (x, out))
            with _explained(self.rank, self.size):
                _all_gather(taken, given, self._group)
        return out

    def first(self, values: Sequence[float]) -> list[float]:
        """Returns the first rank's values: what was measured differs, and all must act alike."""
        if self.size == 1:
            return list(values)
        return self.stack(torch.tensor(values, dtype=torch.float64))[0].tolist()

    def wait(self, ready: torch.cuda.Event | None = None) -> None:
        """Waits until the GPU has come to an event, or to the end of its work, as long as all ranks are alive.

        Raises:
            RankError: one of them is not, or does not take part in an exchange.
        """
        if self._control is None or not self._on_gpu:
            if ready is not None:
                ready.synchronize()
            return
        if ready is None:
            ready = torch.cuda.Event()
            ready.record()
        begin = looked = time.monotonic()
        while not ready.query():
            now = time.monotonic()
            if now - looked > BEAT:
                looked = now
                self._look(begin, now)
        if self.rooms is not None and int(self.rooms.lost):
            raise self._lost("an exchange between GPUs")

    def _look(self, begin: float, now: float) -> None:
        assert self._control is not None
        try:
            with _explained(self.rank, self.size):
                for rank in range(self.size):
                    self._control.look(rank, begin)
        except RankError:
            self._give_up()
            raise
        if now - begin > PATIENCE:
            raise self._lost("an exchange between GPUs")

    def _lost(self, what: str) -> RankError:
        self._give_up()
        return RankError(
            f"rank {self.rank} of {self.size} waited {PATIENCE:.0f} s for {what}: another rank hangs or takes no part; "
            "see the output of the others"
        )

    def _give_up(self) -> None:
        """Ends what runs on the GPU and waits for a rank that does not come."""
        if self._on_gpu:
            with suppress(Exception):  # whatever is left of the group
                dist.distributed_c10d._abort_process_group(self._group)

    @property
    def _on_gpu(self) -> bool:
        return self._group is not None and torch.cuda.is_available() and "nccl" in dist.get_backend_config(self._group)

    def agree(self, facts: Mapping[str, object]) -> None:
        """Compares facts that must be the same everywhere.

        Raises:
            RankError: they are not; on every rank, with what differs.
        """
        if self._control is None:
            return
        everyone = self._control.exchange({name: str(value) for name, value in facts.items()})
        for rank, theirs in enumerate(everyone):
            for name in everyone[0]:
                if theirs.get(name) != everyone[0][name]:
                    raise RankError(
                        f"ranks differ in {name}: rank 0 has {everyone[0][name]}, rank {rank} has {theirs.get(name)}; "
                        "start all with the same program, options and files"
                    )

    def from_first(self, value: Any) -> Any:
        """Returns what the first rank gives, a JSON value, however long that takes."""
        return value if self._control is None else self._control.exchange(value if self.rank == 0 else None)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one rank fails at, all fail at: the others learn its message instead of waiting for it.

        Raises:
            RankError: on ranks that did not fail themselves.
        """
        if self._control is None:
            yield
            return
        try:
            yield
        except RankError:
            raise
        except Exception as error:
            self._control.exchange(f"{error}")
            raise
        for rank, message in enumerate(self._control.exchange("")):
            if message:
                self._give_up()
                raise RankError(f"rank {rank} of {self.size} failed: {message}")


ALONE = Ranks()


@dataclass(slots=True)
class Control:
    """Facts through a store that all ranks reach; each also leaves signs of life there."""

    store: dist.Store
    rank: int
    size: int
    _count: int = 0
    _beats: dict[int, tuple[int, float]] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Begins to leave signs of life, for as long as the process lives."""
        self.store.add(f"beat/{self.rank}", 1)
        thread = threading.Thread(target=self._beat, name="mtp_spec ranks", daemon=True)
        thread.start()
        atexit.register(lambda: (self._stop.set(), thread.join(BEAT)))

    def _beat(self) -> None:
        with suppress(RuntimeError):  # the store has gone, which the others and the next exchange notice
            while not self._stop.wait(BEAT):
                self.store.add(f"beat/{self.rank}", 1)

    def exchange(self, value: Any) -> list[Any]:
        """Returns every rank's value, all of them JSON.

        Raises:
            RankError: a rank gave no sign of life for `SILENCE` seconds, or the store is gone.
        """
        number, self._count = self._count, self._count + 1
        with _explained(self.rank, self.size):
            self.store.set(f"{number}/{self.rank}", json.dumps(value))
            found = [self._wait(number, rank) for rank in range(self.size)]
            # all are here, so none still reads the exchange before
            self.store.delete_key(f"{number - 1}/{self.rank}")
        return found

    def _wait(self, number: int, rank: int) -> Any:
        pause, begin = SHORT, time.monotonic()
        while not self.store.check([f"{number}/{rank}"]):
            self.look(rank, begin)
            time.sleep(pause)
            pause = min(2 * pause, LONG)
        return json.loads(self.store.get(f"{number}/{rank}"))

    def look(self, rank: int, begin: float) -> None:
        """Refuses to wait for a rank that has been silent since `begin` and for too long."""
        now = time.monotonic()
        beats = self.store.add(f"beat/{rank}", 0)
        if beats != self._beats.get(rank, (-1, 0.0))[0]:
            self._beats[rank] = (beats, now)
        if now - max(begin, self._beats[rank][1]) > SILENCE:
            raise RankError(
                f"rank {rank} of {self.size} gave no sign of life for {SILENCE:.0f} s, so rank {self.rank} stops: see "
                "the output of that rank's process"
            )


@contextmanager
def _explained(rank: int, size: int) -> Iterator[None]:
    try:
        yield
    except RankError:
        raise
    except RuntimeError as error:  # torch.distributed's own errors are RuntimeErrors
        raise RankError(
            f"rank {rank} of {size} lost the others: one of them ended or does not answer ({_first_line(error)}); see "
            "the output of the process that ended first"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def join_ranks(parallel: object, device: str) -> Ranks:
    """Returns this process's place among the ranks.

    Args:
        parallel: "auto": the ranks that torchrun, or whoever set RANK and WORLD_SIZE, has started; a process group of
            the caller's; None: this process alone.
        device: "cpu" or "cuda": exchanges go through gloo or NCCL.

    Raises:
        CheckpointError: no such value.
        RankError: the ranks do not find each other.
    """
    if parallel is None:
        return ALONE
    if isinstance(parallel, dist.ProcessGroup):
        return _placed(parallel)
    if parallel != "auto":
        raise CheckpointError(f'parallel={parallel!r}: "auto", None, or a torch.distributed process group')
    if not dist.is_available() or (int(os.environ.get("WORLD_SIZE", "1")) == 1 and not dist.is_initialized()):
        return ALONE
    if not dist.is_initialized():
        _start(device)
    assert dist.group.WORLD is not None
    return _placed(dist.group.WORLD)


def _start(device: str) -> None:
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, init_method="env://", timeout=timedelta(seconds=PATIENCE))
        atexit.register(_leave)
    except (RuntimeError, ValueError, KeyError) as error:
        raise RankError(
            f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} found not all others at {where} within "
            f"{PATIENCE:.0f} s ({_first_line(error)}): start all ranks, with the same MASTER_ADDR and MASTER_PORT"
        ) from error


def _leave() -> None:
    if not dist.is_initialized():
        return
    with suppress(Exception):  # the process ends in any case
        if "nccl" in dist.get_backend_config():
            dist.distributed_c10d._abort_process_group()  # destroying would wait for graphs that are still held
        else:
            dist.destroy_process_group()


def local_device(device: str, ranks: Ranks) -> str:
    """Returns this rank's device: of several GPUs the one of its number on this machine.

    Raises:
        CheckpointError: there are fewer GPUs than ranks.
    """
    if ranks.size == 1 or device != "cuda":
        return device
    number, there = int(os.environ.get("LOCAL_RANK", ranks.rank)), torch.cuda.device_count()
    if number >= there:
        raise CheckpointError(f"rank {ranks.rank} is to use GPU {number} and this machine has {there}: start fewer")
    torch.cuda.set_device(number)
    return f"cuda:{number}"


def open_rooms(ranks: Ranks, device: str) -> None:
    """Lets GPUs that reach one another's memory exchange small tensors there; otherwise the group goes on doing it."""
    if ranks.size == 1 or not device.startswith("cuda") or not runs_triton(torch.empty(0, device=device)):
        return
    assert ranks._control is not None
    failure, words = "", exchange.room_words(ranks.size)
    try:
        import torch.distributed._symmetric_memory as symmetric

        room = symmetric.empty(words, dtype=torch.int32, device=torch.device(device)).zero_()
        torch.cuda.synchronize()
        handle = symmetric.rendezvous(room, ranks._group)
        addresses = torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device)
    except (RuntimeError, ImportError, AttributeError, TypeError) as error:
        failure = _first_line(error) or type(error).__name__
    failures = [one for one in ranks._control.exchange(failure) if one]
    if failures:
        warnings.warn(f"GPUs exchange through NCCL, which is slower: {failures[0]}", stacklevel=2)
        return
    turns = torch.zeros(exchange.PROGRAMS, dtype=torch.int32, device=device)
    lost = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    ranks.rooms = exchange.Rooms(ranks.rank, addresses, turns, lost)
    _held.append((room, handle))


_held: list[Any] = []  # rooms live as long as the process


_places: dict[dist.ProcessGroup, Ranks] = {}


def _placed(group: dist.ProcessGroup) -> Ranks:
    """Returns the place in a group, one object for each group."""
    if group.size() == 1:
        return ALONE
    if group not in _places:
        rank, size = group.rank(), group.size()
        members = "-".join(str(member) for member in dist.get_process_group_ranks(group))
        store = dist.PrefixStore(f"mtp_spec/{members}", dist.distributed_c10d._get_default_store())
        control = Control(store, rank, size)
        control.start()
        _places[group] = Ranks(rank, size, group, control)
    return _places[group]
