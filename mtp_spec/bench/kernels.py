"""`bench kernels`: products, experts and attention of DeepSeek-V3's shapes against the copy rate measured beside them.

Products are compared with torch's own block-scaled product and with cuBLAS in bfloat16 as well.

Everything is replayed from a CUDA graph that walks through enough copies of the weights that none is read from the
cache; the median of several replays, divided by the products in one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtp_spec.bench.common import Report, Row
from mtp_spec.bench.experts import CHANNELS, INNER, experts
from mtp_spec.bench.layers import attention
from mtp_spec.bench.timing import CACHE_BYTES, REPLAYS, copy_rate, graph_time
from mtp_spec.bench.tuning import label, product_rounds, search, write
from mtp_spec.errors import OptionError
from mtp_spec.kernels import fp8, gemm, quant

SHAPES = ((2112, 7168), (24576, 1536), (7168, 16384), (36864, 7168), (7168, 18432), (4096, 7168), (7168, 2048),
          (129280, 7168))  # fmt: skip
WHAT = ("products", "experts", "attention")
TUNING_REPLAYS = 7
TOLERANCE = 2e-2  # relative to the reference, whose activations round elsewhere
Product = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def kernels(args: argparse.Namespace) -> Report:
    """Times FP8 products, experts and attention; `--tune` searches for launches of products and experts first."""
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
        found["gemm.json"] = {}
        for n, k in SHAPES:
            lines, launch = _product(n, k, rate, args, facts)
            rows += lines
            found["gemm.json"][f"{n}x{k}"] = launch
    if args.write is not None:
        write(args.write, found)
    failed = not all(row["rows exact"] and row["error"] < TOLERANCE for row in rows)
    return Report(f"FP8 kernels, few rows; device copy {rate:.2f} TB/s", rows, facts, failed)


def _product(
    n: int, k: int, rate: float, args: argparse.Namespace, facts: dict[str, Any]
) -> tuple[list[Row], gemm.Launch]:
    """Times the products with one matrix; returns lines and the launch."""
    weights, scales = _weights(n, k)
    launch = gemm.default_launch(n, k)
    if args.tune:
        launch = _tune(weights, scales, facts["tried"].setdefault(f"{n}x{k}", {}))
    exact = _row_invariant(weights[0], scales[0], launch)
    ours = partial(gemm.fp8_gemm, launch=launch)
    rows: list[Row] = []
    for m in args.rows:
        a, a_scale = quant.quant(torch.randn(m, k, device="cuda", dtype=torch.bfloat16))
        out = ours(a, a_scale, weights[0], scales[0]).float()
        expected = fp8.fp8_gemm(a, a_scale, weights[0], scales[0])
        micro = _microseconds(ours, a, a_scale, weights, scales)
        least = weights[0].numel() + scales[0].nbytes + a.numel() + out.numel() * 2
        beside = not args.quick
        rows.append({
            "kernel": "product", "shape": f"{n}x{k}", "M": m, "us": micro, "TB/s": least / micro / 1e6,
            "of copy": least / micro / 1e6 / rate,
            "torch us": _torch_time(a, a_scale, weights, scales, facts["errors"]) if beside else float("nan"),
            "bf16 us": _bf16(n, k, m) if beside else float("nan"),
            "error": float((out - expected).norm() / expected.norm()), "rows exact": exact, "launch": label(launch),
        })  # fmt: skip
    return rows, launch


def _weights(n: int, k: int) -> tuple[list[Tensor], list[Tensor]]:
    copies = max(2, -(-CACHE_BYTES // (n * k)))
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16).to(fp8.E4M3) for _ in range(copies)]
    scales = [torch.rand(-(-n // 128), -(-k // 128), device="cuda") + 0.5 for _ in range(copies)]
    return weights, scales


def _microseconds(
    product: Product, a: Tensor, a_scale: Tensor, weights: list[Tensor], scales: list[Tensor], replays: int = REPLAYS
) -> float:
    """Returns microseconds of one product; the graph passes over all copies at least once."""
    rounds = max(1, 24 // len(weights))

    def work() -> None:
        for _ in range(rounds):
            for w, s in zip(weights, scales, strict=True):
                product(a, a_scale, w, s)

    return graph_time(work, replays) / (rounds * len(weights))


def _tune(weights: list[Tensor], scales: list[Tensor], tried: dict[str, Any]) -> gemm.Launch:
    """Returns the fastest launch for one and sixteen rows together."""
    n, k = weights[0].shape
    inputs = [quant.quant(torch.randn(m, k, device="cuda", dtype=torch.bfloat16)) for m in (1, 16)]

    def run(launch: gemm.Launch) -> None:
        gemm.fp8_gemm(*inputs[0], weights[0], scales[0], launch=launch)

    def time(launch: gemm.Launch) -> float:
        product = partial(gemm.fp8_gemm, launch=launch)
        return sum(_microseconds(product, *a, weights, scales, TUNING_REPLAYS) for a in inputs) / len(inputs)

    return search(gemm.default_launch(n, k), product_rounds(n, k), run, time, tried)


def _torch_time(
    a: Tensor, a_scale: Tensor, weights: list[Tensor], scales: list[Tensor], errors: dict[str, str]
) -> float:
    """Returns microseconds of torch's product, or infinity where it does not run; the reason is kept."""
    try:
        _torch_product(a, a_scale, weights[0], scales[0])
        return _microseconds(_torch_product, a, a_scale, weights, scales)
    except Exception as error:  # whatever a peer raises is a result
        errors[f"torch {tuple(weights[0].shape)}"] = repr(error)[:300]
        torch.cuda.synchronize()
        return float("inf")


def _torch_product(a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """torch's block-scaled product (cuBLASLt), with its own layout of scales."""
    from torch.nn.functional import ScalingType, scaled_mm

    rows = -(-a.shape[0] // 4) * 4
    padded = a if rows == a.shape[0] else torch.cat((a, a.new_zeros(rows - a.shape[0], a.shape[1])))
    outer = torch.ones(a_scale.shape[1], rows, device=a.device).T
    outer[: a.shape[0]] = a_scale
    inner = torch.nn.functional.pad(w_scale, (0, -w_scale.shape[1] % 4)).T
    return scaled_mm(padded, w.T, outer, ScalingType.BlockWise1x128, inner, ScalingType.BlockWise128x128,
                     output_dtype=torch.bfloat16)  # fmt: skip


def _bf16(n: int, k: int, m: int) -> float:
    """Returns microseconds of cuBLAS on bfloat16 weights: twice the bytes, the bar that must fall."""
    copies = max(2, -(-CACHE_BYTES // (2 * n * k)))
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    nothing = [x] * copies
    return _microseconds(lambda a, _, w, __: a @ w.T, x, x, weights, nothing)


def _row_invariant(w: Tensor, w_scale: Tensor, launch: gemm.Launch) -> bool:
    a, a_scale = quant.quant(torch.randn(64, w.shape[1], device="cuda", dtype=torch.bfloat16))
    whole = gemm.fp8_gemm(a, a_scale, w, w_scale, launch=launch)
    for rows in (1, 2, 3, 5, 8, 16, 17, 32, 33, 63):
        part = a[-rows:].contiguous(), a_scale[-rows:].contiguous()
        if not torch.equal(gemm.fp8_gemm(*part, w, w_scale, launch=launch), whole[-rows:]):
            return False
    return True
