"""Facts that ranks exchange beside their tensors, and signs of life, through a store that all of them reach.

A rank may be waited for as long as it shows that it is alive: loading, or sitting at a prompt, takes as long as it
takes. One that has died, or whose machine has, is given up.
"""

from __future__ import annotations

import atexit
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from torch._C._distributed_c10d import PrefixStore

from mtp_spec.model.errors import RankError

# seconds: to find one another, and for an exchange; between signs of life; without one until a rank counts as dead
PATIENCE, BEAT, SILENCE = 30.0, 2.0, 25.0
SHORT, LONG = 0.0005, 0.02  # pauses between looks at the store


@dataclass(slots=True)
class Control:
    """Facts through a store that all ranks reach; each also leaves signs of life there.

    Attributes:
        signs: where those are, for a channel; None: in the store itself.
    """

    store: PrefixStore
    rank: int
    size: int
    signs: PrefixStore | None = None
    _count: int = 0
    _beats: dict[int, tuple[int, float]] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Begins to leave signs of life, for as long as the process lives."""
        self.store.add(f"beat/{self.rank}", 1)
        thread = threading.Thread(target=self._beat, name="mtp_spec ranks", daemon=True)
        thread.start()
        # a thread inside the store while the interpreter ends would end the process
        atexit.register(thread.join, PATIENCE)
        atexit.register(self._stop.set)  # the last to be registered is the first to be called

    def _beat(self) -> None:
        with suppress(RuntimeError):  # the store has gone, which the others and the next exchange notice
            while not self._stop.wait(BEAT):
                self.store.add(f"beat/{self.rank}", 1)

    def channel(self, name: str) -> Control:
        """Returns exchanges of their own, such as another thread's, beside the same signs of life."""
        return Control(PrefixStore(name, self.store), self.rank, self.size, self.store)

    def exchange(self, value: Any, patience: float | None = None) -> list[Any]:
        """Returns every rank's value, all of them JSON.

        Args:
            patience: seconds to wait for the others; None: as long as they are alive.

        Raises:
            RankError: a rank gave no sign of life for `SILENCE` seconds or did not come, or the store is gone.
        """
        number, self._count = self._count, self._count + 1
        with explained(self.rank, self.size):
            self.store.set(f"{number}/{self.rank}", json.dumps(value))
            found = [self._wait(number, rank, patience) for rank in range(self.size)]
            # all are here, so none still reads the exchange before
            self.store.delete_key(f"{number - 1}/{self.rank}")
        return found

    def given(self) -> list[tuple[int, Any]]:
        """Returns which ranks have come to the next exchange already, and with what."""
        with explained(self.rank, self.size):
            return [(rank, json.loads(self.store.get(f"{self._count}/{rank}"))) for rank in range(self.size)
                    if self.store.check([f"{self._count}/{rank}"])]  # fmt: skip

    def _wait(self, number: int, rank: int, patience: float | None) -> Any:
        pause, begin = SHORT, time.monotonic()
        while not self.store.check([f"{number}/{rank}"]):
            self.look(rank, begin)
            if patience is not None and time.monotonic() - begin > patience:
                raise RankError(f"rank {self.rank} of {self.size} waited {patience:.0f} s for rank {rank} in vain")
            time.sleep(pause)
            pause = min(2 * pause, LONG)
        return json.loads(self.store.get(f"{number}/{rank}"))

    def look(self, rank: int, begin: float) -> None:
        """Refuses to wait for a rank that has been silent since `begin` and for too long."""
        now = time.monotonic()
        beats = (self.signs or self.store).add(f"beat/{rank}", 0)
        if beats != self._beats.get(rank, (-1, 0.0))[0]:
            self._beats[rank] = (beats, now)
        if now - max(begin, self._beats[rank][1]) > SILENCE:
            raise RankError(
                f"rank {rank} of {self.size} gave no sign of life for {SILENCE:.0f} s, so rank {self.rank} stops: see "
                "the output of that rank's process"
            )


@contextmanager
def explained(rank: int, size: int) -> Iterator[None]:
    """Turns errors of torch.distributed into a `RankError`."""
    try:
        yield
    except RankError:
        raise
    except RuntimeError as error:  # torch.distributed's own errors are RuntimeErrors
        raise RankError(
            f"rank {rank} of {size} lost the others: one of them ended or does not answer ({first_line(error)}); see "
            "the output of the process that ended first"
        ) from error


def first_line(error: Exception) -> str:
    """Returns the first line of a message."""
    return str(error).strip().split("\n")[0]
