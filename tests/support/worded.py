"""Tiny checkpoints with a tokenizer whose tokens are the words w0, w1, ..., and files of lines to train on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

import tiny

# options of a short run of `train`
FEW: dict[str, Any] = {
    "depth": 2, "steps": 6, "batch_tokens": 128, "max_tokens": 80, "check_prompts": 2, "check_tokens": 8, "batch": 4,
    "held_out": 0.25, "check_every": 2,
}  # fmt: skip


def make(folder: Path, kind: str = "v3", seed: int = 0) -> Path:
    """Writes a checkpoint of `tiny` with a tokenizer."""
    made = tiny.make(folder, kind, seed).folder
    size = tiny.V3["vocab_size"]
    tokenizer = Tokenizer(models.WordLevel({f"w{token}": token for token in range(size)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(made / "tokenizer.json"))
    return made


def words(count: int, seed: int) -> str:
    """Returns text of so many tokens."""
    chosen = random.Random(seed)
    return " ".join(f"w{chosen.randrange(96)}" for _ in range(count))


def lines(file: Path, entries: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


def texts(file: Path, count: int = 24, tokens: int = 40, domains: int = 2) -> Path:
    """Writes a file of texts, of 40 to 60 tokens, in domains a, b, ..."""
    return lines(
        file,
        [{"text": words(tokens + number % 20, number), "domain": "ab"[number % domains]} for number in range(count)],
    )
