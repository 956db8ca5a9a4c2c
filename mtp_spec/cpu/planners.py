"""The planners of a model on a CPU, and their initial step times, measured once and stored."""

from __future__ import annotations

import os
from statistics import median
from time import perf_counter
from typing import Any

import torch

from mtp_spec.cache.pages import HostPages
from mtp_spec.cpu.passes import Passes
from mtp_spec.cpu.pending_times import PendingTimes
from mtp_spec.cpu.state import HostState
from mtp_spec.cpu.step import HostStep
from mtp_spec.model.cache import pages_for
from mtp_spec.model.host import HostModel, Technique
from mtp_spec.model.undisturbed import undisturbed
from mtp_spec.planning.costs import NEAR, TEXT, StepTimes, measure
from mtp_spec.planning.fixed_plan import FixedPlanner, TreeBatch
from mtp_spec.planning.node_planner import NodePlanner
from mtp_spec.planning.store import read, times_subject, write
from mtp_spec.progress import step_progress
from mtp_spec.request import Request
from mtp_spec.sampling.params import SamplingParams
from mtp_spec.sampling.sampler import Sampler
from mtp_spec.sequence import Sequence
from mtp_spec.speculation import Speculation
from mtp_spec.step import step
from mtp_spec.text import Tokenizer
from mtp_spec.text.stopping import StopChecker

# calibration runs this many steps, plain and with a chain of depth CHAIN; the first WARM ones are not counted
STEPS, WARM, CHAIN = 20, 4, 2
# drafting has to promise this much more than plain decoding, since briefly measured times are no more accurate
MARGIN = 1.1
CROWDED = 0.75  # programs that run or want to, for each processor, from which on they disturb each other's caches


class Planners:
    """The planners of a loaded model, one for each number of threads.

    Args:
        longest: most tokens of prompt and generated text.
        measuring: measure unless times are stored; if false, start from typical times and store nothing.
        show: show a progress bar while measuring.
    """

    def __init__(
        self, model: HostModel, technique: Technique, tokenizer: Tokenizer | None, longest: int, measuring: bool,
        show: bool,
    ) -> None:  # fmt: skip
        self._model, self._technique, self._tokenizer, self._longest = model, technique, tokenizer, longest
        self._measuring, self._show = measuring, show
        self._planners: dict[int, NodePlanner] = {}

    def here(self) -> NodePlanner:
        """Returns the planner for torch's current number of threads."""
        threads = torch.get_num_threads()
        if threads not in self._planners:
            self._planners[threads] = NodePlanner(self._times() if self._measuring else StepTimes.typical())
        return self._planners[threads]

    def _times(self) -> StepTimes:
        technique, ranks = self._technique, self._model.ranks
        subject = times_subject(self._model, technique)
        try:
            return StepTimes.from_json(ranks.from_first(_kept(subject) if ranks.rank == 0 else None) or {})
        except (KeyError, TypeError, ValueError):
            pass  # nothing is stored, or it is unusable
        busy = crowded()
        with step_progress(self._show and ranks.rank == 0, "measuring step times, once") as report:
            times = measure(self._model, technique, self._tokenizer, self._longest, report)
        if times is None:  # the machine is too busy: the next start tries again
            return StepTimes.typical()
        times = calibrated(times, self._model, technique, self._tokenizer)
        if ranks.rank == 0:
            write(subject, {**times.to_json(), "busy": busy})
        return times


def _kept(subject: dict[str, Any]) -> dict[str, Any] | None:
    """Returns stored times, unless a busy machine had distorted them that is busy no more."""
    found = read(subject)
    return None if found is not None and found.get("busy") and not crowded() else found


def crowded() -> bool:
    """Whether this machine's processors had much to do in the last minute."""
    try:
        return os.getloadavg()[0] > CROWDED * (os.cpu_count() or 1)
    except (AttributeError, OSError):  # Windows has no such number
        return False


@undisturbed()
def calibrated(times: StepTimes, model: HostModel, technique: Technique, tokenizer: Tokenizer | None) -> StepTimes:
    """Returns pass times scaled to match whole steps, plain and with drafts, of a running sequence.

    A pass that follows one of the same kind finds more in the processor's caches than passes timed in turn, and a step
    takes longer than its passes.
    """
    ids = tokenizer.encode(TEXT) if tokenizer is not None else [i % model.config.vocab_size for i in range(NEAR)]
    sampler = Sampler(SamplingParams(temperature=1.0, seed=0), model.config.vocab_size)

    def taken(speculation: Speculation | None) -> float:
        length = STEPS * (1 + CHAIN)
        request = Request(ids[:NEAR], sampler, speculation, length, StopChecker(None, frozenset(), (), length + 1))
        lease = HostPages(model.new_layers(pages_for(request.room)), len(model.mtp)).lease([], request.room, True)
        assert lease is not None
        state = HostState(model, technique, Sequence(request), lease, None)
        passes, seconds = Passes(model, technique), list[float]()
        planner, pending = FixedPlanner(), PendingTimes(alone=True)
        step(HostStep(passes, [], [state], planner, pending))
        for _ in range(STEPS):
            start = perf_counter()
            state.begins_step(*planner.plan(TreeBatch([state.standing()], alone=True)))
            step(HostStep(passes, [state], [], planner, pending))
            seconds.append(perf_counter() - start)
        return median(seconds[WARM:])

    if not model.mtp:
        (plain,) = model.ranks.first([taken(None)])
        return times.scaled(plain, MARGIN * plain / times.verify(1, NEAR))
    plain, drafted = model.ranks.first([taken(None), taken(Speculation(depth=CHAIN))])
    expected = times.extend(2, NEAR) + (CHAIN - 1) * times.level(1, NEAR) + times.verify(1 + CHAIN, NEAR)
    # the first level is the last appended row and the head's pass over it
    expected += max(0.0, times.level(1, NEAR) - times.extend(1, NEAR))
    return times.scaled(plain, MARGIN * drafted / expected)
