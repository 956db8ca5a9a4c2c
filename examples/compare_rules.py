"""How much each acceptance rule accepts, and which keep the text: `python examples/compare_rules.py [PROMPTS]`."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

import mtp_spec
from mtp_spec.acceptance import RULES

lm = mtp_spec.load()
topics = ["a fox", "the sea", "a lost key", "two friends", "winter", "a clever cat", "a train", "the moon"]
prompts = [f"Tell me a story about {topic}" for topic in topics[: int(sys.argv[1]) if len(sys.argv) > 1 else None]]
options: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 60, "seed": 0}


def write(speculation: mtp_spec.Speculation | None) -> tuple[list[list[int]], mtp_spec.GenerationStats]:
    """Returns the ids of every text, and the sum of their statistics."""
    stats, texts = mtp_spec.GenerationStats(), []
    for prompt in prompts:
        result = lm.chat([{"role": "user", "content": prompt}], speculation=speculation, **options)
        stats = stats.merge(result.stats)
        texts.append(result.token_ids)
    return texts, stats


plain, _ = write(None)
table = Table("rule", "keeps", "same texts", "tokens per step", "accepted by depth", title="chain of 3, temperature 1")
for rule in ("coupled", *RULES):
    texts, stats = write(mtp_spec.Speculation(depth=3, acceptance=rule))
    keeps = "text" if rule == "coupled" else "distribution" if RULES[rule].lossless else "neither"
    same = sum(ids == other for ids, other in zip(texts, plain, strict=True))
    rates = " ".join(f"{rate:.2f}" for rate in stats.accepted_per_depth["conditional"])
    table.add_row(rule, keeps, f"{same} of {len(plain)}", f"{stats.tokens_per_step:.2f}", rates)
Console(width=100).print(table)
