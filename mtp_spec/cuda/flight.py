"""What a group of sequences captures, and what it has launched."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from mtp_spec.cuda.guided import Guide
from mtp_spec.cuda.sequence import DeviceSequence, Drafts
from mtp_spec.cuda.shapes import Switching
from mtp_spec.cuda.state import State
from mtp_spec.cuda.step import Step
from mtp_spec.planning.shape_planner import ShapePlan


@dataclass(slots=True)
class Part:
    """The captured work of a range of slots that step together.

    Attributes:
        first: the first slot.
        steps: by shape, without chains that are too long for so many slots.
        switching: the steps with the transitions between them, if there are several shapes.
        guide: of guided sequences.
    """

    first: int
    state: State
    steps: dict[int, Step]
    switching: Switching | None
    guide: Guide | None


@dataclass(slots=True)
class Flight:
    """A launched step.

    Attributes:
        sequences: by slot.
        parts: the captured work of their slots.
        shape: index of its shape.
        plan: the plan that chose it, if there are several shapes.
        alone: whether it has only one sequence.
        logits: of the sequences that asked for them, `[E, V]` each, by slot.
        drafts: for an observer.
        sources: by slot the drafter whose proposals the step verifies, if it is not the MTP modules.
    """

    sequences: list[DeviceSequence]
    parts: list[Part]
    shape: int
    plan: ShapePlan | None
    alone: bool
    begun: torch.cuda.Event | None
    ended: torch.cuda.Event | None = None
    record: Tensor = field(default_factory=partial(torch.empty, 0))
    logits: dict[int, Tensor] = field(default_factory=dict)
    drafts: Drafts | None = None
    sources: list[str] = field(default_factory=list)
