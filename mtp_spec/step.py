"""One step of speculative decoding, and what a device has to offer for it. The file to read first.

A step is the same four words everywhere: the MTP modules draft a tree, the model verifies it in one pass, a path of it
is accepted, and the path is committed to tokens and caches. On a CPU `step` runs as it stands, for all sequences that
share the step (`cpu.step`). On a GPU it is what a CUDA graph captures once and replays (`cuda.step`).

Plain decoding is the step with an empty tree, so that it runs the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from mtp_spec.model.host import Technique
from mtp_spec.request import Request
from mtp_spec.sequence import Sequence
from mtp_spec.speculation import Speculation

Trees = TypeVar("Trees")
Rows = TypeVar("Rows")
Verdicts = TypeVar("Verdicts")
Done = TypeVar("Done", covariant=True)


class Step(Protocol[Trees, Rows, Verdicts, Done]):
    """The parts of one step of some sequences."""

    def draft(self) -> Trees:
        """Returns the trees that the MTP modules propose."""
        ...

    def verify(self, trees: Trees) -> Rows:
        """Returns the model's rows for the roots and all nodes, from one pass."""
        ...

    def accept(self, trees: Trees, rows: Rows) -> Verdicts:
        """Returns for each tree the path that is accepted and the token that follows it."""
        ...

    def commit(self, verdicts: Verdicts) -> Done:
        """Keeps the accepted paths in the caches, forgets the rest of the trees, and makes the paths tokens."""
        ...


def step(one: Step[Trees, Rows, Verdicts, Done]) -> Done:
    """Runs one step."""
    trees = one.draft()
    rows = one.verify(trees)
    verdicts = one.accept(trees, rows)
    return one.commit(verdicts)


class Runner(Protocol):
    """What a device does for the sequences of one scheduler, which calls it from one thread at a time."""

    def check(self, request: Request) -> None:
        """Refuses a request that would not fit if it were alone.

        Raises:
            MTPSpecError: it would not.
        """
        ...

    def crowded(self, request: Request) -> bool:
        """Whether others hold memory that a request needs, so that it would share nothing with them."""
        ...

    def admit(self, sequence: Sequence, running: Seq[Sequence]) -> bool:
        """Finds memory for a sequence beside those that are running; returns false where it has to wait."""
        ...

    def round(self, running: Seq[Sequence]) -> list[Sequence]:
        """Takes every sequence one step further, or reads some of its prompt.

        Returns those that have new tokens (`Sequence.commit`), or an `error` of their own. Where the host runs behind
        the device, these are the tokens of an earlier round.
        """
        ...

    def release(self, sequence: Sequence) -> None:
        """Takes back what a sequence that has ended, failed or was cancelled was given; no harm if repeated.

        The garbage collector may call this, and `close`, at any moment and in any thread, for a stream that nobody
        holds: what is shared with other runners must be given back without waiting for a lock.
        """
        ...

    def begins(self, threads: int) -> None:
        """Prepares for the first sequences after an idle period; `threads` is the submitter's torch thread count."""
        ...

    def measured(self) -> list[float]:
        """Returns the seconds measured and not learned yet, as many on every rank; none where a process is alone.

        Ranks that plan by times of their own would plan differently: the first one's count.
        """
        ...

    def learn(self, times: Seq[float]) -> None:
        """Learns the first rank's in their place."""
        ...

    def close(self) -> None:
        """Ends the runner, whose scheduler has no sequences any more; no harm if repeated."""
        ...


class Backend(Protocol):
    """A loaded model on its device.

    Attributes:
        model: with its MTP modules.
        technique: how rows are computed, see `model.host`.
        auto: the largest tree that `speculation="auto"` drafts.
        captured: whether steps are captured as CUDA graphs.
    """

    model: Any
    technique: Technique
    auto: Speculation
    captured: bool

    def runner(self, shared: bool) -> Runner:
        """Returns a runner.

        Args:
            shared: its sequences wait for memory when others have it; else each is alone and gets memory of its own.
        """
        ...

    def trim(self) -> None:
        """Frees memory that no sequence uses, as far as it can be had again."""
        ...

    def exclusive(self) -> AbstractContextManager[None]:
        """To be entered by whoever computes with the model beside the runners."""
        ...
