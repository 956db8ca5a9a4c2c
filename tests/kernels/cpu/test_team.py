"""The CPU engine's helpers: any number of threads, of callers and of processes gives the same text, and none waits."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cpu_models import all_equal, child_of, digest, ids_of, prompt, random_model, random_tree, scenario, text
from mtp_spec.kernels.cpu.engine import why_not
from mtp_spec.kernels.cpu.team import TEAM
from mtp_spec.model.cpu.model import CPUModel
from mtp_spec.model.cpu.room import Rooms
from mtp_spec.model.distributed.group import Ranks
from places import SUPPORT

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def is_free() -> bool:
    """Whether another thread could call the helpers."""
    found: list[bool] = []

    def look() -> None:
        found.append(TEAM._lock.acquire(blocking=False))
        if found[0]:
            TEAM._lock.release()

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found[0]


def steps(model: CPUModel) -> list[Tensor]:
    """Small passes of few and many phases in turn, and heads between them."""
    cache, hidden = prompt(model, ids_of(30))
    out = [hidden]
    for count in (1, 2, 7, 17):
        rows = model.rows(ids_of(count), cache, random_tree(count, count))
        out += rows, model.logits(rows)
    return out


def test_many_passes_by_three_threads() -> None:
    model = random_model()
    torch.set_num_threads(1)
    expected = steps(model)
    for turn in range(150):
        torch.set_num_threads(2 + turn % 2)
        assert all_equal(steps(model), expected)
    assert len(TEAM._helpers) >= 2


def test_helpers_take_part() -> None:
    """Or nobody: while one call has the helpers, another works alone."""
    before = len(TEAM._helpers)
    with TEAM.called(3) as able:
        assert able == 3
        assert not is_free()
        with TEAM.called(3) as other:
            assert other == 1
    assert is_free()
    assert len(TEAM._helpers) == max(2, before)


def test_models_in_turn() -> None:
    """A pass may follow one of another model: helpers that are late must not take the one for the other."""
    kinds = ("v3", "halves, two modules", "v2", "no shared expert")
    models = [random_model(kind) for kind in kinds]
    torch.set_num_threads(1)
    expected = [steps(model) for model in models]
    torch.set_num_threads(3)
    for _ in range(30):
        assert all(all_equal(steps(model), wanted) for model, wanted in zip(models, expected, strict=True))


def test_two_threads_with_one_model() -> None:
    model = random_model()
    expected = steps(model)
    failures: list[str] = []

    def work() -> None:
        torch.set_num_threads(3)
        for _ in range(40):
            if not all_equal(steps(model), expected):
                failures.append(threading.current_thread().name)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_deleting_models_while_helpers_idle() -> None:
    expected = steps(random_model())
    for _ in range(15):
        model = random_model()
        assert all_equal(steps(model), expected)
        found = weakref.ref(model)
        del model
        assert found() is None


def test_a_model_in_a_cycle_is_collected_while_the_team_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python may collect a model at any allocation, so also at those between `called` and the engine's call."""
    waited: list[str] = []

    class Watched:
        """The team's lock; it says so where a thread would wait for itself for ever."""

        def __init__(self) -> None:
            self._lock = type(TEAM._lock)()

        def acquire(self, blocking: bool = True) -> bool:
            got = self._lock.acquire(blocking=False)
            if not got and blocking:
                waited.append("for itself")
                raise RuntimeError("deadlock")
            return got

        def release(self) -> None:
            self._lock.release()

        def __enter__(self) -> bool:
            return self.acquire()

        def __exit__(self, *_: object) -> None:
            self.release()

    model: Any = random_model()
    model.itself = model
    steps(model)
    gc.collect()
    monkeypatch.setattr(TEAM, "_lock", Watched())
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    monkeypatch.setattr(sys, "excepthook", lambda *_: None)
    with TEAM.called(3):
        del model
        gc.collect()
    assert not waited


def test_an_interrupt_while_the_lock_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has no way to take a lock and to be sure to give it back: the thread that has it can go on at least."""

    class Interrupted:
        """A lock, with Ctrl-C just when it has been taken."""

        def __init__(self) -> None:
            self._lock, self._first = threading.RLock(), True
            self.release = self._lock.release

        def acquire(self, blocking: bool = True) -> bool:
            taken = self._lock.acquire(blocking)
            if self._first:
                self._first = False
                raise KeyboardInterrupt
            return taken

        def __enter__(self) -> bool:
            return self._lock.__enter__()

        def __exit__(self, *error: object) -> None:
            self._lock.release()

    monkeypatch.setattr(TEAM, "_lock", Interrupted())
    with pytest.raises(KeyboardInterrupt), TEAM.called(3):
        pass
    with TEAM.called(3) as threads:
        assert threads == 3
    TEAM.release()


# processes


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_a_child_process(way: str) -> None:
    if way not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {way}")
    model = random_model()
    expected = text(model), digest(scenario(model))
    context = multiprocessing.get_context(way)
    receiver, sender = context.Pipe(duplex=False)
    child: Any = context.Process(target=child_of, args=(sender, model if way == "fork" else None))  # type: ignore[attr-defined]
    child.start()
    sender.close()
    got, helpers, numbers = receiver.recv()
    assert (got, numbers) == expected
    assert helpers >= 2  # of its own
    assert text(model) == expected[0]  # the parent's own still help it
    child.join()
    assert child.exitcode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_memory_is_found_without_threads_that_a_fork_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the parent's other thread has the model's memory in use at the fork, the child has to find some."""

    def parallel(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("torch divides large fills over OpenMP's threads")

    model = random_model()
    expected = steps(model)
    model._rooms._free.clear()
    model._head_rooms._free.clear()
    monkeypatch.setattr("mtp_spec.model.cpu.room.torch.zeros", parallel)
    assert all_equal(steps(model), expected)


def test_a_room_is_one_calls_and_is_kept_unless_that_failed() -> None:
    asked: list[tuple[int, int, int]] = []

    def floats(*sizes: int) -> int:
        asked.append(sizes)
        return sum(sizes)

    rooms = Rooms(floats, step=4)
    with rooms.lent(2, 5, 1) as one, rooms.lent(2, 5, 1) as two:
        assert one is not two
        assert one.memory.numel() == 2 + 8 + 1
    with rooms.lent(1, 8, 1) as again:
        assert again in (one, two)
        assert asked == [(2, 8, 1)] * 2
        with rooms.lent(1, 9, 3) as larger:  # in place of the other, and for all that it was for
            assert asked[2:] == [(2, 12, 3)]
    with pytest.raises(RuntimeError, match="in the middle"), rooms.lent(1, 1, 1) as failed:
        raise RuntimeError("in the middle")
    assert failed is again
    with rooms.lent(1, 1, 1) as left, rooms.lent(1, 1, 1) as new:
        assert left is larger
        assert new is not failed


def test_what_a_failed_exchange_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that ended in the middle does not give its room back; a head's exchange comes after the engine's call."""
    model = random_model()
    cache, _ = prompt(model, ids_of(9))
    hidden = torch.zeros(1, model.config.hidden_size)
    model.logits(hidden)
    kinds = model._rooms, model._head_rooms
    assert [len(rooms._free) for rooms in kinds] == [1, 1]

    def silent(*_: Any) -> Tensor:
        raise OSError("no answer")

    monkeypatch.setattr(model, "ranks", Ranks(0, 2))
    monkeypatch.setattr(Ranks, "gather_parts", silent)
    for call in (lambda: model.rows([1], cache, [-1]), lambda: model.logits(hidden)):
        with pytest.raises(OSError, match="no answer"):
            call()
    assert [len(rooms._free) for rooms in kinds] == [0, 1]


PROGRAM = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from cpu_models import digest, random_model, scenario
torch.set_num_threads(3)
model = random_model()
print("ready", flush=True)
for _ in range(10):
    print(digest(scenario(model)), flush=True)
"""


def test_two_processes_beside_each_other() -> None:
    command = [sys.executable, "-c", PROGRAM, str(SUPPORT)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0].split() for process in both]
    expected = digest(scenario(random_model()))
    assert [process.returncode for process in both] == [0, 0]
    assert outputs == [["ready", *[expected] * 10]] * 2


def test_interrupted_texts_leave_a_model_that_works() -> None:
    model = random_model()
    expected = text(model)
    for delay in (0.0, 0.001, 0.003, 0.01, 0.02, 0.05):
        timer = threading.Timer(delay, signal.raise_signal, (signal.SIGINT,))
        interrupted = False
        try:
            timer.start()
            for _ in range(10_000):
                text(model)
        except KeyboardInterrupt:
            interrupted = True
        timer.join()
        assert interrupted
        assert text(model) == expected
        assert is_free()
