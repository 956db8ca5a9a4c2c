"""`bench compare`: two documents of `bench acceptance`, cell by cell."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from mtp_spec.bench.acceptance.metrics import BATCH, PACE, ratio_of_sums, sums
from mtp_spec.bench.common import Row, over, write
from mtp_spec.bench.options import JSON, Benchmark, Option, Switch
from mtp_spec.errors import OptionError

RESAMPLES = 1000
# what both runs must share for a meaningful difference: name -> how to read it from a document
COMMON: dict[str, Callable[[Row], Any]] = {
    "model": lambda document: document["model"]["digest"],
    "questions": lambda document: document["set"]["digest"],
    "max_new_tokens": lambda document: document["options"]["max_new_tokens"],
}
# speed-ups of two machines are two numbers, not a difference between programs
MACHINE = ("processor", "gpu", "threads")
# name -> what is summed, over what, and what is made of the sums
MEASURES: dict[str, tuple[tuple[str, ...], str, Callable[[Any], Any]]] = {
    "tokens_per_step": (("step_tokens", "steps"), "question", lambda column: over(column[0], column[1])),
    "times_plain": (PACE, BATCH, ratio_of_sums),
}


def compare(args: argparse.Namespace) -> None:
    """Shows tokens per step and speed-up of the cells that both documents have, with the interval of the difference.

    Intervals resample questions, the same ones in both. Where the questions differ they are resampled apart.
    """
    first, second = (_read(file) for file in args.files)
    different = [name for name, value in COMMON.items() if value(first) != value(second)]
    if different and not args.anyway:
        pairs = "; ".join(f"{name} {COMMON[name](first)} and {COMMON[name](second)}" for name in different)
        named = f"{args.files[0]} and {args.files[1]}"
        raise OptionError(f"{named} do not measure the same: {pairs}; --anyway compares them")
    both = [name for name in first["details"] if name in second["details"]]
    if not both:
        raise OptionError(f"{args.files[0]} and {args.files[1]} have no cell in common")
    cells = {name: _cell(first["details"][name], second["details"][name], not different) for name in both}
    only = {
        str(file): [name for name in document["details"] if name not in both]
        for file, document in zip(args.files, (first, second), strict=True)
    }
    machines = [", ".join(f"{name} {document[name]}" for name in MACHINE) for document in (first, second)]
    notes = [f"they differ in {', '.join(different)}"] if different else []
    notes += [f"measured on {machines[0]}, and on {machines[1]}"] if machines[0] != machines[1] else []
    _show(args, cells, only, notes)
    if args.json is not None:
        whole = {
            "benchmark": "compare",
            "files": [str(file) for file in args.files],
            "different": different,
            "cells": cells,
            "only": only,
        }
        write(args.json, (json.dumps(whole, indent=1) + "\n").encode())


BENCHMARK = Benchmark(
    name="compare",
    help="two documents of bench acceptance, cell by cell",
    run=compare,
    options=(
        Option("files", "documents: A, then B", type=Path, nargs=2, metavar="FILE.json"),
        Switch("--anyway", "compare even different models, questions or lengths"),
        JSON,
    ),
)


def _read(file: Path) -> Row:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"{file} is not a readable JSON document: {error}") from error
    ours = isinstance(document, dict) and document.get("benchmark") == "acceptance" and "set" in document
    if not ours or any("same_as" not in cell for cell in document["details"].values()):
        raise OptionError(f"{file} is not of this version's bench acceptance: make it again with --json")
    return document


def _cell(first: Row, second: Row, paired: bool) -> Row:
    questions = [{row["question"] for row in cell["texts"]} for cell in (first, second)]
    paired = paired and questions[0] == questions[1]
    result = {}
    for name, (columns, unit, statistic) in MEASURES.items():
        if first[name] is None or second[name] is None:
            continue  # speed is not measured together with a bound
        a, b = (np.asarray(sums(cell["texts"], *columns, by=unit), dtype=float) for cell in (first, second))
        values = [float(statistic(part.sum(1))) for part in (a, b)]
        result[name] = {
            "a": values[0],
            "b": values[1],
            "difference": values[1] - values[0],
            "interval": _interval(a, b, statistic, paired),
        }
    return result


def _interval(a: Any, b: Any, statistic: Callable[[Any], Any], paired: bool) -> tuple[float, float]:
    random = np.random.default_rng(0)
    chosen = random.integers(0, a.shape[1], (RESAMPLES, a.shape[1]))
    others = chosen if paired else random.integers(0, b.shape[1], (RESAMPLES, b.shape[1]))
    low, high = np.quantile(statistic(b[:, others].sum(-1)) - statistic(a[:, chosen].sum(-1)), (0.025, 0.975))
    return float(low), float(high)


def _show(args: argparse.Namespace, cells: Row, only: dict[str, list[str]], notes: Sequence[str]) -> None:
    console = Console()
    for line in (f"A: {args.files[0]}", f"B: {args.files[1]}", *notes):
        console.print(line, markup=False, soft_wrap=True)
    for measure, title in (("tokens_per_step", "Tokens per step"), ("times_plain", "Times plain, ratio of sums")):
        shown = Table(
            title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False
        )
        shown.add_column("cell")
        for name in ("A", "B", "B - A", "95 %"):
            shown.add_column(name, justify="right", no_wrap=True)
        for name, cell in cells.items():
            if measure in cell:
                shown.add_row(name, *_columns(cell[measure]))
        console.print("", shown)
    console.print("* the interval of the difference does not hold 0")
    for file, names in only.items():
        if names:
            console.print(f"only in {file}: {'; '.join(names)}", markup=False)


def _columns(measure: Row) -> list[str]:
    low, high = measure["interval"]
    mark = "*" if low > 0 or high < 0 else ""
    numbers = [f"{measure['a']:.2f}", f"{measure['b']:.2f}", f"{measure['difference']:+.2f}{mark}"]
    return [*numbers, f"{low:.2f} to {high:.2f}"]
