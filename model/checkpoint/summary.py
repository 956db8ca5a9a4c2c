"""Summary of a checkpoint folder from configuration and file headers, whether or not its weights can be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from mtp_spec.model.checkpoint.folder import Checkpoint, open_checkpoint, unreadable
from mtp_spec.model.checkpoint.found import EMBEDDING, found_modules, shared_copies
from mtp_spec.model.config import ModelConfig, config_of, read_config
from mtp_spec.model.files.deepseek import layer_of
from mtp_spec.model.files.formats import SCALE, usual_names
from mtp_spec.model.files.tensors import TensorInfo, read_headers, unlisted_modules
from mtp_spec.model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class CheckpointSummary:
    """What a folder holds.

    Attributes:
        config: the model's shape, MTP modules as found in the files.
        bytes: total size of all tensors.
        dtypes: safetensors dtype -> number of tensors.
        parameters: of the main model (scales not counted).
        active: parameters that one token uses, without its embedding row.
        mtp_parameters: of the MTP modules, without the shared embedding and head.
        mtp_modules: a description of each module.
        refused: why `load` does not take the folder, or None.
        notes: anything unusual that was found.
    """

    config: ModelConfig
    files: int
    tensors: int
    bytes: int
    dtypes: dict[str, int]
    parameters: int
    active: int
    mtp_parameters: int
    mtp_modules: tuple[str, ...]
    refused: str | None
    notes: tuple[str, ...]


def checkpoint_summary(folder: Path) -> CheckpointSummary:
    """Returns what a folder holds; reads only config, file headers, and repeated embeddings and heads.

    Raises:
        CheckpointError: it is incomplete, or of another architecture. A folder in an unsupported weight format is
            still summarised.
    """
    return summed_up(*opened_or_refused(folder))


def summed_up(opened: Checkpoint, refused: str | None) -> CheckpointSummary:
    """Returns the summary of what was opened; `refused` is why it is not loaded."""
    config, tensors = opened.config, opened.tensors
    main, modules = _counted(config, tensors, refused is not None)
    used = config.num_experts_per_tok / config.n_routed_experts
    active = sum(
        int(size * used) if ".mlp.experts." in n else size
        for n, size in main.items()
        if n != EMBEDDING or config.tie_word_embeddings
    )
    dtypes: dict[str, int] = {}
    for info in tensors.values():
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + 1
    return CheckpointSummary(
        config=config,
        files=len({info.file for info in tensors.values()}),
        tensors=len(tensors),
        bytes=sum(info.bytes for info in tensors.values()),
        dtypes=dtypes,
        parameters=sum(main.values()),
        active=active,
        mtp_parameters=sum(modules.values()),
        mtp_modules=tuple(str(config.module(module)) for module in range(config.num_nextn_predict_layers)),
        refused=refused,
        notes=opened.notes,
    )


def opened_or_refused(folder: Path) -> tuple[Checkpoint, str | None]:
    """Returns the checkpoint, and the format that keeps it from being read; errors as `checkpoint_summary`."""
    file, given = read_config(folder)
    config = config_of(file, given)
    tensors = read_headers(folder)
    further, taken = unlisted_modules(folder, tensors, config.num_hidden_layers)
    tensors = usual_names({**tensors, **further}, config.fp8_block or (128, 128))
    refused = unreadable(given, config, tensors)
    if refused is None:
        return open_checkpoint(folder), None
    config, counted = found_modules(config, tensors)
    return Checkpoint(folder, config, tensors, (*taken, *counted)), refused


def _counted(
    config: ModelConfig, tensors: Mapping[str, TensorInfo], by_shape: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Returns counts for the main model and for the modules, without repeated tensors and scales."""
    if by_shape:  # packed tensors hold several numbers per element
        slots = Transformer(config, torch.bfloat16, "meta").checkpoint_slots()
        sizes = {name: slot.numel() for name, slot in slots.items()}
    else:
        copies = shared_copies(config)
        sizes = {n: prod(i.shape) for n, i in tensors.items() if not n.endswith(SCALE) and n not in copies}
    main = {n: size for n, size in sizes.items() if layer_of(n) < config.num_hidden_layers}
    return main, {n: size for n, size in sizes.items() if n not in main}
