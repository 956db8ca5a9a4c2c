"""Adaptive speculation on a GPU: steps of several shapes, chosen by `planning.shape_planner`.

Every shape is a separate captured step on the same state. A plain step does not run the MTP modules, so that it costs
no more than plain decoding; it stores its row in a ring buffer, which the modules process when drafting resumes or when
the ring is full.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from statistics import median
from time import perf_counter

import torch

from mtp_spec.cuda.constants import Constants
from mtp_spec.cuda.draft import feed_modules
from mtp_spec.cuda.runtime import DeviceRuntime
from mtp_spec.cuda.state import WAITING, State
from mtp_spec.cuda.step import Step
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.planning.chances import Chances
from mtp_spec.planning.shape_planner import PLAIN, ShapeTable
from mtp_spec.tree_shape import TreeShape

# sizes of catch-up passes; the smallest that holds all waiting rows is taken
CATCH_UP_ROWS = (16, WAITING)
# timing takes the median of ROUNDS means, each over RUNS runs
RUNS, ROUNDS = 4, 3


@dataclass(slots=True)
class Switching:
    """The captured steps of one state, and the captured transitions between steps of different shapes.

    Attributes:
        steps: by shape; the first is plain decoding.
        settle: runs the modules over the tokens that the last drafting step committed.
        catch_up: by rows, runs them over the stored rows of plain steps, except the last.
        constants: read by the passes at every replay.
    """

    steps: dict[int, Step]
    settle: Callable[[], None]
    catch_up: dict[int, Callable[[], None]]
    constants: Constants

    @classmethod
    def capture(cls, runtime: DeviceRuntime, state: State, steps: dict[int, Step], most: int = WAITING) -> Switching:
        """Captures the transitions, in passes of at most `most` rows; the state must not hold a sequence."""

        def captured(work: Callable[[], object]) -> Callable[[], None]:
            def run() -> None:
                work()

            state.blank()
            return run if runtime.graphs is None else runtime.graphs.capture(run)

        constants = Constants(runtime.model.device)
        if not steps[PLAIN].extend:  # without the modules there is nothing to catch up on
            return cls(steps, _nothing, dict.fromkeys(CATCH_UP_ROWS, _nothing), constants)
        passes = dict[int, Callable[[], None]]()
        for rows in CATCH_UP_ROWS:
            some = [state.part(first, min(most // rows, state.sequences - first))
                    for first in range(0, state.sequences, most // rows)]  # fmt: skip
            passes[rows] = _one_by_one([captured(partial(_catch_up, runtime.model, part, constants, rows))
                                        for part in some])  # fmt: skip
        return cls(steps, captured(steps[PLAIN].show), passes, constants)

    def seconds(self, state: State, shapes: int) -> list[float]:
        """Returns the seconds of each step, infinite for those that are not there, of settling, and of catching up by
        each number of rows.

        Args:
            shapes: number of shapes.
        """
        steps = [_time(state, self.steps[shape]) if shape in self.steps else inf for shape in range(shapes)]
        works = self.settle, *self.catch_up.values()
        return [*steps, *(0.0 if work is _nothing else _time(state, work) for work in works)]


def table_of(
    shapes: Sequence[TreeShape], seconds: Sequence[float], chances: Chances | None = None, scripted: int = 0
) -> ShapeTable:
    """Returns the table of measured times, in the order of `Switching.seconds`.

    Args:
        scripted: how many shapes, the last ones, are those of other drafters.
    """
    steps, (settling, *reading) = seconds[: len(shapes)], seconds[len(shapes) :]
    catching_up = dict(zip(CATCH_UP_ROWS, reading, strict=True))
    return ShapeTable(shapes, steps, settling, catching_up, chances, scripted)


def _nothing() -> None:
    """Stands for a transition that takes nothing."""


def _one_by_one(works: list[Callable[[], None]]) -> Callable[[], None]:
    def run() -> None:
        for work in works:
            work()

    return run


def _catch_up(model: DeviceModel, state: State, constants: Constants, rows: int) -> None:
    """Runs the MTP modules over the rows of plain steps, except the last one."""
    count = (state.length - 1 - state.fed).long()
    order, sequence = constants.places(range(rows)), constants.places(range(len(count)))[:, None]
    places = (state.fed[:, None] + torch.minimum(order, (count - 1).clamp_min(0)[:, None])) % WAITING
    tokens, hidden = state.ring_tokens[sequence, places], state.ring[sequence, places]
    feed_modules(model, state, constants, tokens, hidden, state.fed, count)
    state.fed.copy_(state.length - 1)


def _time(state: State, work: Callable[[], object]) -> float:
    """Returns the seconds of work on a state that holds no sequence."""
    if not state.length.is_cuda:  # reference kernels: speed does not matter
        state.blank()
        start = perf_counter()
        work()
        return perf_counter() - start
    means = []
    for _ in range(ROUNDS + 1):  # the first warms up
        state.blank()
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        for _ in range(RUNS):
            work()
        ended.record()
        ended.synchronize()
        means.append(begun.elapsed_time(ended) / 1e3 / RUNS)
    return median(means[1:])
