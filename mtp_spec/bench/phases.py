"""Times the parts of a captured step as separate graphs, outside the generation loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mtp_spec.api import LM
from mtp_spec.bench.timing import graph_time
from mtp_spec.cuda.backend import DeviceBackend
from mtp_spec.cuda.step import Step

WARM_STEPS = 3


def step_phases(
    lm: LM, ids: list[int], options: dict[str, Any], measure: Callable[[Callable[[], Any]], float] = graph_time
) -> dict[str, float]:
    """Returns the microseconds of a step's parts in the middle of a sequence: draft, verify, accept.

    Args:
        ids: the prompt.
        options: as for `generate`.
        measure: returns microseconds of some work, which it may repeat.
    """
    stream = lm.stream(ids, **options)
    for event in stream:
        if event.step == WARM_STEPS:
            break
    assert isinstance(lm.backend, DeviceBackend)
    used = lm.backend.steps_of(stream.sequence)[-1]
    state = used.state
    if state.length.is_cuda:
        torch.cuda.synchronize()  # a step is in flight, and parts are measured on another stream
    # a new step, because the sequence's own must keep the memory that its graph writes to
    step = Step(used.model, state, used.shape, used.stages, used.extend, used.acceptance)
    length = state.length.clone()

    def in_place(part: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            part()
            state.length.copy_(length)  # accepting advances the length: start every repetition at the same place

        return run

    with torch.inference_mode():
        return {name: measure(in_place(part)) for name, part in step.parts().items()}
