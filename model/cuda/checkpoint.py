"""A Hugging Face folder onto the FP8 kernels: weights as they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from mtp_spec.kernels.fp8_cpu import dequantise
from mtp_spec.model.checkpoint.folder import Checkpoint, Report, open_checkpoint, rank_part, read_weights
from mtp_spec.model.cuda.model import DeviceModel, why_not
from mtp_spec.model.distributed.group import ALONE, Ranks
from mtp_spec.model.files.formats import SCALE
from mtp_spec.model.files.tensors import listing


def fp8_obstacle(checkpoint: Checkpoint) -> str | None:
    """Returns why a checkpoint cannot run on the FP8 kernels, or None; see `device.why_not`."""
    reason = why_not(checkpoint.config)
    if reason is not None:
        return reason
    packed, tensors = empty_device_model(checkpoint, "meta").checkpoint_slots(), checkpoint.tensors
    other = [name for name in sorted(tensors) if name + SCALE in packed and checkpoint.dtype(name) != "F8_E4M3"]
    return f"{listing(other)} {'is' if len(other) == 1 else 'are'} not stored in FP8" if other else None


def empty_device_model(
    checkpoint: Checkpoint, device: torch.device | str, draft_ids: Sequence[int] | None = None,
    packed_cache: bool = False, ranks: Ranks = ALONE,
) -> DeviceModel:  # fmt: skip
    """Returns a model with room for the checkpoint's weights, without them; on "meta" it costs nothing."""
    stored = {name.split(".", 3)[-1]: info.dtype for name, info in checkpoint.tensors.items()}
    router = torch.float32 if stored.get("mlp.gate.weight") == "F32" else torch.bfloat16
    eh_packed = stored.get("eh_proj.weight") == "F8_E4M3"
    return DeviceModel(checkpoint.config, device, eh_packed, router, draft_ids, packed_cache, ranks)


def load_device_model(
    source: Path | Checkpoint,
    device: torch.device | str,
    progress: Report | None = None,
    draft_ids: Sequence[int] | None = None,
    packed_cache: bool = False,
    ranks: Ranks = ALONE,
) -> DeviceModel:
    """Returns the model with its FP8 weights as they are stored; `fp8_obstacle` is None.

    Args:
        source, progress: as for `load_checkpoint`.
        draft_ids: the tokens that drafts may be; None for all.
        packed_cache: whether latents are cached in FP8.
        ranks: that share the model; this one reads what it holds.

    Raises:
        CheckpointError: as `open_checkpoint`.
    """
    checkpoint = open_checkpoint(source) if isinstance(source, Path) else source
    model = empty_device_model(checkpoint, device, draft_ids, packed_cache, ranks)
    slots = model.checkpoint_slots()
    with torch.no_grad():
        for name, first, value, scale in read_weights(rank_part(checkpoint, slots, ranks), progress, device):
            if scale is None:
                slots[name][first : first + len(value)] = value
            elif name + SCALE in slots:
                # as bytes: on a CPU torch copies e4m3 number by number
                slots[name].view(torch.uint8).copy_(value.view(torch.uint8).reshape(slots[name].shape))
                slots[name + SCALE].copy_(scale.reshape(slots[name + SCALE].shape))
            else:
                whole = dequantise(value.cpu(), scale.cpu(), 128, torch.float32)
                slots[name].copy_(whole[len(whole) - len(slots[name]) :])
    model.finish()
    return model
