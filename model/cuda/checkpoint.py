"""Loads a Hugging Face folder for the GPU kernels: weights as stored, in FP8 or 16 bits, or widened to 16 bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mtp_spec.kernels.fp8 import BLOCK, weight_dequant
from mtp_spec.kernels.fp8_cpu import dequantise
from mtp_spec.model.checkpoint.folder import (
    Checkpoint,
    Report,
    open_checkpoint,
    rank_part,
    read_weights,
    square_block,
)  # fmt: skip
from mtp_spec.model.cuda.model import DeviceModel, why_not
from mtp_spec.model.distributed.group import ALONE, Ranks
from mtp_spec.model.files.formats import SCALE

PACKED, HALF = "F8_E4M3", "F16"


def obstacle(checkpoint: Checkpoint) -> str | None:
    """Returns why the kernels cannot run a checkpoint at all, or None; see `model.why_not`."""
    reason = why_not(checkpoint.config)
    if reason is None and checkpoint.config.fp8_block is not None and len(set(checkpoint.config.fp8_block)) > 1:
        return f"its FP8 weights have blocks of {list(checkpoint.config.fp8_block)}, which are not square"
    return reason


def fp8_obstacle(checkpoint: Checkpoint) -> str | None:
    """Returns why the kernels cannot run a checkpoint's FP8 matrices in FP8, or None."""
    reason = obstacle(checkpoint)
    if reason is not None:
        return reason
    if not has_fp8(checkpoint):
        return "its weights are not FP8 with 128x128 scales"
    if checkpoint.config.fp8_block != (BLOCK, BLOCK):
        return f"its FP8 weights have blocks of {list(checkpoint.config.fp8_block or ())}, not of 128x128"
    return None


def has_fp8(checkpoint: Checkpoint) -> bool:
    """Whether some matrix is in FP8 once it is read."""
    return any(checkpoint.dtype(name) == PACKED for name in checkpoint.tensors)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Returns the type of activations: float16 if the embedding is stored in it, else bfloat16."""
    return torch.float16 if checkpoint.dtype("model.embed_tokens.weight") == HALF else torch.bfloat16


def empty_device_model(
    checkpoint: Checkpoint, device: torch.device | str, draft_ids: Sequence[int] | None = None,
    packed_cache: bool = False, ranks: Ranks = ALONE, dtype: torch.dtype | None = None, fp8_products: bool = True,
) -> DeviceModel:  # fmt: skip
    """Returns a model with memory for the checkpoint's weights, uninitialised; on "meta" it costs nothing.

    Args:
        dtype: bfloat16 or float16 widens FP8 weights to it; None keeps them if `fp8_obstacle` is None.
        fp8_products: whether the device supports them; otherwise FP8 weights are widened.
    """
    stored = {name.split(".", 3)[-1]: info.dtype for name, info in checkpoint.tensors.items()}
    router = torch.float32 if stored.get("mlp.gate.weight") == "F32" else dtype or stored_dtype(checkpoint)
    keeps = dtype is None and fp8_products and fp8_obstacle(checkpoint) is None

    def packed(name: str) -> bool:
        return keeps and name in checkpoint.tensors and checkpoint.dtype(name) == PACKED

    return DeviceModel(
        checkpoint.config, device, packed, router, draft_ids, packed_cache, ranks, dtype or stored_dtype(checkpoint),
        fp8_products,
    )  # fmt: skip


def load_device_model(
    source: Path | Checkpoint,
    device: torch.device | str,
    progress: Report | None = None,
    draft_ids: Sequence[int] | None = None,
    packed_cache: bool = False,
    ranks: Ranks = ALONE,
    dtype: torch.dtype | None = None,
    fp8_products: bool = True,
) -> DeviceModel:
    """Returns the model with its weights; `obstacle` must be None.

    Args:
        source: as for `load_checkpoint`.
        progress: as for `load_checkpoint`.
        draft_ids: the tokens that may be drafted; None for all.
        packed_cache: whether latents are cached in FP8.
        ranks: the ranks that share the model; each reads only what it holds.
        dtype: as for `empty_device_model`.
        fp8_products: as for `empty_device_model`.

    Raises:
        CheckpointError: as `open_checkpoint`.
    """
    checkpoint = open_checkpoint(source) if isinstance(source, Path) else source
    model = empty_device_model(checkpoint, device, draft_ids, packed_cache, ranks, dtype, fp8_products)
    slots, block = model.checkpoint_slots(), square_block(checkpoint.config)
    with torch.no_grad():
        for name, first, value, scale in read_weights(rank_part(checkpoint, slots, ranks), progress, device):
            if scale is None:
                _put(slots[name], first, value)
            elif name + SCALE in slots:
                # as bytes: on a CPU torch copies e4m3 element by element
                slots[name].view(torch.uint8).copy_(value.view(torch.uint8).reshape(slots[name].shape))
                slots[name + SCALE].copy_(scale.reshape(slots[name + SCALE].shape))
            else:
                wide = _widened(value, scale, block, slots[name])
                rows = slots[name].numel() // wide.shape[1]
                _put(slots[name], 0, wide[len(wide) - rows :])  # rows that only complete a block come first
    model.finish()
    return model


def _widened(value: Tensor, scale: Tensor, block: int, slot: Tensor) -> Tensor:
    """Returns an FP8 matrix in the type of its place, on the place's device."""
    if slot.device.type == "cpu":
        return dequantise(value.cpu(), scale.cpu(), block, slot.dtype)
    return weight_dequant(value.to(slot.device), scale.to(slot.device), block, slot.dtype)


def _put(slot: Tensor, first: int, value: Tensor) -> None:
    """Writes rows of a checkpoint's matrix to their place, which may have an extra dimension for shared experts."""
    if slot.ndim == value.ndim:
        slot[first : first + len(value)] = value
    elif slot.shape[-1] == value.shape[-1]:  # [shared, I, D]: the experts' rows one after another
        for row, part in zip(range(first, first + len(value)), value, strict=True):
            slot[row // slot.shape[1], row % slot.shape[1]] = part
    else:  # [D, shared, I]
        slot[first : first + len(value)] = value.reshape(len(value), *slot.shape[1:])
