"""Reads and writes Hugging Face checkpoint folders, strictly.

Every tensor in the files must have a place in the model, and every place a tensor of the right shape; all mismatches
are listed before the first byte of weights is read. Weights are read tensor by tensor, with the next ones read ahead
and FP8 dequantised on the way. DeepSeek's per-rank folders are read like Hugging Face's (`tensors`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mtp_spec.kernels.fp8 import E4M3, weight_quant
from mtp_spec.kernels.fp8_cpu import dequantise
from mtp_spec.model.checkpoint.adapter import with_modules
from mtp_spec.model.checkpoint.found import PIECE_BYTES, found_modules, own_copies, shared_copies
from mtp_spec.model.checkpoint.narrow import narrow
from mtp_spec.model.checkpoint.new_folder import new_folder
from mtp_spec.model.config import ModelConfig, config_of, read_config
from mtp_spec.model.distributed.group import ALONE, Ranks
from mtp_spec.model.errors import CheckpointError
from mtp_spec.model.files.formats import SCALE, WAY_OUT, format_of, stored_format, usual_names
from mtp_spec.model.files.keys import key_notes, tensor_needs
from mtp_spec.model.files.tensors import (
    INDEX,
    TensorInfo,
    listing,
    read_ahead,
    read_headers,
    unlisted_modules,
    widen_scales,
)
from mtp_spec.model.transformer import Transformer

NUMBERS = ("F8_E4M3", "BF16", "F16", "F32", "F64")
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder whose files fit its config.

    Attributes:
        config: the model's shape, MTP modules as found in the files.
        notes: anything unusual that was found.
        narrowed: names of matrices that become FP8 as they are read -> how many of the rows read are kept.
    """

    folder: Path
    config: ModelConfig
    tensors: Mapping[str, TensorInfo]
    notes: tuple[str, ...] = ()
    narrowed: Mapping[str, int] = field(default_factory=dict)

    def dtype(self, name: str) -> str:
        """Returns safetensors' name for a tensor's dtype after reading."""
        return "F8_E4M3" if name in self.narrowed else self.tensors[name].dtype


def _check(
    slots: Mapping[str, Tensor], tensors: Mapping[str, TensorInfo], config: ModelConfig, folder: Path | str
) -> None:
    """Compares names and shapes; raises one error that lists everything that does not fit."""
    places = {**slots, **{name: slots[original] for name, original in shared_copies(config).items() if name in tensors}}
    present = {n for n in tensors if not n.endswith(SCALE) and not n.endswith("rotary_emb.inv_freq")}
    missing = sorted(set(slots) - present)
    extra = sorted(present - set(places))
    shapes = [
        f"{name} is {list(tensors[name].shape)} instead of {list(places[name].shape)}"
        for name in sorted(present & set(places))
        if tensors[name].shape != tuple(places[name].shape)
    ]
    fp8 = [name for name in present if tensors[name].dtype == "F8_E4M3"]
    scales = {name for name in tensors if name.endswith(SCALE)}
    unscaled = sorted(name for name in fp8 if name + SCALE not in scales)
    unused = sorted(scales - {name + SCALE for name in fp8})
    shapes += _scale_shapes(tensors, [n for n in fp8 if n + SCALE in scales], config.fp8_block or (128, 128))
    problems = {
        "missing": missing,
        "left over": extra + unused,
        "of the wrong shape or kind": shapes,
        "FP8 without weight_scale_inv": unscaled,
    }
    needs = tensor_needs(extra)
    if needs:
        raise CheckpointError(f"{folder} is not supported: {needs}. Use transformers or another engine for it")
    lines = [f"{len(names)} {what}: {listing(names)}" for what, names in problems.items() if names]
    if lines:
        raise CheckpointError(
            f"{folder} does not match its config.json. " + "; ".join(lines) + ". Download the whole checkpoint "
            "again, or correct config.json"
        )


def _scale_shapes(tensors: Mapping[str, TensorInfo], names: list[str], block: tuple[int, int]) -> list[str]:
    wrong = []
    for name in names:
        expected = tuple(-(-n // b) for n, b in zip(tensors[name].shape, block, strict=False))
        scale = tensors[name + SCALE]
        if scale.dtype not in SCALE_DTYPES:
            wrong.append(f"{name}{SCALE} is {scale.dtype} instead of one of {', '.join(SCALE_DTYPES)}")
        if scale.shape != expected:
            wrong.append(f"{name}{SCALE} is {list(scale.shape)} instead of {list(expected)}")
    return wrong


def open_checkpoint(folder: Path, config_file: Path | None = None, mtp: Path | None = None) -> Checkpoint:
    """Returns what a folder describes and holds. The only weights read are repeated embeddings and heads.

    Args:
        folder: a Hugging Face folder, or one of per-rank files (`mtp_spec.model.files.deepseek`).
        config_file: describes the model in place of the folder's config.json.
        mtp: a folder whose MTP modules take the place of the folder's own (`mtp_spec.model.checkpoint.adapter`).

    Raises:
        CheckpointError: anything missing, left over, mis-shaped, truncated, stored in another format or unsupported.
    """
    file, given = read_config(config_file or folder)
    config = config_of(file, given)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: give the checkpoint's folder")
    tensors = read_headers(folder)
    if mtp is None:
        further, taken = unlisted_modules(folder, tensors, config.num_hidden_layers)
        tensors |= further
    else:
        config, tensors, taken = with_modules(mtp, config, tensors)
    tensors = usual_names(tensors, config.fp8_block or (128, 128))
    refused = unreadable(given, config, tensors)
    if refused is not None:
        raise CheckpointError(f"{folder}: {refused}")
    config, counted = found_modules(config, tensors)
    with torch.device("meta"):
        places = Transformer(config, torch.bfloat16, "meta").checkpoint_slots()
    _check(places, tensors, config, folder if mtp is None else f"{folder} with mtp={str(mtp)!r}")
    config, own = own_copies(config, tensors)
    return Checkpoint(folder, config, tensors, (*key_notes(given), *taken, *counted, *own))


def unreadable(given: Mapping[str, Any], config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> str | None:
    """Returns why weights cannot be read (their format's name and a remedy), or None if they can.

    Args:
        given: config.json.
    """
    found = stored_format(given)
    if found is None or found.block is not None:
        found = format_of(tensors, config.fp8_block or (128, 128))
    if found is not None:
        return found.refusal()
    odd = sorted(name for name, info in tensors.items() if not _is_read(name, info))
    if odd:
        kinds = ", ".join(sorted({tensors[name].dtype for name in odd}))
        return f"{listing(odd)} {'is' if len(odd) == 1 else 'are'} {kinds}, read are {', '.join(NUMBERS)}: {WAY_OUT}"
    return None


def _is_read(name: str, info: TensorInfo) -> bool:
    """Whether a tensor's dtype is one that is read: integers are another format's codes, or exponents of scales."""
    return info.dtype in (*NUMBERS, *(SCALE_DTYPES if name.endswith(SCALE) else ()))


def load_checkpoint(
    source: Path | Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: Report | None = None,
    ranks: Ranks = ALONE,
) -> Transformer:
    """Returns the model in a Hugging Face folder.

    Args:
        source: the folder, or what `open_checkpoint` found in it.
        dtype: of the parameters; FP8 weights are dequantised to it.
        progress: called with (bytes done, bytes in all) after each tensor.
        ranks: the ranks that share the model; each reads only what it holds.

    Raises:
        CheckpointError: as `open_checkpoint`, or the model cannot be divided among the ranks.
    """
    opened = open_checkpoint(source) if isinstance(source, Path) else source
    config, block = opened.config, square_block(opened.config)
    model = Transformer(config, dtype, device, ranks)
    slots = model.checkpoint_slots()
    with torch.no_grad():
        for name, first, value, scale in read_weights(rank_part(opened, slots, ranks), progress):
            if scale is None:
                slots[name][first : first + len(value)] = value
            elif slots[name].device == value.device and slots[name].shape == value.shape:
                dequantise(value, scale, block, out=slots[name])
            else:
                whole = dequantise(value, scale, block, slots[name].dtype)
                slots[name].copy_(whole[len(whole) - len(slots[name]) :])  # rows that only complete a block come first
    return model


def square_block(config: ModelConfig) -> int:
    """Returns the side of FP8 weights' blocks.

    Raises:
        CheckpointError: they are not square.
    """
    rows, columns = config.fp8_block or (128, 128)
    if rows != columns:
        raise CheckpointError(f"weight_block_size {[rows, columns]}: only square blocks are supported")
    return rows


def rank_part(checkpoint: Checkpoint, slots: Mapping[str, Tensor], ranks: Ranks) -> Checkpoint:
    """Returns the checkpoint as a rank reads it: its experts and, of each matrix, as many rows as its slots.

    Rows with block scales begin at a block boundary, even if the rank's own rows begin later.
    """
    if ranks.size == 1:
        return checkpoint
    block = (checkpoint.config.fp8_block or (128, 128))[0]
    tensors: dict[str, TensorInfo] = {}
    narrowed: dict[str, int] = {}
    for name, info in checkpoint.tensors.items():
        slot = slots.get(name)
        if slot is None or name.endswith(SCALE):  # belongs to another rank, or is a scale, read with its weight
            continue
        count, scale = slot.numel() // prod(info.shape[1:]), checkpoint.tensors.get(name + SCALE)
        whole = range(info.shape[0])
        ways = (whole, whole[ranks.own(len(whole))], ranks.part(len(whole), block))
        first = next((way.start for way in ways if len(way) == count), None)
        if first is None:
            raise CheckpointError(f"{name} {list(info.shape)} cannot be divided among {ranks.size} ranks")
        packed = scale is not None or name in checkpoint.narrowed
        begin, end = first // block * block if packed else first, first + count
        if name in checkpoint.narrowed:  # all rows of a block share its scale
            narrowed[name], end = end - begin, min(-(-end // block) * block, len(whole))
        tensors[name] = info.rows(begin, end - begin)
        if scale is not None:
            tensors[name + SCALE] = scale.rows(begin // block, -(-end // block) - begin // block)
    return replace(checkpoint, tensors=tensors, narrowed=narrowed)


def stored_weights(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """Returns the tensors to read: all except repeated embeddings and heads, and tables that are computed."""
    copies = shared_copies(checkpoint.config)
    return {n: info for n, info in checkpoint.tensors.items()
            if n.removesuffix(SCALE) not in copies and not n.endswith("rotary_emb.inv_freq")}  # fmt: skip


def read_weights(
    checkpoint: Checkpoint, progress: Report | None, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, int, Tensor, Tensor | None]]:
    """Yields name, first row, rows as stored and float32 block scales of every weight, in file order.

    Weights with scales are yielded whole. Conversion to FP8 runs on `device`.
    """
    tensors, narrowed = stored_weights(checkpoint), checkpoint.narrowed

    def order(name: str) -> tuple[str, int, bool]:
        weight = name.removesuffix(SCALE)
        part = tensors[weight].parts[0]
        return str(part.file), part.start, name == weight  # scales just before their weight

    pieces: dict[tuple[str, int], TensorInfo] = {}
    for name in sorted(tensors, key=order):
        info = tensors[name]
        whole = name.endswith(SCALE) or name + SCALE in tensors or name in narrowed
        rows = info.shape[0] if whole else max(1, PIECE_BYTES * info.shape[0] // max(1, info.bytes))
        for first in range(0, info.shape[0], rows):
            pieces[name, first] = info.rows(first, min(rows, info.shape[0] - first))
    total, done = sum(info.bytes for info in tensors.values()), 0
    scales: dict[str, Tensor] = {}
    for (name, first), tensor in read_ahead(pieces):
        if name.endswith(SCALE):
            scales[name] = widen_scales(tensor)
        elif name in narrowed:
            yield name, first, *narrow(name, tensor, narrowed[name], device)
        else:
            yield name, first, tensor, scales.pop(name + SCALE, None)
        done += pieces[name, first].bytes
        if progress is not None:
            progress(done, total)


def save_checkpoint(
    model: Transformer,
    folder: Path,
    *,
    fp8: bool = False,
    max_shard_bytes: int = 15 * 2**20,
    extra_files: Mapping[str, str] | None = None,
) -> None:
    """Writes a Hugging Face folder under a temporary name and renames it when it is complete.

    Args:
        fp8: store matrices, other than embedding, head and gates, as e4m3 with 128x128 block scales.
        extra_files: file name -> text of further files to write.

    Raises:
        CheckpointError: the folder exists.
    """
    with new_folder(folder) as part:
        weight_map: dict[str, str] = {}
        total = 0
        shards = list(_shards(_stored(model, fp8), max_shard_bytes))
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            save_file(shard, part / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, name)
            total += sum(tensor.nbytes for tensor in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(part / INDEX, index)
        config = replace(model.config, fp8_block=(128, 128) if fp8 else None)
        _write_json(part / "config.json", config.to_hf_dict())
        for name, text in (extra_files or {}).items():
            (part / name).write_text(text, encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _stored(model: Transformer, fp8: bool) -> Iterator[tuple[str, Tensor]]:
    wide = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")
    for name, slot in model.checkpoint_slots().items():
        tensor = slot.detach().cpu().contiguous().clone()
        if fp8 and tensor.dim() == 2 and not name.endswith(wide):
            stored, scale = weight_quant(tensor)
            assert stored.dtype == E4M3
            yield name, stored
            yield name + SCALE, scale
        else:
            keep = not fp8 or name.endswith("e_score_correction_bias")
            yield name, tensor if keep else tensor.to(torch.bfloat16)


def _shards(tensors: Iterator[tuple[str, Tensor]], most: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > most:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard
