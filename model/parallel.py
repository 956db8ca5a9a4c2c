"""Several processes that compute one model: what they exchange, and how one that fails ends them all.

No sum is ever split: every matrix is divided by its outputs, heads by number, experts whole, and what the ranks
computed is put side by side. So a number is computed by one rank, by the arithmetic of a process alone, and the bits
are the same. Each rank then draws the same tokens from the same logits; nothing but measured times differs, and for
those the first rank's count.

Tensors go through a process group (gloo or NCCL), small ones between GPUs of one host through each other's memory, in
the order of the computation. Facts go through the group's store (`control`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mtp_spec.kernels import exchange
from mtp_spec.model import control
from mtp_spec.model.config import CheckpointError
from mtp_spec.model.control import Control, RankError

# its name since torch 2.13, and before
_all_gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class Ranks:
    """This process's place among those that compute one model.

    Args:
        rank, size: of `size` processes this is number `rank`.
        group: exchanges tensors, on the CPU in any case; None alone.
        facts: exchanges facts; None alone.
    Attributes:
        rooms: through which GPUs of one host exchange small tensors; None where the group does it all.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None, facts: Control | None = None
    ) -> None:
        self.rank, self.size, self.group, self._control = rank, size, group, facts
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
            with control.explained(self.rank, self.size):
                _all_gather(taken, given, self.group)
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
            if now - looked > control.BEAT:
                looked = now
                self._look(begin, now)
        if self.rooms is not None and int(self.rooms.lost):
            raise self._lost("an exchange between GPUs")

    def _look(self, begin: float, now: float) -> None:
        assert self._control is not None
        try:
            with control.explained(self.rank, self.size):
                for rank in range(self.size):
                    self._control.look(rank, begin)
        except RankError:
            self._give_up()
            raise
        if now - begin > control.PATIENCE:
            raise self._lost("an exchange between GPUs")

    def _lost(self, what: str) -> RankError:
        self._give_up()
        return RankError(
            f"rank {self.rank} of {self.size} waited {control.PATIENCE:.0f} s for {what}: another rank hangs or "
            "takes no part; see the output of the others"
        )

    def _give_up(self) -> None:
        """Ends what runs on the GPU and waits for a rank that does not come."""
        if self._on_gpu:
            with suppress(Exception):  # whatever is left of the group
                dist.distributed_c10d._abort_process_group(self.group)

    @property
    def _on_gpu(self) -> bool:
        return self.group is not None and torch.cuda.is_available() and "nccl" in dist.get_backend_config(self.group)

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

    def everyone(self, value: Any) -> list[Any]:
        """Returns what every rank gives, JSON values, however long that takes."""
        return [value] if self._control is None else self._control.exchange(value)

    def from_first(self, value: Any) -> Any:
        """Returns what the first rank gives, a JSON value."""
        return self.everyone(value if self.rank == 0 else None)[0]

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
            self._control.exchange(str(error) or type(error).__name__)
            raise
        for rank, message in enumerate(self._control.exchange("")):
            if message:
                self._give_up()
                raise RankError(f"rank {rank} of {self.size} failed: {message}")


ALONE = Ranks()
