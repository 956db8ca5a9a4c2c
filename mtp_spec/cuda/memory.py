"""Estimates the device memory that a model needs from its shape; loading checks it before reading any weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mtp_spec.cuda.pages import (
    EXTRA_ROWS,
    IDLE_PAGES,
    READ_SEQUENCES,
    STEP_SEQUENCES,
    planned_pages,
    read_rows,
    step_rows,
)
from mtp_spec.cuda.state import PREFILL_ROWS, ROWS, SLACK, WAITING
from mtp_spec.errors import MTPSpecError
from mtp_spec.kernels import mla, moe
from mtp_spec.kernels.mla import cache_bytes, whole_blocks
from mtp_spec.model.cache import PAGE
from mtp_spec.model.config import SHARED, ModelConfig
from mtp_spec.model.cuda.model import DeviceModel

# additional bytes for graphs, partial sums of products, logits of several steps, and fragmentation
OVERHEAD_BYTES = 256 * 2**20
# work runs once before it is captured, in memory separate from the graphs' pool
COPIES = 2
# hidden states of a row that exist at once: residual stream, branches, inputs of a layer and of an MTP module
HIDDEN_STATES = 10
# float64 distributions that a rule holds at once for every row of a pass
RULE_ROWS = 8
# bytes for masking one token of a row
MASK_BYTES = 4


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on the device.

    Attributes:
        weights: as stored, with scales.
        draft_head: the copy of the head, or of part of it, that drafting uses.
        caches: latents of all layers and of the MTP modules, and a tree's last keys; for all sequences.
        passes: buffers of the largest pass (partial attention, logits, hidden states), which graphs share, and the
            state of a batch between passes.
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


def plan_memory(
    model: DeviceModel, max_context: int, max_batch: int = 1, cache_tokens: int | None = None
) -> MemoryPlan:
    """Returns the memory that a model, which may be on "meta", needs for sequences of up to `max_context` tokens.

    Args:
        max_batch: most sequences that share steps.
        cache_tokens: tokens that their pages hold; None for the full context of all.
    """
    config, rows, read = model.config, step_rows(max_batch), read_rows(max_batch)
    capacity = whole_blocks(max_context + SLACK)
    caches = pages_bytes(model, max_context, max_batch, planned_pages(max_context, max_batch, cache_tokens))
    head = model.layers[0].attention.head
    table = (capacity + 128) * 2 * config.qk_rope_head_dim * 4
    logits = config.vocab_size * 4
    settings = 4 * capacity // PAGE * (2 * max_batch + EXTRA_ROWS + READ_SEQUENCES)  # page tables
    settings += group_bytes(model, max_batch) + logits_bytes(model, max_batch)
    largest = COPIES * max(pass_bytes(model, read), pass_bytes(model, rows) + rows * logits)
    if model.expanded:
        largest += prompt_pass_bytes(model, min(model.prefill_tokens, max_context), capacity)
    weights, drafts = (sum(t.nbytes for t in part) for part in (model.checkpoint_slots().values(), model.derived()))
    absorbed = max(read, PREFILL_ROWS[-1], model.most_absorbed, rows)
    room = mla.room_bytes(capacity, head, absorbed, min(max_batch, STEP_SEQUENCES))
    return MemoryPlan(weights, drafts, caches, room + table + settings + largest)


def pages_bytes(model: DeviceModel, max_context: int, max_batch: int, count: int) -> int:
    """Returns the bytes of `count` cache pages."""
    layers = len(model.layers) + len(model.mtp)
    return cache_bytes(layers, max_context + SLACK, step_rows(max_batch), model.layout, count + IDLE_PAGES)


def group_bytes(model: DeviceModel, sequences: int) -> int:
    """Returns the bytes of a batch's state other than pages: hidden states, settings."""
    config, vocabulary = model.config, model.config.vocab_size
    hidden = (ROWS + WAITING + config.num_nextn_predict_layers) * config.hidden_size * 2
    # for running sequences and those in prefill, and a copy while steps are captured
    return (sequences + min(sequences, READ_SEQUENCES)) * (COPIES * hidden + 3 * vocabulary * 4)


def logits_bytes(model: DeviceModel, max_batch: int) -> int:
    """Returns the bytes of the logits of a step of up to `max_batch` sequences."""
    return step_rows(max_batch) * model.config.vocab_size * 4


def pass_bytes(model: DeviceModel, rows: int) -> int:
    """Returns the peak bytes of a pass of `rows` rows, without logits."""
    config, head, hidden = model.config, model.layers[0].attention.head, model.config.hidden_size
    queries, context = head.heads * (head.nope + head.rope) * 2, head.heads * (head.latent * 2 + head.value)
    down = (model.layers[0].attention.a_rows + head.width) * 2
    attention = down + head.padded * head.width * 2 + max(queries, context)
    each = 2 if model.wide else 1  # bytes per input number of an MLP's second product
    dense = (4 + each) * max(
        config.intermediate_size if config.first_k_dense_replace else 0,
        *(shape.intermediate_size or 0 for shape in (*config.modules, SHARED)),
    )
    pair = hidden * 2 + config.moe_intermediate_size * each
    experts = (config.num_experts_per_tok + config.n_shared_experts) * pair + config.n_routed_experts * 4
    return rows * (HIDDEN_STATES * hidden * 2 + max(attention, dense, experts))


def prompt_pass_bytes(model: DeviceModel, rows: int, keys: int) -> int:
    """Returns the peak bytes of a pass of `rows` rows over long prompts that attend up to `keys` slots."""
    config, head, hidden = model.config, model.layers[0].attention.head, model.config.hidden_size
    attention = model.layers[0].attention
    each, wide = (1 if attention.o.packed else 2), 2 if model.wide else 1
    values, queries = head.heads * head.value, head.heads * (head.nope + head.rope)
    down = 2 * (attention.a_rows + head.width)
    tail = min(rows, model.most_absorbed)
    attended = rows * (down + 2 * queries + (2 + each) * values) + mla.prompt_bytes(keys, rows, head)
    attended += tail * (head.padded * head.width * 2 + head.heads * (head.latent * 2 + head.value))
    dense = (4 + wide) * max(
        config.intermediate_size if config.first_k_dense_replace else 0,
        *(shape.intermediate_size or 0 for shape in (*config.modules, SHARED)),
    )
    per_row = config.num_experts_per_tok + config.n_shared_experts
    mixed = rows * (per_row * (hidden + config.moe_intermediate_size) * wide + hidden * wide) + moe.most_bytes(
        rows * per_row
    )
    gates = rows * -(-hidden // moe.STRETCH) * config.n_routed_experts * 4
    return rows * HIDDEN_STATES * hidden * 2 + max(attended, rows * dense, mixed + gates)


def rule_bytes(config: ModelConfig, nodes: int) -> int:
    """Returns the peak bytes of an acceptance rule other than the coupled one for a tree."""
    return COPIES * RULE_ROWS * (nodes + 1) * config.vocab_size * 8


def guided_bytes(config: ModelConfig, rows: int) -> int:
    """Returns the peak bytes of masking the rows of guided sequences."""
    return COPIES * MASK_BYTES * rows * config.vocab_size


def check_memory(
    model: DeviceModel, max_context: int, device: str, max_batch: int = 1, cache_tokens: int | None = None,
    remedy: str = "", shrinks: bool = False,
) -> MemoryPlan:  # fmt: skip
    """Returns the memory plan if it fits.

    Args:
        shrinks: whether the model's `prefill_tokens` are halved until it does.
        remedy: further advice for weights that do not fit, ending in a comma.

    Raises:
        MTPSpecError: the device has too little free memory; the message says what would fit.
    """
    plan, free = plan_memory(model, max_context, max_batch, cache_tokens), _free(torch.device(device))
    while shrinks and model.expanded and model.prefill_tokens > PREFILL_ROWS[-1] and plan.total + OVERHEAD_BYTES > free:
        model.prefill_tokens //= 2
        plan = plan_memory(model, max_context, max_batch, cache_tokens)
    needed = plan.total + OVERHEAD_BYTES
    if needed <= free:
        return plan
    listed = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in plan.parts().items())
    head = f"{needed / 1e9:.1f} GB of GPU memory are needed ({listed}) and {free / 1e9:.1f} GB are free"
    if plan.weights + plan.draft_head + OVERHEAD_BYTES > free:
        raise MTPSpecError(f"{head}: the weights alone do not fit; {remedy}use a GPU with more memory, or several")
    if max_batch > 1:
        fits, tokens = max_batch, planned_pages(max_context, max_batch, cache_tokens) * PAGE
        while fits > 1 and plan_memory(model, max_context, fits, cache_tokens).total + OVERHEAD_BYTES > free:
            fits -= 1
        page = pages_bytes(model, max_context, 1, 1) - pages_bytes(model, max_context, 1, 0)
        tokens -= -(-(needed - free) // page) * PAGE
        fewer = f"with cache_tokens={tokens} or less, " if tokens > 0 else ""
        raise MTPSpecError(f"{head}: load with max_batch={fits} or less, {fewer}with a smaller max_context, or free "
                           "memory")  # fmt: skip
    fits = max_context
    while fits > 1 and plan_memory(model, fits).total + OVERHEAD_BYTES > free:
        fits = fits * 7 // 8
    raise MTPSpecError(f"{head}: load with max_context={fits} or less, or free memory")


def check_room(needed: int, device: torch.device, what: str) -> None:
    """Checks that `needed` bytes are free.

    Raises:
        MTPSpecError: the device has less free memory.
    """
    if not has_room(needed, device):
        free = _free(device)
        raise MTPSpecError(
            f"{what} needs {needed / 1e9:.2f} GB of GPU memory and {free / 1e9:.2f} GB are free: end other sequences, "
            "draft fewer nodes, or load with a smaller max_context"
        )


def has_room(needed: int, device: torch.device) -> bool:
    """Returns whether `needed` bytes are free."""
    return needed <= _free(device)


def _free(device: torch.device) -> int:
    """Returns the bytes that are free or held unused by torch."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
