"""How much device memory a model needs, foreseen from its shape: what loading checks before it reads a byte."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mtp_spec.device_state import ROWS, SLACK
from mtp_spec.errors import MTPSpecError
from mtp_spec.kernels import mla
from mtp_spec.model.device import DeviceModel

# what captured graphs, the CUDA context's own buffers and fragmentation take besides
OVERHEAD_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on the device.

    Attributes:
        weights: as stored, FP8 with scales.
        draft_head: the copy of the head, or of part of it, that drafts read.
        caches: latents of all layers and of the MTP modules, and a tree's last keys.
        passes: what the largest pass keeps: partial attention, logits, hidden states.
    """

    weights: int
    draft_head: int
    caches: int
    passes: int

    @property
    def total(self) -> int:
        return self.weights + self.draft_head + self.caches + self.passes

    def parts(self) -> dict[str, int]:
        """Returns the bytes by name."""
        return {"weights": self.weights, "draft head": self.draft_head, "caches": self.caches, "passes": self.passes}


def plan_memory(model: DeviceModel, max_context: int) -> MemoryPlan:
    """Returns what a model needs for one sequence of up to `max_context` tokens; it may lie on "meta"."""
    config = model.config
    capacity = -(-(max_context + SLACK) // mla.KEYS) * mla.KEYS
    width = config.kv_lora_rank + config.qk_rope_head_dim
    caches = ((len(model.layers) + len(model.mtp)) * capacity + ROWS * mla.TAIL) * width * 2
    head = model.layers[0].attention.head
    table = (capacity + 128) * 2 * config.qk_rope_head_dim * 4
    logits = 3 * ROWS * config.vocab_size * 4  # logits, sampler's copy, counts and biases
    weights, drafts = (sum(t.nbytes for t in part) for part in (model.checkpoint_slots().values(), model.derived()))
    return MemoryPlan(weights, drafts, caches, mla.room_bytes(capacity, head, ROWS) + logits + table)


def check_memory(model: DeviceModel, max_context: int, device: str) -> MemoryPlan:
    """Returns the plan.

    Raises:
        MTPSpecError: the device has not that much memory free; the message says what would fit.
    """
    plan, (free, _) = plan_memory(model, max_context), torch.cuda.mem_get_info(device)
    needed = plan.total + OVERHEAD_BYTES
    if needed <= free:
        return plan
    listed = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in plan.parts().items())
    head = f"{needed / 1e9:.1f} GB of GPU memory are needed ({listed}) and {free / 1e9:.1f} GB are free"
    if plan.weights + plan.draft_head + OVERHEAD_BYTES > free:
        raise MTPSpecError(f"{head}: the weights alone do not fit; use a GPU with more memory, or several")
    fits = max_context
    while fits > 1 and plan_memory(model, fits).total + OVERHEAD_BYTES > free:
        fits = fits * 7 // 8
    raise MTPSpecError(f"{head}: load with max_context={fits} or less, or free memory")
