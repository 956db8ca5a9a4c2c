"""Export for other engines: a Hugging Face folder laid out like DeepSeek's released ones.

Engines load by name, and do not always report a missing tensor or one of another type. So the new folder has what the
released ones have: every MTP module with copies of embedding and head (LMDeploy reads them from there), its `eh_proj`
without block scales, all other projections of an FP8 model with them, and a config.json that names every field.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mtp_spec.kernels.fp8 import BLOCK
from mtp_spec.model.checkpoint.cast import narrowed, widened
from mtp_spec.model.checkpoint.convert import SHARD_BYTES, gathered, sharded, small_files
from mtp_spec.model.checkpoint.folder import Checkpoint, open_checkpoint
from mtp_spec.model.checkpoint.found import shared_copies
from mtp_spec.model.checkpoint.jobs import Job, Task
from mtp_spec.model.checkpoint.narrow import is_packed
from mtp_spec.model.checkpoint.writer import Output, as_json
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.errors import CheckpointError
from mtp_spec.model.files.dialects import DENSE, SPARSE
from mtp_spec.model.files.formats import POWERS, SCALE

# fields that engines read and DeepSeek's programs do not need
ALWAYS = {"moe_layer_freq": 1, "attention_bias": False, "torch_dtype": "bfloat16"}


def export_job(
    folder: Path, *, config_file: Path | None = None, mtp: Path | None = None, shard_bytes: int = SHARD_BYTES
) -> Job:
    """Returns the job that writes the folder.

    Args:
        folder: a Hugging Face folder, or per-rank files.
        config_file: describes the model in place of the folder's config.json.
        mtp: a folder whose MTP modules take the place of the folder's own, as for `open_checkpoint`.
        shard_bytes: largest size of a file.

    Raises:
        CheckpointError: the folder is incomplete, has no MTP modules, or its FP8 blocks are not 128x128.
    """
    checkpoint = open_checkpoint(folder, config_file, mtp)
    config = checkpoint.config
    if not config.num_nextn_predict_layers:
        raise CheckpointError(f"{folder} has no MTP modules: engines read such a folder as it is, there is no draft")
    if config.fp8_block not in (None, (BLOCK, BLOCK)):
        raise CheckpointError(f"weight_block_size {list(config.fp8_block or ())}: engines take {BLOCK}x{BLOCK} only")
    files, scale_fmt = small_files(checkpoint, config_file)
    files["config.json"] = as_json(_config(config, json.loads(files["config.json"])))
    tasks = list(_tasks(checkpoint, scale_fmt == POWERS))
    places = {o.name: o for o in sharded([output for task in tasks for output in task.writes], shard_bytes)}
    placed = [replace(task, writes=tuple(places[output.name] for output in task.writes)) for task in tasks]
    return Job("export", placed, files, index=True)


def _config(config: ModelConfig, given: dict[str, Any]) -> dict[str, Any]:
    """Returns the given fields, and those that are missing."""
    whole = config.to_hf_dict() | {"num_key_value_heads": config.num_attention_heads} | ALWAYS
    kept = {name: value for name, value in given.items() if value is not None}
    # transformers counts modules under another name, or not at all
    count = config.num_nextn_predict_layers
    values = {**whole, **kept, "num_nextn_predict_layers": count}
    if "num_mtp_layers" in values:
        values["num_mtp_layers"] = count
    kinds = [SPARSE if config.module(module).intermediate_size is None else DENSE for module in range(count)]
    if DENSE in kinds or "mtp_mlp_layer_types" in values:
        values["mtp_mlp_layer_types"] = kinds
    return values


def _tasks(checkpoint: Checkpoint, powers: bool) -> Iterator[Task]:
    """Yields the tasks that write every tensor."""
    tensors, fp8 = checkpoint.tensors, checkpoint.config.fp8_block is not None
    for name, info in tensors.items():
        weight = name.removesuffix(SCALE)
        packed = is_packed(weight, tensors[weight].shape)
        if name.endswith("rotary_emb.inv_freq") or (weight != name and not packed):
            continue
        if info.dtype == "F8_E4M3" and not packed:
            yield widened(name, tensors, BLOCK, "cpu")
        elif weight == name and info.dtype != "F8_E4M3" and packed and fp8:
            yield narrowed(name, info, "cpu", powers)
        else:
            yield gathered(Output("", name, info.dtype, info.shape), info)
    for copy, original in shared_copies(checkpoint.config).items():
        if copy not in tensors and copy.startswith("model.layers."):
            info = tensors[original]
            yield gathered(Output("", copy, info.dtype, info.shape), info)
