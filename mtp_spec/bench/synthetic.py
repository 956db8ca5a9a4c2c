"""A checkpoint with DeepSeek-V3's names, dtypes and shapes but random values, for benchmarks.

Values are pieces of two random blocks, so that files are written as fast as the disk allows. The scale of weights keeps
activations finite. Every block of FP8 weights holds e4m3's largest number and has a power of two as its scale, so that
a cast to bfloat16 and back restores the same bits.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mtp_spec.errors import OptionError
from mtp_spec.kernels.fp8 import BLOCK, E4M3, E4M3_MAX, block_counts
from mtp_spec.model.checkpoint.convert import sharded
from mtp_spec.model.checkpoint.found import shared_copies
from mtp_spec.model.checkpoint.jobs import Job, Task
from mtp_spec.model.checkpoint.narrow import is_packed
from mtp_spec.model.checkpoint.writer import Output, as_json
from mtp_spec.model.config import ModelConfig
from mtp_spec.model.files.formats import SCALE
from mtp_spec.model.files.tensors import DTYPES
from mtp_spec.model.transformer import Transformer

TILE_NUMBERS = 2**23
LARGEST, LARGEST_SIGN = 0x7E, 0x80  # e4m3's 448; the bit of the sign
BIAS = 0.01  # of the gates' biases


def with_module(config: ModelConfig) -> ModelConfig:
    """Returns the shape in FP8, with one MTP module, which is like the shape's own layers if it names none."""
    return replace(config, num_nextn_predict_layers=1, fp8_block=(BLOCK, BLOCK))


def fitted(full: ModelConfig, gigabytes: float, layers: int, ranks: int) -> ModelConfig:
    """Returns a model of `layers` layers and the MTP module, with experts as wide as fit into `gigabytes`.

    Args:
        full: DeepSeek-V3's shape; its first layer stays dense, its experts are at most as wide.
        ranks: number of ranks that must divide it into whole blocks.

    Raises:
        OptionError: not even the narrowest experts fit.
    """
    config = replace(full, num_hidden_layers=layers, first_k_dense_replace=min(1, layers - 1))
    step = BLOCK * ranks
    for width in range(full.moe_intermediate_size // step * step, 0, -step):
        config = replace(config, moe_intermediate_size=width)
        size = sum(output.bytes for output in outputs(config))
        if size <= gigabytes * 1e9:
            return config
    raise OptionError(f"--gigabytes {gigabytes:g}: {layers} layers and {ranks} ranks need {size / 1e9:.3g} or more")


def outputs(config: ModelConfig) -> list[Output]:
    """Returns a checkpoint's tensors, not yet assigned to files: released names, copies in MTP modules included."""
    with torch.device("meta"):
        slots = Transformer(config, torch.bfloat16, "meta").checkpoint_slots()
    copies = {copy: slots[original] for copy, original in shared_copies(config).items()}
    found = []
    for name, slot in (slots | copies).items():
        shape = tuple(slot.shape)
        if is_packed(name, shape):
            found += [Output("", name, "F8_E4M3", shape), Output("", name + SCALE, "F32", block_counts(*shape))]
        else:
            found.append(Output("", name, "F32" if name.endswith("bias") else "BF16", shape))
    return found


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Random numbers that tensors are pieces of: e4m3 as bytes, and normal ones in bfloat16."""

    packed: Tensor
    wide: Tensor
    copies: dict[str, str]

    def __call__(self, nothing: list[Tensor], output: Output) -> Iterator[Tensor]:
        name = self.copies.get(output.name, output.name)
        if output.dtype == "F8_E4M3":
            weight = _piece(self.packed, name, output.shape)
            weight[::BLOCK, ::BLOCK] = LARGEST
            yield weight.view(E4M3)
        elif name.endswith(SCALE):
            # numbers spread evenly over e4m3's exponents: their root mean square is about a fifth of the largest
            size = math.sqrt(output.shape[1] * BLOCK) * E4M3_MAX / 5
            yield torch.full(output.shape, 2.0 ** -round(math.log2(size)))
        elif "norm" in name:
            yield torch.ones(output.shape, dtype=DTYPES[output.dtype])
        else:
            factor = BIAS if name.endswith("bias") else output.shape[-1] ** -0.5
            yield _piece(self.wide, name, output.shape).mul_(factor).to(DTYPES[output.dtype])


def _piece(tile: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    """Returns numbers of the tile from an offset given by the name, wrapping around at its end."""
    out = torch.empty(math.prod(shape), dtype=tile.dtype)
    start, done = zlib.crc32(name.encode()) % len(tile), 0
    while done < len(out):
        part = tile[start : start + len(out) - done]
        out[done : done + len(part)] = part
        start, done = 0, done + len(part)
    return out.view(shape)


def synthetic_job(config: ModelConfig, shard_bytes: int) -> Job:
    """Returns the job that writes the checkpoint, in files of up to `shard_bytes`."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, LARGEST + 1, (TILE_NUMBERS,), dtype=torch.uint8, generator=generator)
    packed |= torch.randint(0, 2, packed.shape, dtype=torch.uint8, generator=generator) * LARGEST_SIGN
    wide = torch.randn(TILE_NUMBERS, generator=generator).bfloat16()
    tiles = _Tiles(packed, wide, shared_copies(config))
    tensors = sharded(outputs(config), shard_bytes)
    tasks = [Task((), (output,), partial(tiles, output=output), output.bytes) for output in tensors]
    return Job("synthetic", tasks, {"config.json": as_json(config.to_hf_dict())}, index=True)
