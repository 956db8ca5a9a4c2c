"""`bench kernels`: products, experts and attention, of DeepSeek-V3's shapes or others, against the copy rate.

From 513 `--rows` on the kernels for many rows run, and "prompts" is attention over whole prompts.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from mtp_spec.bench import parsing
from mtp_spec.bench.common import Report, Row
from mtp_spec.bench.experts import DEFAULT, Mix, experts
from mtp_spec.bench.layers import CONTEXTS, HEADS, MOST_ROWS, attention, check_contexts
from mtp_spec.bench.options import JSON, Benchmark, Option, Switch, complete
from mtp_spec.bench.products import SHAPES, products
from mtp_spec.bench.prompts import prompts
from mtp_spec.bench.timing import copy_rate
from mtp_spec.bench.tuning import write
from mtp_spec.errors import OptionError

WHAT = ("products", "experts", "attention", "prompts")
# options of some kernels alone, and their defaults
OF: dict[str, dict[str, Any]] = {
    "products": {"shapes": SHAPES},
    "experts": {"experts": parsing.mixes(DEFAULT)},
    "attention": {"heads": HEADS, "contexts": CONTEXTS},
}
TOLERANCE = 2e-2  # relative to the reference, whose activations round elsewhere


def kernels(args: argparse.Namespace) -> Report:
    """Times products, experts and attention; `--tune` searches for launches of products and experts first."""
    if not torch.cuda.is_available():
        raise OptionError("bench kernels needs an NVIDIA GPU and this machine has none: torch finds no CUDA device")
    if args.tune and not {"products", "experts"} & set(args.what):
        raise OptionError("--tune is for products and experts: add them to --what")
    if args.write is not None and not args.tune:
        raise OptionError("--write writes what --tune finds: give both")
    own = {name: default for what in args.what for name, default in OF.get(what, {}).items()}
    why = f"is of kernels that --what {','.join(args.what)} leaves out: add them"
    complete(args, own, [name for names in OF.values() for name in names], why)
    if "attention" in args.what:
        check_contexts(args.rows, args.contexts)
    if set(args.what) == {"attention"} and min(args.rows) > MOST_ROWS:
        raise OptionError(
            f"--rows {','.join(map(str, args.rows))}: attention is timed for up to {MOST_ROWS} rows, --what prompts "
            "for whole prompts"
        )
    rate = copy_rate()
    rows: list[Row] = []
    facts: dict[str, Any] = {"copy_TB_per_s": rate, "tried": {}, "errors": {}}
    found: dict[str, dict[str, Any]] = {}
    if "experts" in args.what:
        found["moe.json"] = {}
        for mix in map(Mix.of, args.experts):
            lines, found["moe.json"][mix.tuned] = experts(mix, args.rows, rate, args.tune, facts)
            rows += lines
    if "attention" in args.what:
        rows += attention(args.rows, args.heads, args.contexts, rate)
    if "prompts" in args.what:
        rows += prompts(rate)
    if "products" in args.what:
        lines, found["gemm.json"] = products(args, rate, facts)
        rows += lines
    if args.write is not None:
        write(args.write, found)
    failed = not all(row["rows exact"] and row["error"] < TOLERANCE for row in rows)
    return Report(f"kernels, few rows; device copy {rate:.2f} TB/s", rows, facts, failed)


BENCHMARK = Benchmark(
    name="kernels",
    help="products, experts and attention on a GPU, against the copy rate",
    run=kernels,
    options=(
        JSON,
        Option("--rows", "rows to time", type=parsing.integers, default=[1, 4, 8, 16, 64], metavar="M,..."),
        Option(
            "--what",
            f"{', '.join(WHAT)} (all but the last)",
            type=parsing.chosen(WHAT),
            default=list(WHAT[:-1]),
            metavar="NAME,...",
        ),
        Option(
            "--shapes",
            "products to time (DeepSeek-V3's)",
            type=parsing.products,
            metavar="NxK,...",
        ),
        Option(
            "--experts",
            f"MoE layers to time ({DEFAULT}: D x I: chosen of experts)",
            type=parsing.mixes,
            metavar="DxI:C/E,...",
        ),
        Option("--heads", "attention's heads (128,16)", type=parsing.integers, metavar="N,..."),
        Option(
            "--contexts",
            "tokens in attention's cache (1024,8192,32768)",
            type=parsing.integers,
            metavar="N,...",
        ),
        Switch("--quick", "without torch's and cuBLAS's products beside"),
        Switch("--tune", "search for launches of products and experts first"),
        Option("--write", "put what --tune found there: kernels/tuned", type=Path, metavar="FOLDER"),
    ),
)
