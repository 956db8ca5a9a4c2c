"""How much device memory a model needs, foreseen from its shape: what loading checks before it reads a byte."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from mtp_spec.errors import MTPSpecError
from mtp_spec.model.cache import PAGE, pages_for
from mtp_spec.model.checkpoint.folder import Checkpoint
from mtp_spec.model.checkpoint.found import PIECE_BYTES
from mtp_spec.model.checkpoint.tensors import AHEAD_BYTES
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.transformer import Transformer
from mtp_spec.speculation import MAX_NODES

# pages of a CPU's cache that nobody uses and later sequences may share: so much of the memory, or so many bytes
IDLE_SHARE, IDLE_BYTES = 1 / 16, 2**30


@dataclass(frozen=True, slots=True)
class PagePlan:
    """Pages of latent cache for texts side by side on a CPU.

    Attributes:
        pages: how many; each holds `PAGE` tokens for the main model and every MTP module.
        page_bytes: of one.
        most_idle: pages that are kept for later sequences to share: a part of the memory, as nobody may ask for them.
    """

    pages: int
    page_bytes: int
    most_idle: int | None = None

    @property
    def total(self) -> int:
        """Bytes of all pages; the system gives them as they are first used."""
        return self.pages * self.page_bytes

    @classmethod
    def of(
        cls, config: ModelConfig, dtype: torch.dtype, max_context: int, max_batch: int, cache_tokens: int | None,
        refuse: bool = True,
    ) -> PagePlan:  # fmt: skip
        """Returns the plan for these arguments of `load`.

        Args:
            refuse: more than the machine has is refused; else there are as many pages as it has memory for.

        Raises:
            MTPSpecError: this machine has not that much memory.
        """
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        size = layers * PAGE * (config.kv_lora_rank + config.qk_rope_head_dim) * dtype.itemsize
        whole = max_batch * pages_for(max_context + MAX_NODES + 1)
        memory = _machine_memory()
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
    """Returns the bytes of tensors held while a model is loaded: those read ahead, one more, and the one in use."""
    whole = max((i.bytes for name, i in checkpoint.tensors.items() if checkpoint.dtype(name) == "F8_E4M3"), default=0)
    return AHEAD_BYTES + 2 * max(whole, PIECE_BYTES)


def model_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Returns the bytes of all weights of the model by torch."""
    return sum(weight.nbytes for weight in Transformer(config, dtype, "meta").checkpoint_slots().values())


def check_host(config: ModelConfig, dtype: torch.dtype) -> None:
    """Refuses a model whose weights alone are more than this machine's free memory and swap.

    Raises:
        MTPSpecError: they are; the message says how much there is.
    """
    needed, free = model_bytes(config, dtype), free_here()
    if free is not None and needed > free:
        raise MTPSpecError(
            f"the weights take {needed / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')} and {free / 1e9:.1f} GB of "
            "memory are free: use a machine with more, a GPU, which keeps FP8 weights as they are, or several processes"
        )


def check_kept(needed: int) -> None:
    """Refuses weights that are kept in memory of their own and are more than this machine's free memory and swap.

    Raises:
        MTPSpecError: they are; the message says how much there is.
    """
    free = free_here()
    if free is not None and needed > free:
        raise MTPSpecError(
            f"the weights take {needed / 1e9:.1f} GB in FP8 and {free / 1e9:.1f} GB of memory are free: write them "
            "once with mtp-spec cast --to fp8, whose files are mapped, or use a machine with more"
        )


def free_here() -> int | None:
    """Returns the bytes of memory and swap that programs can still get, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        return found["MemAvailable"] + found["SwapFree"]
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _machine_memory() -> int | None:
    """Returns the bytes of memory in this machine, where the system tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
