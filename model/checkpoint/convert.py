"""Hugging Face folders to DeepSeek's per-rank files and back, the same tensors bit for bit; see `ranks` for names.

The new folder keeps config.json and the other small files unchanged. `model_args.json` holds the fields that
DeepSeek's own `generate.py --config` takes, if these can describe the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_spec.kernels.fp8 import BLOCK
from mtp_spec.model.checkpoint.folder import Checkpoint, open_checkpoint
from mtp_spec.model.checkpoint.jobs import Job, Task, carried_files
from mtp_spec.model.checkpoint.writer import CHECKSUMS, Output, as_json
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.errors import CheckpointError
from mtp_spec.model.files.deepseek import Place, place, rank_files
from mtp_spec.model.files.dialects import DEEPSEEK_KEYS
from mtp_spec.model.files.formats import SCALE
from mtp_spec.model.files.tensors import Part, TensorInfo, listing, read_part

ARGS = "model_args.json"
SHARD_BYTES = 5 * 10**9  # per Hugging Face file, as that library writes them
ARG_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "first_k_dense_replace", "num_attention_heads", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
    "n_group", "topk_group", "routed_scaling_factor", "scoring_func", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_theta",
)  # fmt: skip
# not among DeepSeek's fields; its files or its tokenizer say these
UNSAID: dict[str, Any] = {"num_nextn_predict_layers": 0, "modules": (), "bos_token_id": None, "eos_token_ids": ()}


def ranks_job(folder: Path, ranks: int, *, n_experts: int | None = None, config_file: Path | None = None) -> Job:
    """Returns the job that writes per-rank files.

    Args:
        folder: a Hugging Face folder, or per-rank files of another number of ranks.
        ranks: number of ranks to write for.
        n_experts: routed experts per layer; checked against the config.
        config_file: describes the model in place of the folder's config.json.

    Raises:
        CheckpointError: the folder is incomplete, or something cannot be divided among that many ranks.
    """
    checkpoint = open_checkpoint(folder, config_file)
    config = checkpoint.config
    if n_experts is not None and n_experts != config.n_routed_experts:
        raise CheckpointError(f"--n-experts {n_experts}: config.json says {config.n_routed_experts}; leave it out")
    places = {name: place(name) for name in checkpoint.tensors if not name.endswith("rotary_emb.inv_freq")}
    _check_ranks(checkpoint, places, ranks)
    names = sorted(places, key=lambda name: _where(checkpoint.tensors[name]))
    tasks = [_divided(name, places[name], checkpoint, ranks) for name in names]
    files, scale_fmt = small_files(checkpoint, config_file)
    args = model_args(config, scale_fmt)
    if args is not None:
        files[ARGS] = as_json(args)
    return Job(f"convert to {ranks} ranks", tasks, files, index=False)


def hf_job(folder: Path, *, config_file: Path | None = None, shard_bytes: int = SHARD_BYTES) -> Job:
    """Returns the job that writes a Hugging Face folder from per-rank files; arguments and errors as `ranks_job`."""
    if not rank_files(folder):
        raise CheckpointError(f"{folder} has no model0-mp*.safetensors: --to-hf takes a folder of per-rank files")
    checkpoint = open_checkpoint(folder, config_file)
    tensors = checkpoint.tensors
    outputs = [Output("", name, info.dtype, info.shape) for name, info in tensors.items()]
    tasks = [gathered(output, tensors[output.name]) for output in sharded(outputs, shard_bytes)]
    return Job("convert to Hugging Face", tasks, small_files(checkpoint, config_file)[0], index=True)


def sharded(outputs: Iterable[Output], shard_bytes: int) -> list[Output]:
    """Returns outputs in the order of layers, in files of up to `shard_bytes` with Hugging Face's names."""
    shards: list[list[Output]] = [[]]
    size = 0
    for output in sorted(outputs, key=lambda output: (place(output.name).layer, output.name)):
        if shards[-1] and size + output.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += output.bytes
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    return [replace(output, file=name) for name, shard in zip(names, shards, strict=True) for output in shard]


def _where(info: TensorInfo) -> tuple[str, int]:
    return str(info.file), info.parts[0].start


def _check_ranks(checkpoint: Checkpoint, places: dict[str, Place], ranks: int) -> None:
    config = checkpoint.config
    if ranks < 1:
        raise CheckpointError(f"--model-parallel {ranks}: give 1 or more")
    whole = {"n_routed_experts": config.n_routed_experts, "num_attention_heads": config.num_attention_heads}
    problems = [f"{name} {count} is no multiple of it" for name, count in whole.items() if count % ranks]
    for name, where in places.items():
        info = checkpoint.tensors[name]
        if where.axis is None:
            continue
        share, rest = divmod(info.shape[where.axis], ranks)
        if rest or (name + SCALE in places and share % BLOCK and ranks > 1):
            unit = "" if rest else f" into whole blocks of {BLOCK} with one scale"
            problems.append(f"{name} {list(info.shape)} cannot be divided along axis {where.axis}{unit}")
    if problems:
        raise CheckpointError(f"--model-parallel {ranks}: {listing(problems)}; give a smaller power of two")


def _divided(name: str, where: Place, checkpoint: Checkpoint, ranks: int) -> Task:
    info, config = checkpoint.tensors[name], checkpoint.config
    owners: Iterable[int] = range(ranks)
    if where.expert is not None:
        owners = [where.expert // (config.n_routed_experts // ranks)]
    shape = list(info.shape)
    if where.axis is not None:
        shape[where.axis] //= ranks
    files = [where.file(rank, ranks, config.num_hidden_layers) for rank in owners]
    outputs = tuple(Output(file, where.name, info.dtype, tuple(shape)) for file in files)
    work: Callable[[list[Tensor]], Iterable[Tensor]] = partial(_split, axis=where.axis, count=len(outputs))
    strided = where.axis == 1 and ranks > 1
    return Task((info,), outputs, work, outputs[0].bytes if strided else 0)


def _split(tensors: list[Tensor], axis: int | None, count: int) -> Iterable[Tensor]:
    return [tensors[0]] * count if axis is None else tensors[0].chunk(count, axis)


def gathered(output: Output, info: TensorInfo) -> Task:
    """Returns the task that writes a whole tensor, from wherever its parts lie."""
    copies = info.parts[1:] if info.axis is None else ()
    extra = info.bytes if copies else info.parts[0].shape[info.axis or 0] * info.bytes // max(1, info.shape[0])
    return Task((info,), (output,), partial(_compared, copies=copies, output=output), extra)


def _compared(tensors: list[Tensor], copies: tuple[Part, ...], output: Output) -> Iterator[Tensor]:
    """Yields a tensor that all ranks hold, after checking that their copies are equal."""
    for part in copies:
        other = read_part(part, output.dtype)
        if not torch.equal(other.view(-1).view(torch.uint8), tensors[0].view(-1).view(torch.uint8)):
            raise CheckpointError(f"{part.file.name} holds another {output.name} than rank 0: convert again")
    yield tensors[0]


def small_files(checkpoint: Checkpoint, config_file: Path | None) -> tuple[dict[str, bytes], str | None]:
    """Returns the small files of the new folder, and the scale format that the config names."""
    files = carried_files(checkpoint.folder)
    for name in (CHECKSUMS, ARGS):
        files.pop(name, None)
    if config_file is not None:
        files["config.json"] = config_file.read_bytes()
    given = json.loads(files["config.json"])
    quantisation = given.get("quantization_config") or {}
    scale_fmt = given.get("scale_fmt") or quantisation.get("scale_fmt")
    if checkpoint.config.fp8_block is not None and quantisation.get("config_groups"):
        # compressed-tensors' blocks, whose scales have DeepSeek's names from here on
        given["quantization_config"] = checkpoint.config.to_hf_dict()["quantization_config"]
        files["config.json"] = as_json(given)
    if "model_type" not in given:  # DeepSeek's own fields
        values = checkpoint.config.to_hf_dict()
        if scale_fmt and "quantization_config" in values:
            values["quantization_config"]["scale_fmt"] = scale_fmt
        files["config.json"] = as_json(values)
    return files, scale_fmt


def model_args(config: ModelConfig, scale_fmt: str | None = None) -> dict[str, Any] | None:
    """Returns the fields of DeepSeek's `ModelArgs`, or None if they cannot describe the model."""
    theirs = {ours: name for name, ours in DEEPSEEK_KEYS.items()}
    args = {theirs.get(name, name): getattr(config, name) for name in ARG_FIELDS}
    args["q_lora_rank"] = config.q_lora_rank or 0
    args["dtype"] = "bf16" if config.fp8_block is None else "fp8"
    yarn = config.rope_scaling
    if yarn is None:
        args["max_seq_len"] = args["original_seq_len"] = config.max_position_embeddings
    else:
        args |= {"original_seq_len": yarn.original_max_position_embeddings, "rope_factor": yarn.factor,
                 "beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow, "mscale": yarn.mscale}  # fmt: skip
    if scale_fmt is not None:
        args["scale_fmt"] = scale_fmt
    understood = ModelConfig.from_dict(args)
    return args if replace(understood, **UNSAID) == replace(config, **UNSAID) else None
