"""Estimates a model's memory and speed from its configuration alone: `mtp-spec inspect CONFIG.json`.

Memory follows from shapes: tensors are divided among ranks as in DeepSeek's code (`mtp_spec.model.files.deepseek`), and
are FP8 where released checkpoints have it. Speed is an upper bound for one sequence with plain decoding: the card's
copy rate over the bytes of weights that a token reads on a rank. Launches, communication and the cache are ignored, and
chosen experts are assumed to be spread evenly over ranks; speculation multiplies it by at most the tokens per step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mtp_spec.errors import OptionError
from mtp_spec.kernels.fp8 import BLOCK
from mtp_spec.model.checkpoint.narrow import is_packed
from mtp_spec.model.config import ModelConfig, config_of, read_config
from mtp_spec.model.files.deepseek import place
from mtp_spec.model.files.formats import Format, stored_format
from mtp_spec.model.files.keys import key_notes
from mtp_spec.model.transformer import Transformer

# TB/s read and written together by a device copy of 2 GiB, as measured by `bench step`. H100: from
# docs/results/step_h100.json. H200: the same copy, on a machine without a published result
COPY_RATES = {"H100": 2.44, "H200": 4.28}
WIDE_BYTES = 2
SCALE_BYTES = 4
MULTIPLE = 1e12


@dataclass(frozen=True, slots=True)
class Estimate:
    """Memory and reads of one of `ranks` ranks.

    Attributes:
        weights: bytes on a rank.
        whole: bytes of the whole model, each weight counted once.
        read: bytes of weights that a token reads on a rank.
        cache: bytes per token of context on every rank, in bfloat16.
        tokens_per_second: upper bound for one sequence; None without a card.
    """

    ranks: int
    weights: int
    whole: int
    read: int
    cache: int
    copy_rate: float | None

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.copy_rate is None else self.copy_rate * MULTIPLE / self.read


def estimate(
    config: ModelConfig, ranks: int = 1, copy_rate: float | None = None, stored: Format | None = None
) -> Estimate:
    """Returns the estimate for `ranks` cards that copy `copy_rate` TB/s each, with weights in a format.

    Raises:
        OptionError: the number of ranks does not divide the experts or the heads.
    """
    if ranks < 1 or config.n_routed_experts % ranks or config.num_attention_heads % ranks:
        raise OptionError(
            f"--model-parallel {ranks}: a divisor of {config.n_routed_experts} experts and of "
            f"{config.num_attention_heads} heads"
        )
    weights = whole = read = 0.0
    for name, slot in Transformer(config, torch.bfloat16, "meta").checkpoint_slots().items():
        size = _stored_bytes(name, tuple(slot.shape), slot.element_size(), config, stored)
        where = place(name)
        shared = where.axis is not None or where.expert is not None
        whole += size
        weights += size / ranks if shared else size
        if where.expert is not None:
            size *= config.num_experts_per_tok / config.n_routed_experts
        if where.layer < config.num_hidden_layers and (where.name != "embed.weight" or config.tie_word_embeddings):
            read += size / ranks if shared else size
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    cache = layers * (config.kv_lora_rank + config.qk_rope_head_dim) * WIDE_BYTES
    return Estimate(ranks, round(weights), round(whole), round(read), cache, copy_rate)


def _stored_bytes(name: str, shape: tuple[int, ...], wide: int, config: ModelConfig, stored: Format | None) -> float:
    numbers = torch.Size(shape).numel()
    if stored is not None and stored.block is None:
        packed = stored.bits is not None and is_packed(name, shape) and stored.packs(name)
        return numbers * (stored.bits or 0) / 8 if packed else numbers * wide
    if config.fp8_block is None or not is_packed(name, shape):
        return numbers * wide
    return numbers + SCALE_BYTES * -(-shape[0] // BLOCK) * -(-shape[1] // BLOCK)


def card_rate(card: str | None, copy_rate: float | None) -> float | None:
    """Returns the TB/s of a named card, or the given rate.

    Raises:
        OptionError: the card is unknown, or both are given.
    """
    if card is not None and copy_rate is not None:
        raise OptionError("--card excludes --copy-rate: give one")
    if copy_rate is not None and copy_rate <= 0:
        raise OptionError(f"--copy-rate {copy_rate}: TB/s above 0")
    if card is None:
        return copy_rate
    if card.upper() not in COPY_RATES:
        raise OptionError(f"--card {card}: measured were {', '.join(COPY_RATES)}; give --copy-rate TB/s for others")
    return COPY_RATES[card.upper()]


def show_estimate(file: Path, ranks: int, copy_rate: float | None, as_json: bool) -> None:
    """Prints the estimate for a configuration file."""
    path, given = read_config(file)
    config, stored = config_of(path, given), stored_format(given)
    found = estimate(config, ranks, copy_rate, stored)
    refused = stored.refusal() if stored is not None and stored.block is None else None
    speed = found.tokens_per_second
    if as_json:
        print(
            json.dumps(
                {
                    "ranks": ranks,
                    "weight_bytes": found.weights,
                    "whole_bytes": found.whole,
                    "read_bytes_per_token": found.read,
                    "cache_bytes_per_token": found.cache,
                    "copy_rate_tb_per_s": copy_rate,
                    "tokens_per_second_at_best": speed,
                    "refused": refused,
                }
            )
        )
        return
    kind = "bfloat16" if config.fp8_block is None else "FP8"
    if stored is not None and stored.block is None:
        known = stored.bits is not None
        kind = stored.name if known else f"bfloat16, as the size of {stored.name} is not known here"
    context, each, on = config.max_position_embeddings, "", ""
    if ranks > 1:
        each, on = f", {found.weights / 1e9:,.1f} GB on each of {ranks} ranks", " on every rank"
    modules = config.num_nextn_predict_layers
    kinds = ", ".join(str(config.module(module)) for module in range(modules))
    counted = f"{modules}, counted: {kinds}" if modules else "none counted in this file: a folder's tensors decide"
    rows = {
        "weights": f"{found.whole / 1e9:,.1f} GB in {kind}{each}",
        "MTP modules": counted,
        "cache": f"{found.cache:,} bytes a token{on}, {found.cache * context / 1e9:,.1f} GB for all {context:,} tokens",
        "read for a token": f"{found.read / 1e9:,.2f} GB of weights{on}",
        "speed": f"give --card {' or '.join(COPY_RATES)}, or --copy-rate, for an estimate",
    }
    if speed is not None:
        rows["speed"] = (
            f"at best {speed:,.0f} tokens/s of one text without speculation: an estimate, bytes read over "
            f"{copy_rate} TB/s; launches, communication and cache left out"
        )
    if refused is not None:
        rows["load"] = f"refused: {refused}"
    notes = key_notes(given)
    if notes:
        rows["notes"] = "\n".join(notes)
    table = Table(title=str(file), show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
