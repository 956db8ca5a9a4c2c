"""One step of speculative decoding, and the interfaces that a device implements for it. The file to read first.

A step has the same four parts everywhere: the MTP modules draft a tree, the model verifies it in one forward pass, a
path of it is accepted, and that path is committed to tokens and caches. On a CPU `step` runs as written, for all
sequences that share the step (`cpu.step`). On a GPU a CUDA graph captures it once and replays it (`cuda.step`).

Plain decoding is a step with an empty tree, so that it computes the same rows.
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
    """The parts of one step of one or more sequences."""

    def draft(self) -> Trees:
        """Returns the trees that the MTP modules propose."""
        ...

    def verify(self, trees: Trees) -> Rows:
        """Returns the model's rows for the roots and all nodes, from one forward pass."""
        ...

    def accept(self, trees: Trees, rows: Rows) -> Verdicts:
        """Returns for each tree the accepted path and the token that follows it."""
        ...

    def commit(self, verdicts: Verdicts) -> Done:
        """Keeps the accepted paths in the caches, drops the rest of the trees, and appends the paths' tokens."""
        ...


def step(one: Step[Trees, Rows, Verdicts, Done]) -> Done:
    """Runs one step."""
    trees = one.draft()
    rows = one.verify(trees)
    verdicts = one.accept(trees, rows)
    return one.commit(verdicts)


class Runner(Protocol):
    """Runs the sequences of one scheduler on a device; called from one thread at a time."""

    def check(self, request: Request) -> None:
        """Rejects a request that would not fit even if it ran alone.

        Raises:
            MTPSpecError: it does not fit.
        """
        ...

    def crowded(self, request: Request) -> bool:
        """Whether others hold memory that a request needs, so that it would get separate memory and share no pages."""
        ...

    def admit(self, sequence: Sequence, running: Seq[Sequence]) -> bool:
        """Allocates memory for a sequence while others run; returns false if it has to wait."""
        ...

    def round(self, running: Seq[Sequence]) -> list[Sequence]:
        """Advances every sequence by one step, or by a chunk of its prefill.

        Returns the sequences that have new tokens (`Sequence.commit`) or an `error` of their own. If the host lags
        behind the device, these are the tokens of an earlier round.
        """
        ...

    def release(self, sequence: Sequence) -> None:
        """Frees the resources of a sequence that has finished, failed or was cancelled; may be repeated.

        The garbage collector may call this and `close` at any moment and in any thread, for a stream without
        references: resources shared with other runners must be returned without waiting for a lock.
        """
        ...

    def begins(self, threads: int) -> None:
        """Prepares for the first sequences after an idle period; `threads` is the submitter's torch thread count."""
        ...

    def measured(self) -> list[float]:
        """Returns the measured seconds not learned yet, equally many on every rank; none for a single process.

        Ranks that planned from their own times would plan differently, so all of them learn the first rank's.
        """
        ...

    def learn(self, times: Seq[float]) -> None:
        """Learns the first rank's times in place of its own."""
        ...

    def close(self) -> None:
        """Closes the runner once its scheduler has no sequences left; may be repeated."""
        ...


class Backend(Protocol):
    """A loaded model on its device.

    Attributes:
        model: with its MTP modules.
        technique: how rows are computed, see `model.host`.
        auto: the largest tree that `speculation="auto"` drafts.
        captured: whether steps are captured as CUDA graphs.
        mixes: whether drafters other than the MTP modules take part by default.
    """

    model: Any
    technique: Technique
    auto: Speculation
    captured: bool
    mixes: bool

    def check(self, speculation: Speculation) -> None:
        """Rejects drafters that cannot take part on this device.

        Raises:
            OptionError: it names what is allowed.
        """
        ...

    def runner(self, shared: bool) -> Runner:
        """Returns a runner.

        Args:
            shared: its sequences wait while others of them hold the memory; else each runs alone. Other runners' memory
                a sequence does not wait for, but gets its own, if there is any.
        """
        ...

    def trim(self) -> None:
        """Frees memory that no sequence uses, as far as it can be allocated again."""
        ...

    def exclusive(self) -> AbstractContextManager[None]:
        """Context manager for any code, other than the runners, that computes with the model."""
        ...
