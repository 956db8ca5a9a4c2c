"""Facts (JSON values) and heartbeats that ranks exchange through a shared store.

A rank is waited for as long as it sends heartbeats: loading, or waiting at a prompt, may take any time. A rank that has
died, or whose machine has, is given up.
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

# seconds: to find one another, and for an exchange; between heartbeats; without one until a rank counts as dead
PATIENCE, BEAT, SILENCE = 30.0, 2.0, 25.0
SHORT, LONG = 0.0005, 0.02  # pauses between polls of the store


@dataclass(slots=True)
class Control:
    """Exchanges facts through a shared store, where each rank also leaves heartbeats.

    Attributes:
        signs: the heartbeats, for a channel; None: in the store itself.
    """

    store: PrefixStore
    rank: int
    size: int
    signs: PrefixStore | None = None
    _count: int = 0
    _beats: dict[int, tuple[int, float]] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Starts sending heartbeats, for as long as the process lives."""
        self.store.add(f"beat/{self.rank}", 1)
        thread = threading.Thread(target=self._beat, name="mtp_spec ranks", daemon=True)
        thread.start()
        # a thread inside the store while the interpreter exits would abort the process
        atexit.register(thread.join, PATIENCE)
        atexit.register(self._stop.set)  # handlers run in reverse order of registration

    def _beat(self) -> None:
        with suppress(RuntimeError):  # the store is gone, which the others and the next exchange notice
            while not self._stop.wait(BEAT):
                self.store.add(f"beat/{self.rank}", 1)

    def channel(self, name: str) -> Control:
        """Returns a separate exchange, for example for another thread, with the same heartbeats."""
        return Control(PrefixStore(name, self.store), self.rank, self.size, self.store)

    def exchange(self, value: Any, patience: float | None = None) -> list[Any]:
        """Returns every rank's value, all of them JSON.

        Args:
            patience: seconds to wait for the others; None: as long as they are alive.

        Raises:
            RankError: a rank sent no heartbeat for `SILENCE` seconds or did not come, or the store is gone.
        """
        number, self._count = self._count, self._count + 1
        with explained(self.rank, self.size):
            self.store.set(f"{number}/{self.rank}", json.dumps(value))
            found = [self._wait(number, rank, patience) for rank in range(self.size)]
            # all ranks are here, so none still reads the previous exchange
            self.store.delete_key(f"{number - 1}/{self.rank}")
        return found

    def given(self) -> list[tuple[int, Any]]:
        """Returns the ranks that have already posted to the next exchange, with their values."""
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
        """Raises if a rank has been silent for too long since `begin`."""
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
