"""The thread that runs a scheduler for submitted sequences, and the queue in front of it.

If several processes share a model, each has such a thread, every sequence goes through it, and all ranks run the same
rounds. The first rank decides: before a round it sends the others one small message with the number of new sequences,
those that were cancelled and the times that it measured. The others, which were given the same requests in the same
order, follow it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mtp_spec.cpu import openmp
from mtp_spec.errors import MTPSpecError
from mtp_spec.handle import Handle
from mtp_spec.model.distributed import store as control
from mtp_spec.model.distributed.group import Ranks
from mtp_spec.model.errors import RankError
from mtp_spec.model.undisturbed import undisturbed
from mtp_spec.scheduler import Scheduler
from mtp_spec.sequence import Sequence
from mtp_spec.step import Runner


@dataclass(frozen=True, slots=True)
class Submitted:
    """A sequence and the handle of its caller."""

    sequence: Sequence
    handle: Handle


@dataclass(frozen=True, slots=True)
class Call:
    """Other work with the model between two rounds, and the future for its result."""

    work: Callable[[], Any]
    result: Future[Any]


class Worker:
    """The thread of a scheduler.

    Args:
        runner: of the model; only callers hold the model, so that the thread ends once nothing refers to the model.
        max_batch: most sequences that run at a time; others wait.
        ranks: those that share the model; each creates its worker at the same point of the program.
    """

    def __init__(self, runner: Runner, max_batch: int, ranks: Ranks) -> None:
        self.runner, self._ranks, self._channel = runner, ranks, ranks.channel()
        self.scheduler = Scheduler(runner, max_batch)
        self._inbox, self._texts = deque[Submitted | Call](), dict[int, Submitted]()  # texts by number
        self._cancelled = deque[Sequence]()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed, self._resting = False, True
        self._error: BaseException | None = None
        self._threads, self._device = 1, -1
        # what has come so far, and what of it the thread has taken out of the inbox
        self._arrived = self._taken = 0

    def submit(self, sequences: Seq[Sequence], owner: object) -> list[Handle]:
        """Puts sequences in the queue, all at once.

        Raises:
            MTPSpecError: the worker was closed, or a sequence would not fit even if it ran alone.
            RankError: another rank has failed.
        """
        for sequence in sequences:
            self.runner.check(sequence.request)
        handles = [
            Handle(owner, sequence.log, partial(self._cancelled.append, sequence), self._inside)
            for sequence in sequences
        ]
        self._put([Submitted(sequence, handle) for sequence, handle in zip(sequences, handles, strict=True)])
        return handles

    def call(self, work: Callable[[], Any]) -> Any:
        """Runs work in the thread between two rounds and returns its result.

        Raises:
            MTPSpecError, RankError: as `submit`, or what the work raises.
        """
        call = Call(work, Future())
        self._put([call])
        return call.result.result()

    def close(self) -> None:
        """Cancels every sequence, queued or running, and ends the thread; may be repeated.

        If ranks share the model, sequences that the first one has not cancelled are generated to their end first.
        """
        with self._wake:
            self._closed = True
            left = self._left()
            self._wake.notify_all()
        for handle in left:
            handle.cancel()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def rest(self) -> None:
        """Waits until nothing is left to compute."""
        with self._wake:
            self._wake.wait_for(lambda: self._resting)

    def _put(self, given: Seq[Submitted | Call]) -> None:
        with self._wake:
            if isinstance(self._error, RankError):
                raise RankError(str(self._error)) from self._error
            if self._error is not None:
                raise MTPSpecError(
                    f"the thread that writes this model's texts has ended with {self._error!r}: call close() on the "
                    "model, after which it writes texts again"
                ) from self._error
            if self._closed:
                raise MTPSpecError("this model was closed: load it again")
            for one in given:
                if isinstance(one, Submitted):
                    one.sequence.number = self._arrived
                self._inbox.append(one)
                self._arrived += 1
            self._resting = False
            self._threads = torch.get_num_threads()  # a new thread would start with torch's default
            self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="mtp-spec batch", daemon=True)
                self._thread.start()
            self._wake.notify_all()
        openmp.dismiss()  # the worker computes now

    def _inside(self) -> bool:
        return threading.current_thread() is self._thread

    def _left(self) -> list[Handle]:
        """Returns the handles of all queued and running sequences."""
        return [one.handle for one in (*self._inbox, *self._texts.values()) if isinstance(one, Submitted)]

    def _serve(self) -> None:
        error: BaseException | None = None
        if self._device >= 0:
            torch.cuda.set_device(self._device)
        with self._ranks.on(self._channel):
            try:
                while self._work_arrives():
                    self._round()
            except BaseException as failure:  # no caller may be left waiting for a thread that has ended
                error = self._told("its worker", failure)
            self._stop(error)

    def _work_arrives(self) -> bool:
        """Waits for work; returns whether the thread continues."""
        if not self.scheduler.idle:
            return True
        with self._wake:
            while self._arrived == self._taken:
                self._resting = True
                self._wake.notify_all()
                if self._closed:
                    return False
                openmp.dismiss()  # while this thread waits, only others compute
                self._wake.wait()
            threads = self._threads
        self.runner.begins(threads)
        return True

    @undisturbed()
    def _round(self) -> None:
        arrived, cancelled = self._decided()
        while self._taken < arrived:
            self._take()
        for number in cancelled:
            if number in self._texts:  # else it has ended meanwhile
                self.scheduler.cancel(self._texts[number].sequence)
        for sequence in self.scheduler.round():
            handle = self._texts[sequence.number].handle
            if sequence.alive:
                handle.written()
                continue
            if sequence.error is not None:
                handle.fail(sequence.error)
            elif sequence.cancelled:
                handle.cancel()  # by the first rank
            else:
                handle.written()
                handle.finish()
            with self._wake:
                del self._texts[sequence.number]

    def _decided(self) -> tuple[int, list[int]]:
        """Returns how many submissions the first rank has received, and which sequences were cancelled there.

        Raises:
            MTPSpecError: this rank has not received as many.
            RankError: a rank failed or does not answer.
        """
        ranks, times = self._ranks, self.runner.measured()
        with self._wake:
            mine = [self._cancelled.popleft().number for _ in range(len(self._cancelled))]
            here = self._arrived
        arrived, count, *times = ranks.first([here, len(mine), *times])
        cancelled = ranks.first(mine if ranks.rank == 0 else [0] * int(count))
        self.runner.learn(times)
        patience = control.PATIENCE / 2  # so that the others still wait for an answer
        with self._wake:
            if not self._wake.wait_for(lambda: self._arrived >= arrived, patience):
                raise MTPSpecError(f"a text that rank 0 was asked for did not come here within {patience:.0f} s")
        return int(arrived), [int(number) for number in cancelled]

    def _take(self) -> None:
        """Takes the next submission out of the inbox."""
        with self._wake:
            one = self._inbox.popleft()
            self._taken += 1
            if isinstance(one, Submitted):
                self._texts[one.sequence.number] = one
        if isinstance(one, Submitted):
            one.sequence.failing = self._failing
            self.scheduler.add(one.sequence)
            return
        try:
            found = one.work()
        except BaseException as error:
            told = self._told("a call", error)
            one.result.set_exception(told)
            if isinstance(told, RankError):
                raise told from error
        else:
            one.result.set_result(found)

    def _failing(self, sequence: Sequence) -> None:
        """Checks that a sequence fails on every rank.

        This happens before the others are computed: without this sequence their passes would have fewer rows than on a
        rank where it continues.

        Raises:
            RankError: not every rank has the error.
        """
        error = sequence.error
        assert error is not None
        told = self._told(f"text {sequence.number}", error)
        if isinstance(told, RankError):
            sequence.error = told
            raise told from error

    def _told(self, where: str, error: BaseException) -> BaseException:
        """Returns the error if every rank has it; else a `RankError`, which the others learn of."""
        try:
            self._ranks.fail_alike(where, error)
        except RankError as failure:
            return failure
        return error

    def _stop(self, error: BaseException | None) -> None:
        """Closes the worker; with an error, everything queued or running fails with it."""
        with self._wake:
            self._closed, self._error = True, error
            left, calls = self._left(), [one for one in self._inbox if isinstance(one, Call)]
            self._inbox.clear()
        if error is not None:
            for handle in left:
                handle.fail(error)
            for call in calls:
                call.result.set_exception(error)
        try:
            self.scheduler.close()
        finally:
            self._texts.clear()
            self._cancelled.clear()
            with self._wake:
                self._resting = True
                self._wake.notify_all()
