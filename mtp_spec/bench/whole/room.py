"""Which layers of a model the ranks hold: all, or as many as were asked for; decided before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mtp_spec.cuda.memory import OVERHEAD_BYTES, MemoryPlan, plan_memory
from mtp_spec.errors import OptionError
from mtp_spec.host_memory import free_memory
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.cuda.model import DeviceModel
from mtp_spec.model.distributed.group import Ranks
from mtp_spec.model.errors import CheckpointError

# bytes of a GPU beside the plan: NCCL's buffers, the rooms of exchanges, graphs
BESIDE = 3 * 10**9
MOST_RANKS = 64


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to fit on every rank.

    Attributes:
        full: the whole model.
        context: most tokens of prompt and text.
        expanded: rows of `DeviceModel.expanded`.
        beside: bytes that the plan does not count.
    """

    full: ModelConfig
    context: int
    expanded: int = 0
    beside: int = BESIDE + OVERHEAD_BYTES

    def slice(self, layers: int) -> ModelConfig:
        """Returns the model with this many MoE layers."""
        return replace(self.full, num_hidden_layers=self.full.first_k_dense_replace + layers)

    @property
    def layers(self) -> int:
        """Number of MoE layers of the whole model."""
        return self.full.num_hidden_layers - self.full.first_k_dense_replace

    def plan(self, layers: int, ranks: Ranks) -> MemoryPlan:
        """Returns a rank's memory with this many MoE layers."""
        model = DeviceModel(self.slice(layers), "meta", ranks=ranks)
        model.expanded = self.expanded
        return plan_memory(model, self.context)

    def needed(self, layers: int, ranks: Ranks) -> int:
        """Returns the bytes that a rank needs: they grow evenly with the layers, so few of these are laid out."""
        one, two = (self.plan(count, ranks).total for count in (1, 2))
        return one + (layers - 1) * (two - one) + self.beside

    def enough(self, free: int) -> int | None:
        """Returns the fewest ranks, a power of two, that hold the whole model with `free` bytes each."""
        size = 1
        while size <= MOST_RANKS:
            try:
                if self.needed(self.layers, Ranks(0, size)) <= free:
                    return size
            except CheckpointError:  # cannot be divided so far
                return None
            size *= 2
        return None


def chosen(asked: Asked, layers: int | None, ranks: Ranks, free: int) -> ModelConfig:
    """Returns the whole model, or one with `layers` MoE layers.

    Args:
        free: bytes on the rank that has least.

    Raises:
        OptionError: it does not fit; the message names the ranks that would hold it and the layers that these would.
    """
    most = asked.layers
    if layers is not None and layers > most:
        raise OptionError(f"--layers {layers}: the model has {most} MoE layers")
    count = most if layers is None else layers
    plan = asked.plan(count, ranks)
    if plan.total + asked.beside <= free:
        return asked.slice(count)
    listed = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in plan.parts().items())
    what = "--whole" if layers is None else f"--layers {layers}"
    head = (f"{what}: each of {ranks.size} ranks would need {(plan.total + asked.beside) / 1e9:.1f} GB ({listed}, "
            f"{asked.beside / 1e9:.1f} kept free) and {free / 1e9:.1f} GB are free")  # fmt: skip
    enough = asked.enough(free)
    remedies = [] if enough is None or enough <= ranks.size else [f"start {enough} ranks"]
    fits = _share(asked, ranks, free, enough)
    if fits:
        remedies.append(f"give --layers {fits} (of {most} MoE layers; the others are extrapolated, and labelled so)")
    if plan.weights + plan.draft_head + asked.beside <= free:
        remedies.append("give smaller --contexts")
    raise OptionError(f"{head}: {', or '.join(remedies or ['use GPUs with more memory'])}")


def _share(asked: Asked, ranks: Ranks, free: int, enough: int | None) -> int:
    """Returns how many MoE layers these ranks hold: the share that they are of those that hold all, if that fits."""
    count = asked.layers * ranks.size // enough if enough is not None and enough > ranks.size else asked.layers - 1
    one, two = (asked.needed(layers, ranks) for layers in (1, 2))
    return max(0, min(count, 1 + (free - one) // (two - one)))


def free_bytes(device: torch.device, ranks: Ranks) -> int:
    """Returns the bytes that are free on the rank that has least."""
    # processes share a machine's own memory
    own = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else (free_memory() or 2**62) // ranks.size
    return min(int(one) for one in ranks.everyone(own))
