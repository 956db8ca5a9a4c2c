"""Estimates the CPU memory of weights and cache pages; loading checks it before reading any weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mtp_spec import host_memory
from mtp_spec.errors import MTPSpecError
from mtp_spec.model.cache import PAGE, pages_for
from mtp_spec.model.checkpoint.folder import Checkpoint
from mtp_spec.model.checkpoint.found import PIECE_BYTES
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.files.tensors import AHEAD_BYTES
from mtp_spec.model.transformer import Transformer
from mtp_spec.speculation import MAX_NODES

# limit on unused cache pages that later sequences may share: this share of the memory, but at least IDLE_BYTES
IDLE_SHARE, IDLE_BYTES = 1 / 16, 2**30


@dataclass(frozen=True, slots=True)
class PagePlan:
    """Pages of latent cache for a batch of sequences on a CPU.

    Attributes:
        pages: number of pages; each holds `PAGE` tokens for the main model and every MTP module.
        page_bytes: bytes of one page.
        most_idle: most unused pages kept for later sequences; limited, because they may never be used again.
    """

    pages: int
    page_bytes: int
    most_idle: int | None = None

    @property
    def total(self) -> int:
        """Bytes of all pages; the system allocates them on first use."""
        return self.pages * self.page_bytes

    @classmethod
    def of(
        cls, config: ModelConfig, dtype: torch.dtype, max_context: int, max_batch: int, cache_tokens: int | None,
        refuse: bool = True,
    ) -> PagePlan:  # fmt: skip
        """Returns the plan for these arguments of `load`.

        Args:
            refuse: raise an error if the machine has too little memory; else plan as many pages as fit.

        Raises:
            MTPSpecError: this machine has too little memory.
        """
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        size = layers * PAGE * (config.kv_lora_rank + config.qk_rope_head_dim) * dtype.itemsize
        whole = max_batch * pages_for(max_context + MAX_NODES + 1)
        memory = host_memory.machine_memory()
        idle = None if memory is None else max(IDLE_BYTES, int(memory * IDLE_SHARE)) // size
        plan = cls(whole if cache_tokens is None else pages_for(cache_tokens), size, idle)
        if memory is not None and plan.total > memory and not refuse:
            return cls(memory // size, size, idle)
        if memory is not None and plan.total > memory:
            raise MTPSpecError(
                f"{plan.pages} pages of cache for texts side by side take {plan.total / 1e9:.1f} GB and this machine "
                f"has {memory / 1e9:.1f} GB: load with a smaller max_context or max_batch, or with "
                f"cache_tokens={memory // 2 // size * PAGE} or less"
            )
        return plan


def read_ahead_bytes(checkpoint: Checkpoint) -> int:
    """Returns the peak bytes of tensors during loading: those read ahead, one more, and the one in use."""
    whole = max((i.bytes for name, i in checkpoint.tensors.items() if checkpoint.dtype(name) == "F8_E4M3"), default=0)
    return AHEAD_BYTES + 2 * max(whole, PIECE_BYTES)


def model_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Returns the bytes of all weights of a model that torch runs."""
    return sum(weight.nbytes for weight in Transformer(config, dtype, "meta").checkpoint_slots().values())


def check_host(config: ModelConfig, dtype: torch.dtype) -> None:
    """Rejects a model by torch whose weights alone exceed this process's free memory and swap.

    Raises:
        MTPSpecError: they do; the message says how much is free.
    """
    remedy = "use a machine with more, a GPU, which keeps FP8 weights as they are, or several processes"
    _check_free(model_bytes(config, dtype), f"in {str(dtype).removeprefix('torch.')}", remedy)


def check_own(needed: int, narrowed: bool, dtype: torch.dtype | None) -> None:
    """Rejects weights on the CPU engine that are held outside their files and exceed free memory and swap.

    Args:
        needed: their bytes.
        narrowed: whether they are converted to FP8 while reading.
        dtype: the dtype that they are rounded to; None and float32 keep them unchanged.

    Raises:
        MTPSpecError: they do; the message says how much is free.
    """
    if narrowed:
        kind, remedy = "in FP8", "write them once with mtp-spec cast --to fp8, whose files are mapped"
    elif dtype in (torch.bfloat16, torch.float16):
        kind, remedy = f"in {str(dtype).removeprefix('torch.')}", "leave dtype out: then they stay in their files"
    else:
        kind, remedy = "outside their files", "make one piece of each with mtp-spec convert --to-hf, which are mapped"
    _check_free(needed, kind, f"{remedy}, or use a machine with more")


def _check_free(needed: int, kind: str, remedy: str) -> None:
    free = host_memory.free_memory()
    if free is not None and needed > free:
        raise MTPSpecError(
            f"the weights take {needed / 1e9:.1f} GB {kind} and {free / 1e9:.1f} GB of memory are free: {remedy}"
        )
