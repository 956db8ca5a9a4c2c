"""Ranks, the processes that share a model: what they exchange, and how a failure of one ends them all.

No sum is ever split: every matrix is divided by its outputs, heads by number, experts whole, and the ranks' results are
concatenated. So each number is computed by one rank, with the arithmetic of a single process, and the bits are the
same. Each rank then draws the same tokens from the same logits. Only measured times differ, so the first rank's are
used.

Tensors go through a process group (gloo or NCCL), or, if small and between GPUs of one host, through each other's
memory, in the order of the computation. Facts (JSON values) go through the group's store (`Control`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from threading import local
from typing import Any, Protocol
from weakref import WeakSet

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mtp_spec.kernels import exchange
from mtp_spec.model.distributed import store as control
from mtp_spec.model.distributed.store import Control
from mtp_spec.model.errors import CheckpointError, RankError

FAILED = "failed"  # sent by a rank in place of the expected value

# renamed in torch 2.13
_all_gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class User(Protocol):
    """An object that computes in its own thread."""

    def rest(self) -> None:
        """Waits until no work is left."""
        ...


class Ranks:
    """This process's place among the ranks that share a model.

    Args:
        rank: number of this process.
        size: number of processes.
        group: exchanges tensors, on the CPU in any case; None for a single process.
        facts: exchanges facts; None for a single process.
    Attributes:
        rooms: memory through which GPUs of one host exchange small tensors; None if the group does it all.
        users: objects that compute with these ranks in their own threads, in turn.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None, facts: Control | None = None
    ) -> None:
        self.rank, self.size, self.group, self._facts = rank, size, group, facts
        self.rooms: exchange.Rooms | None = None
        self.users = WeakSet[User]()
        self._here, self._channels, self._places = local(), 0, 0

    @property
    def _control(self) -> Control | None:
        """This thread's exchange of facts."""
        control: Control | None = getattr(self._here, "channel", self._facts)
        return control

    def place(self) -> int:
        """Returns the next number of a shared model; all ranks load models in the same order."""
        self._places += 1
        return self._places

    def rest(self, beside: User | None = None) -> None:
        """Waits until no user other than `beside` computes in its thread: exchanges of two would mix."""
        for user in [user for user in self.users if user is not beside]:
            user.rest()

    def channel(self) -> Control | None:
        """Returns an exchange of facts for another thread, created in the same order on all ranks; None if alone."""
        self._channels += 1
        return None if self._facts is None else self._facts.channel(f"channel {self._channels}")

    @contextmanager
    def on(self, channel: Control | None) -> Iterator[None]:
        """Makes this thread exchange facts on `channel`, so that they do not mix with another thread's."""
        self._here.channel = channel
        try:
            yield
        finally:
            del self._here.channel

    def share(self, count: int, name: str, block: int = 1) -> int:
        """Returns this rank's share of `count` items, in whole blocks for each rank.

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
        """Returns which of `count` items belong to this rank."""
        return slice(self.rank * (count // self.size), (self.rank + 1) * (count // self.size))

    def part(self, count: int, block: int = 1, rank: int | None = None) -> range:
        """Returns which of `count` items belong to a rank (default: this one), in whole blocks; shares may differ."""
        blocks, number = -(-count // block), self.rank if rank is None else rank
        low, high = (min(edge * blocks // self.size * block, count) for edge in (number, number + 1))
        return range(low, high)

    def gather(self, x: Tensor) -> Tensor:
        """Returns all ranks' x `[..., n]` concatenated, `[..., size * n]`."""
        return self.gather_all(x)[0]

    def gather_all(self, *tensors: Tensor) -> Any:
        """Returns a tuple of `gather` of each."""
        if self.size == 1:
            return tensors
        if self.rooms is not None and tensors[0].is_cuda and exchange.fits(tensors):
            return tuple(exchange.exchange(tensors, self.rooms))
        return tuple(self.stack(x).movedim(0, -2).flatten(-2).contiguous() for x in tensors)

    def gather_parts(self, x: Tensor, count: int, block: int) -> Tensor:
        """Returns all ranks' parts x `[..., n]`, as `part` divides them, concatenated, `[..., count]`."""
        sizes = [len(self.part(count, block, rank)) for rank in range(self.size)]
        if min(sizes) == max(sizes):
            return self.gather(x)
        padded = self.gather(F.pad(x, (0, max(sizes) - x.shape[-1]))).unflatten(-1, (self.size, -1)).unbind(-2)
        return torch.cat([one[..., :size] for one, size in zip(padded, sizes, strict=True)], dim=-1)

    def join(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Returns all ranks' x `[counts[rank], ...]` concatenated along the first axis; every rank knows all counts."""
        if self.size == 1:
            return x
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = x
        return torch.cat([part[:count] for part, count in zip(self.stack(padded), counts, strict=True)])

    def stack(self, x: Tensor) -> Tensor:
        """Returns all ranks' x `[...]` as `[size, ...]`."""
        out = x.new_empty(self.size, *x.shape)
        if x.numel():
            # as bytes: not every backend supports every type
            given, taken = (t.contiguous().flatten().view(torch.uint8) for t in (x, out))
            with self._explained():
                _all_gather(taken, given, self.group)
        return out

    def first(self, values: Sequence[float]) -> list[float]:
        """Returns the first rank's values, equally many on every rank: measurements differ, and all must act alike."""
        if self.size == 1 or not values:
            return list(values)
        told = torch.tensor(values, dtype=torch.float64)
        with self._explained():
            dist.broadcast(told, group=self.group, group_src=0)
        return told.tolist()

    def wait(self, ready: torch.cuda.Event | None = None) -> None:
        """Waits until the GPU has reached an event, or finished its work, as long as all ranks are alive.

        Raises:
            RankError: a rank has died, or does not take part in an exchange.
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
            if now - looked > control.BEAT:
                looked = now
                self._look(begin, now)
        if self.rooms is not None and int(self.rooms.lost):
            raise self._lost("an exchange between GPUs")

    def _look(self, begin: float, now: float) -> None:
        assert self._control is not None
        try:
            with self._explained():
                for rank in range(self.size):
                    self._control.look(rank, begin)
                self._listen()
        except RankError:
            self._give_up()
            raise
        if now - begin > control.PATIENCE:
            raise self._lost("an exchange between GPUs")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns errors of torch.distributed into a `RankError` that includes the reason a failed rank gave."""
        try:
            with control.explained(self.rank, self.size):
                yield
        except RankError:
            self._listen()
            raise

    def _listen(self) -> None:
        """Raises the error that a failed rank reported."""
        given = list[tuple[int, Any]]()
        with suppress(RankError):  # the store is gone too
            given = [] if self._control is None else self._control.given()
        self._check(given)

    def _check(self, given: Iterable[tuple[int, Any]]) -> None:
        for rank, value in given:
            if isinstance(value, dict) and FAILED in value:
                self._give_up()
                raise RankError(f"rank {rank} of {self.size} failed: {value[FAILED]}")

    def _lost(self, what: str) -> RankError:
        self._give_up()
        return RankError(
            f"rank {self.rank} of {self.size} waited {control.PATIENCE:.0f} s for {what}: another rank hangs or "
            "takes no part; see the output of the others"
        )

    def _give_up(self) -> None:
        """Aborts GPU work that waits for a missing rank."""
        if self._on_gpu:
            with suppress(Exception):  # the group may be partly gone
                dist.distributed_c10d._abort_process_group(self.group)

    @cached_property
    def _on_gpu(self) -> bool:
        """Whether the group's exchanges run on GPUs; cached, because an aborted group cannot be asked."""
        return self.group is not None and torch.cuda.is_available() and "nccl" in dist.get_backend_config(self.group)

    def agree(self, facts: Mapping[str, object]) -> None:
        """Checks that facts are the same on all ranks.

        Raises:
            RankError: they differ; on every rank, naming what differs.
        """
        everyone = self.everyone({name: str(value) for name, value in facts.items()})
        first = everyone[0]
        for rank, theirs in enumerate(everyone):
            for name in first:
                if theirs.get(name) != first[name]:
                    raise RankError(
                        f"ranks differ in {name}: rank 0 has {first[name]}, rank {rank} has {theirs.get(name)}; "
                        "start all with the same program, options and files"
                    )

    def everyone(self, value: Any, patience: float | None = None) -> list[Any]:
        """Returns every rank's JSON value; waits as long as needed, or at most `patience` seconds."""
        if self._control is None:
            return [value]
        everyone = self._control.exchange(value, patience)
        self._check(enumerate(everyone))
        return everyone

    def from_first(self, value: Any) -> Any:
        """Returns the first rank's JSON value."""
        return self.everyone(value if self.rank == 0 else None)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """If one rank fails in the block, all fail: the others get its message instead of waiting for it.

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
            self._control.exchange({FAILED: _words(error)})
            raise
        self.everyone("")

    def fail_alike(self, where: str, error: BaseException) -> None:
        """Returns if all ranks failed at the same place with the same kind of error, so that all can go on.

        Raises:
            RankError: other ranks did not, or can no longer work together; raised on all ranks.
        """
        if self._control is None:
            return
        if isinstance(error, RankError):
            raise error
        mine = {FAILED: f"{where}: {_words(error)}", "kind": [where, type(error).__name__]}
        theirs = list[Any]()
        with suppress(RankError):  # they wait for this one elsewhere, or have ended
            theirs = self._control.exchange(mine, control.PATIENCE)
        if not theirs or any(not isinstance(one, dict) or one.get("kind") != mine["kind"] for one in theirs):
            self._give_up()
            raise RankError(f"rank {self.rank} of {self.size} failed: {mine[FAILED]}") from error


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__


ALONE = Ranks()
