"""`bench kernels`: products, experts and attention of DeepSeek-V3's shapes, against the copy rate measured beside."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from mtp_spec.bench.common import Report, Row
from mtp_spec.bench.experts import CHANNELS, INNER, experts
from mtp_spec.bench.layers import attention
from mtp_spec.bench.products import products
from mtp_spec.bench.timing import copy_rate
from mtp_spec.bench.tuning import write
from mtp_spec.errors import OptionError

WHAT = ("products", "experts", "attention")
TOLERANCE = 2e-2  # relative to the reference, whose activations round elsewhere


def kernels(args: argparse.Namespace) -> Report:
    """Times products, experts and attention; `--tune` searches for launches of products and experts first."""
    if not torch.cuda.is_available():
        raise OptionError("bench kernels needs an NVIDIA GPU and this machine has none: torch finds no CUDA device")
    if args.tune and not {"products", "experts"} & set(args.what):
        raise OptionError("--tune is for products and experts: add them to --what")
    if args.write is not None and not args.tune:
        raise OptionError("--write writes what --tune finds: give both")
    rate = copy_rate()
    rows: list[Row] = []
    facts: dict[str, Any] = {"copy_TB_per_s": rate, "tried": {}, "errors": {}}
    found: dict[str, dict[str, Any]] = {}
    if "experts" in args.what:
        lines, chosen = experts(args.rows, rate, args.tune, facts)
        rows += lines
        found["moe.json"] = {f"{CHANNELS}x{INNER}": chosen}
    if "attention" in args.what:
        rows += attention(args.rows, rate)
    if "products" in args.what:
        lines, found["gemm.json"] = products(args, rate, facts)
        rows += lines
    if args.write is not None:
        write(args.write, found)
    failed = not all(row["rows exact"] and row["error"] < TOLERANCE for row in rows)
    return Report(f"kernels, few rows; device copy {rate:.2f} TB/s", rows, facts, failed)
