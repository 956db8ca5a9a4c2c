"""The thread that runs a scheduler for submitted sequences, and the queue in front of it.

Where processes share a model, each has such a thread, and all of them run the same rounds (`distributed.sync`): a
sequence is admitted, and a cancelled one leaves, once all ranks know of it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from mtp_spec.cpu import openmp
from mtp_spec.distributed.sync import Lockstep, News
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
    """A sequence and who waits for it."""

    sequence: Sequence
    handle: Handle


class Worker:
    """The thread of a scheduler.

    Args:
        runner: of the model; whoever submits holds the model, so that the thread ends with a model that nobody holds.
        max_batch: most sequences that run at a time; others wait.
        ranks: those that share the model; each makes its worker at the same place.
    """

    def __init__(self, runner: Runner, max_batch: int, ranks: Ranks) -> None:
        self.runner, self.lockstep = runner, Lockstep(ranks)
        self.scheduler = Scheduler(runner, max_batch, self._failing)
        self._inbox, self._handles = deque[Submitted](), dict[Sequence, Handle]()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed, self._resting = False, True
        self._error: BaseException | None = None
        self._threads, self._device = 1, -1
        # sequences that have come, those of them that all ranks know of, and numbers that some rank cancelled
        self._arrived, self._known, self._cancelled = 0, 0, frozenset[int]()

    def submit(self, sequences: Seq[Sequence], owner: object) -> list[Handle]:
        """Puts sequences in the queue, all at once.

        Raises:
            MTPSpecError: the worker was closed, or a sequence would not fit if it were alone.
            RankError: another rank has failed.
        """
        for sequence in sequences:
            self.runner.check(sequence.request)
        handles = [Handle(owner, sequence.log) for sequence in sequences]
        with self._wake:
            if isinstance(self._error, RankError):
                raise RankError(str(self._error)) from self._error
            if self._closed:
                raise MTPSpecError("this model was closed: load it again")
            for sequence, handle in zip(sequences, handles, strict=True):
                sequence.number = self._arrived
                self._inbox.append(Submitted(sequence, handle))
                self._arrived += 1
            self._threads = torch.get_num_threads()  # a new thread would begin with torch's own default
            self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="mtp-spec batch", daemon=True)
                self._thread.start()
            self._wake.notify_all()
        openmp.dismiss()  # the worker computes now
        return handles

    def close(self) -> None:
        """Cancels every sequence, queued or running, and ends the thread; no harm if repeated."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def rests(self) -> bool:
        """Returns whether nothing is left to write, once what was cancelled or written last is out of the way."""
        with self._wake:
            left = [one.handle for one in list(self._inbox)] + list(self._handles.values())
            return all(handle.done() for handle in left) and self._wake.wait_for(
                lambda: self._resting, control.PATIENCE
            )

    def _serve(self) -> None:
        error: BaseException | None = None
        if self._device >= 0:
            torch.cuda.set_device(self._device)
        with self.lockstep.held():
            try:
                while self._work_arrives():
                    self._round()
            except BaseException as failure:  # nobody may wait for a thread that is gone
                error = failure
            self._stop(error)

    @undisturbed()
    def _round(self) -> None:
        scheduler = self.scheduler
        while self._inbox and self._inbox[0].sequence.number < self._known:
            one = self._inbox.popleft()
            self._handles[one.sequence] = one.handle
            scheduler.add(one.sequence)
        for sequence, handle in self._handles.items():
            if handle.cancelled() if self.lockstep.alone else sequence.number in self._cancelled:
                sequence.cancelled = True
        for sequence in scheduler.round():
            handle = self._handles[sequence]
            if sequence.error is not None:
                handle.fail(sequence.error)
            elif sequence.cancelled:
                handle.cancel()  # by another rank
            else:
                handle.written()
                if sequence.finished:
                    handle.finish()
            if not sequence.alive:
                del self._handles[sequence]

    def _failing(self, sequences: list[Sequence]) -> None:
        """Asks whether sequences fail on every rank.

        Raises:
            RankError: not every rank has the error.
        """
        error = sequences[0].error
        assert error is not None
        names = ", ".join(str(one.number) for one in sequences)
        try:
            self.lockstep.ranks.fail_alike(f"text {names}", error)
        except BaseException as failure:
            for one in sequences:
                one.error = failure
            raise

    def _stop(self, error: BaseException | None) -> None:
        """Ends what is left."""
        with self._wake:
            self._closed, self._error = True, error
            left = [one.handle for one in self._inbox] + list(self._handles.values())
            self._inbox.clear()
        for handle in left:
            if error is None:
                handle.cancel()
            else:
                handle.fail(error)
        try:
            self.scheduler.close()
        finally:
            self._handles.clear()
            with self._wake:
                self._resting = True
                self._wake.notify_all()

    def _work_arrives(self) -> bool:
        """Waits for something to do and takes the news; returns whether the thread goes on."""
        with self._wake:
            resting = self.scheduler.idle
            if resting:
                self._wait()
            threads = self._threads
        if not self._take_news(resting):
            return False
        if resting and self._inbox:
            self.runner.begins(threads)
        return True

    def _wait(self) -> None:
        self._resting = True
        self._wake.notify_all()
        while not (self._closed or self._arrived > self._known):
            openmp.dismiss()  # the others compute, if anyone does
            self._wake.wait()
        self._resting = False

    def _news(self) -> News:
        """Returns this rank's."""
        lockstep = self.lockstep
        closing = (lockstep.ranks.rank,) if self._closed else ()
        if lockstep.alone:  # asks when it comes to a sequence
            return News(self._arrived, self._cancelled, closing)
        left = [(one.sequence.number, one.handle) for one in self._inbox]
        left += [(sequence.number, handle) for sequence, handle in self._handles.items()]
        return News(self._arrived, frozenset(number for number, handle in left if handle.cancelled()), closing)

    def _take_news(self, resting: bool) -> bool:
        """Takes the news, as all ranks have it where there are several; returns whether the thread goes on."""
        lockstep = self.lockstep
        if not (lockstep.alone or resting or lockstep.due()):
            return True
        with self._wake:
            news = self._news()
        if resting and not lockstep.alone:
            news = lockstep.rest(news)
        elif not lockstep.alone:
            news, times = lockstep.point(news, self.runner.measured())
            self.runner.learn(times)
        if news.closing:
            self._close_with(news.closing[0])
            return False
        self._known, self._cancelled = news.arrived, news.cancelled
        return True

    def _close_with(self, rank: int) -> None:
        """Waits for this rank's program to close the model too, as another's has."""
        ranks = self.lockstep.ranks
        with self._wake:
            if not self._wake.wait_for(lambda: self._closed, control.PATIENCE):
                raise RankError(
                    f"rank {rank} of {ranks.size} closed the model or ended, and rank {ranks.rank} did not within "
                    f"{control.PATIENCE:.0f} s: all make the same calls"
                )
