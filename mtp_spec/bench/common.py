"""Shared by all benchmarks: prompts, a description of the machine, a table, one JSON document."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

import mtp_spec
from mtp_spec.api import LM
from mtp_spec.errors import OptionError
from mtp_spec.machine import processor_name
from mtp_spec.sampling.seeds import derived_seed

Row = dict[str, Any]


@dataclass(slots=True)
class Report:
    """Outcome of a benchmark.

    Attributes:
        title: above the table.
        rows: one dictionary for each line of the table; all have the same keys.
        facts: further facts, for the document only.
        failed: whether the claim that the benchmark checks does not hold; the program then exits with 1.
        silent: neither print nor write it, because another process does.
        notes: lines below the tables.
        tables: further tables, by title; what the document has of them is in the facts.
    """

    title: str
    rows: list[Row]
    facts: dict[str, Any] = field(default_factory=dict)
    failed: bool = False
    silent: bool = False
    notes: list[str] = field(default_factory=list)
    tables: dict[str, list[Row]] = field(default_factory=dict)


def bundled_prompts(count: int, seed: int = 0) -> list[Row]:
    """Returns `count` held-out prompts {"category", "prompt", "seed"} in random order.

    Past the end of the list they repeat. Each has its own generation seed (`mtp_spec.sampling.seeds`).
    """
    if count < 1:
        raise OptionError(f"--prompts {count}: give 1 or more")
    lines = (files("mtp_spec.configs") / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts: list[Row] = [json.loads(line) for line in lines]
    random.Random(seed).shuffle(prompts)
    return [{**prompts[i % len(prompts)], "seed": derived_seed(seed, i)} for i in range(count)]


def question(lm: LM, prompt: str) -> list[int]:
    """Returns the ids of a prompt as a chat, or as plain text for a model without chat template."""
    if lm.tokenizer is None:
        # a checkpoint without tokenizer: any ids will do
        return [(31 * i + len(prompt)) % lm.config.vocab_size for i in range(8)]
    if lm.tokenizer.template is None:
        return lm.encode(prompt)
    return lm.tokenizer.chat_ids([{"role": "user", "content": prompt}])


def machine(lm: LM | None) -> Row:
    """Returns the facts on machine and model that results depend on."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "mtp_spec": mtp_spec.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "model": None if lm is None else _model(lm),
    }


def _model(lm: LM) -> Row:
    return {
        "digest": weights_digest(lm),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "runs on": lm.model.runs_on,
        "rows": lm.technique,
        "parameters": sum(slot.numel() for slot in lm.model.checkpoint_slots().values()),
    }


def weights_digest(lm: LM) -> str:
    """Returns a short digest of the weights: of their names and sums."""
    slots = lm.model.checkpoint_slots()
    text = "".join(f"{name}{float(slot.detach().double().sum())!r}" for name, slot in slots.items())
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def resampled(
    columns: Sequence[Sequence[float]], statistic: Callable[[Any], Any], resamples: int = 1000
) -> tuple[float, float]:
    """Returns the bootstrap 95 % interval of a statistic of sums over prompts.

    Args:
        columns: the values to sum, with prompts in the same order in each.
        statistic: function of an array of sums, `[columns, resamples]`.
    """
    values = np.asarray(columns, dtype=float)
    chosen = np.random.default_rng(0).integers(0, values.shape[1], (resamples, values.shape[1]))
    low, high = np.quantile(statistic(values[:, chosen].sum(-1)), (0.025, 0.975))
    return float(low), float(high)


def median_interval(values: Sequence[float], resamples: int = 1000) -> tuple[float, float]:
    """Returns the bootstrap 95 % interval of a median over prompts, which outliers hardly affect."""
    chosen = np.random.default_rng(0).integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(np.median(np.asarray(values)[chosen], axis=1), (0.025, 0.975))
    return float(low), float(high)


def interval(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Returns the bootstrap 95 % interval of sum(values) / sum(weights), resampling prompts."""
    return resampled([values, weights], lambda sums: over(sums[0], sums[1]))


def over(part: Any, whole: Any) -> Any:
    """Returns part / whole, 0 where the whole is 0."""
    return np.divide(part, whole, out=np.zeros_like(part, dtype=float), where=np.asarray(whole) > 0)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the median and the quartiles."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return float(middle), float(low), float(high)


def average(values: Sequence[float]) -> float:
    return mean(values) if values else 0.0


def publish(report: Report, lm: LM | None, args: argparse.Namespace) -> None:
    """Prints the table, writes the document (to a temporary file first), exits with 1 if the report failed."""
    console = Console(quiet=report.silent)
    for title, rows in {report.title: report.rows, **report.tables}.items():
        console.print(table(title, rows))
    for note in report.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    if args.json is not None and not report.silent:
        write(args.json, (json.dumps(document(report, lm, args), indent=1) + "\n").encode())
        console.print(f"written to {args.json}")
    if report.failed:
        raise SystemExit(1)


def table(title: str, rows: list[Row]) -> Table:
    """Returns lines as a table."""
    shown = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    for name in rows[0] if rows else ():
        shown.add_column(name)
    for row in rows:
        shown.add_row(*map(_cell, row.values()))
    return shown


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def document(report: Report, lm: LM | None, args: argparse.Namespace) -> Row:
    """Returns everything about a run, as JSON values."""
    options = {name: _plain(value) for name, value in vars(args).items()}
    return {
        "benchmark": args.benchmark,
        "command": shlex.join(["mtp-spec", *sys.argv[1:]]) if len(sys.argv) > 1 else "mtp-spec bench",
        **machine(lm),
        "options": {name: value for name, value in options.items() if not callable(value)},
        "rows": report.rows,
        **report.facts,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def write(file: Path, content: bytes) -> None:
    """Writes a file atomically, and creates the folders above it."""
    part = file.with_name(file.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(content)
    part.replace(file)


def digest(value: Any) -> str:
    """Returns a digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
