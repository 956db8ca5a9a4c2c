"""How much device memory a model needs, foreseen from its shape: what loading checks before it reads a byte."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mtp_spec.device_state import ROWS, SLACK
from mtp_spec.errors import MTPSpecError
from mtp_spec.kernels import mla
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.device import DeviceModel

# what captured graphs, the CUDA context's own buffers and fragmentation take besides
OVERHEAD_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on the device.

    Attributes:
        weights: as stored, FP8 with scales.
        caches: latents of all layers and of the MTP modules, and a tree's last keys.
        passes: what the largest pass keeps: partial attention, logits, hidden states.
    """

    weights: int
    caches: int
    passes: int

    @property
    def total(self) -> int:
        return self.weights + self.caches + self.passes


def plan_memory(config: ModelConfig, max_context: int, eh_packed: bool = False) -> MemoryPlan:
    """Returns what a model in FP8 needs for one sequence of up to `max_context` tokens."""
    model = DeviceModel(config, "meta", eh_packed)
    return _plan(model, sum(t.nbytes for t in model.parameters()), max_context)


def _plan(model: DeviceModel, weights: int, max_context: int) -> MemoryPlan:
    config = model.config
    capacity = -(-(max_context + SLACK) // mla.KEYS) * mla.KEYS
    width = config.kv_lora_rank + config.qk_rope_head_dim
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    caches = (layers * capacity + ROWS * mla.TAIL) * width * 2
    head = model.layers[0].attention.head
    table = (capacity + 128) * 2 * config.qk_rope_head_dim * 4
    logits = 3 * ROWS * config.vocab_size * 4  # logits, sampler's copy, counts and biases
    return MemoryPlan(weights, caches, mla.room_bytes(capacity, head, ROWS) + logits + table)


def check_memory(config: ModelConfig, max_context: int, device: str, eh_packed: bool = False) -> MemoryPlan:
    """Returns the plan.

    Raises:
        MTPSpecError: the device has not that much memory free; the message says what would fit.
    """
    plan, (free, _) = plan_memory(config, max_context, eh_packed), torch.cuda.mem_get_info(device)
    needed = plan.total + OVERHEAD_BYTES
    if needed <= free:
        return plan
    head = f"{needed / 1e9:.1f} GB of GPU memory are needed ({_listed(plan)}) and {free / 1e9:.1f} GB are free"
    if plan.weights + OVERHEAD_BYTES > free:
        raise MTPSpecError(f"{head}: the weights alone do not fit; use a GPU with more memory, or several")
    fits, model = max_context, DeviceModel(config, "meta", eh_packed)
    while fits > 1 and _plan(model, plan.weights, fits).total + OVERHEAD_BYTES > free:
        fits = fits * 7 // 8
    raise MTPSpecError(f"{head}: load with max_context={fits} or less, or free memory")


def _listed(plan: MemoryPlan) -> str:
    return f"weights {plan.weights / 1e9:.1f}, caches {plan.caches / 1e9:.1f}, passes {plan.passes / 1e9:.1f}"
