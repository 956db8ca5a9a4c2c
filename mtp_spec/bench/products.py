"""`bench kernels --what products`: products of DeepSeek-V3's shapes, compared with torch's block-scaled and cuBLAS's.

Each is replayed from a CUDA graph that cycles through enough copies of the weights that none is read from the cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtp_spec.bench.common import Row
from mtp_spec.bench.timing import CACHE_BYTES, REPLAYS, graph_time
from mtp_spec.bench.tuning import label, product_rounds, search
from mtp_spec.kernels import fp8, gemm, quant

SHAPES = (
    "2112x7168",
    "24576x1536",
    "7168x16384",
    "36864x7168",
    "7168x18432",
    "4096x7168",
    "7168x2048",
    "129280x7168",
    "129280x7168 bf16",
    "7168x14336 bf16",
)
TUNING_REPLAYS = 7
ROUNDS = 24  # least number of products in a graph
Operand = tuple[Tensor, Tensor | None]  # numbers, and scales unless they are bfloat16
Product = Callable[[Operand, Operand], Tensor]


@dataclass(slots=True)
class Case:
    """Copies of one matrix `[N, K]`."""

    name: str
    n: int
    k: int
    packed: bool
    weights: list[Operand]

    @classmethod
    def of(cls, name: str) -> Case:
        """Returns random matrices of a shape such as "4096x7168" or "4096x7168 bf16"."""
        size, _, kind = name.partition(" ")
        n, k = (int(part) for part in size.split("x"))
        case = cls(name, n, k, kind != "bf16", [])
        for _ in range(max(2, -(-CACHE_BYTES // (n * k * (1 if case.packed else 2))))):
            w = _random(n, k)
            scale = torch.rand(-(-n // fp8.BLOCK), -(-k // fp8.BLOCK), device="cuda") + 0.5
            case.weights.append((w.to(fp8.E4M3), scale) if case.packed else (w, None))
        return case

    def rows(self, m: int) -> Operand:
        """Returns random rows `[M, K]`."""
        x = _random(m, self.k)
        return quant.quant(x) if self.packed else (x, None)

    @property
    def default(self) -> gemm.Launch:
        """The launch that the library uses."""
        return gemm.default_launch(self.n, self.k, "fp8" if self.packed else "bf16")


def products(args: argparse.Namespace, rate: float, facts: dict[str, Any]) -> tuple[list[Row], dict[str, gemm.Launch]]:
    """Times products; returns lines and launches by shape, which `--tune` searches for."""
    rows: list[Row] = []
    launches = {}
    for name in args.shapes:
        case = Case.of(name)
        launch = _tune(case, facts["tried"].setdefault(name, {})) if args.tune else case.default
        launches[name] = launch
        exact = _row_invariant(case, launch)
        rows += [_row(case, m, launch, exact, rate, args.quick, facts["errors"]) for m in args.rows]
    return rows, launches


def _row(case: Case, m: int, launch: gemm.Launch, exact: bool, rate: float, quick: bool, errors: dict[str, str]) -> Row:
    a, w = case.rows(m), case.weights[0]
    out = _multiply(a, w, launch).float()
    expected = a[0].float() @ w[0].float().T if a[1] is None or w[1] is None else fp8.fp8_gemm(a[0], a[1], w[0], w[1])
    micro = _microseconds(partial(_multiply, launch=launch), a, case.weights)
    least = w[0].nbytes + (0 if w[1] is None else w[1].nbytes) + a[0].nbytes + out.numel() * 2
    beside = case.packed and not quick
    return {
        "kernel": "product",
        "shape": case.name,
        "M": m,
        "us": micro,
        "TB/s": least / micro / 1e6,
        "of copy": least / micro / 1e6 / rate,
        "TFLOP/s": 2 * m * case.n * case.k / micro / 1e6,
        "torch us": _torch_time(a, case.weights, errors) if beside else float("nan"),
        "bf16 us": float("nan") if quick else _bf16(case.n, case.k, m),
        "error": float((out - expected).norm() / expected.norm()),
        "rows exact": exact,
        "launch": label(launch),
    }


def _multiply(a: Operand, w: Operand, launch: gemm.Launch) -> Tensor:
    if a[1] is None or w[1] is None:
        return gemm.bf16_gemm(a[0], w[0], launch=launch)
    return gemm.fp8_gemm(a[0], a[1], w[0], w[1], launch=launch)


def _microseconds(product: Product, a: Operand, weights: list[Operand], replays: int = REPLAYS) -> float:
    """Returns microseconds of one product; the graph passes over all copies at least once."""
    rounds = max(1, ROUNDS // len(weights))

    def work() -> None:
        for _ in range(rounds):
            for w in weights:
                product(a, w)

    return graph_time(work, replays) / (rounds * len(weights))


def _tune(case: Case, tried: dict[str, Any]) -> gemm.Launch:
    """Returns the fastest launch for one and sixteen rows together."""
    inputs = [case.rows(m) for m in (1, 16)]

    def time(launch: gemm.Launch) -> float:
        product = partial(_multiply, launch=launch)
        return sum(_microseconds(product, a, case.weights, TUNING_REPLAYS) for a in inputs) / len(inputs)

    def run(launch: gemm.Launch) -> None:
        _multiply(inputs[0], case.weights[0], launch)

    return search(case.default, product_rounds(case.n, case.k), run, time, tried)


def _torch_time(a: Operand, weights: list[Operand], errors: dict[str, str]) -> float:
    """Returns the microseconds of torch's product, or infinity if it does not run; stores the reason."""
    try:
        _torch_product(a, weights[0])
        return _microseconds(_torch_product, a, weights)
    except Exception as error:  # any exception of a peer is a result
        errors[f"torch {tuple(weights[0][0].shape)}"] = repr(error)[:300]
        torch.cuda.synchronize()
        return float("inf")


def _torch_product(a: Operand, w: Operand) -> Tensor:
    """torch's block-scaled product (cuBLASLt), with its own layout of scales."""
    from torch.nn.functional import ScalingType, scaled_mm

    assert a[1] is not None
    assert w[1] is not None
    (x, x_scale), (matrix, scale) = (a[0], a[1]), (w[0], w[1])
    rows = -(-x.shape[0] // 4) * 4
    padded = x if rows == x.shape[0] else torch.cat((x, x.new_zeros(rows - x.shape[0], x.shape[1])))
    outer = torch.ones(x_scale.shape[1], rows, device=x.device).T
    outer[: x.shape[0]] = x_scale
    inner = torch.nn.functional.pad(scale, (0, -scale.shape[1] % 4)).T
    return scaled_mm(
        padded,
        matrix.T,
        outer,
        ScalingType.BlockWise1x128,
        inner,
        ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )


def _bf16(n: int, k: int, m: int) -> float:
    """Returns the microseconds of cuBLAS on bfloat16 weights, twice the bytes of FP8: the time to beat."""
    weights: list[Operand] = [(_random(n, k), None) for _ in range(max(2, -(-CACHE_BYTES // (2 * n * k))))]
    return _microseconds(lambda a, w: a[0] @ w[0].T, (_random(m, k), None), weights)


def _row_invariant(case: Case, launch: gemm.Launch) -> bool:
    a, w = case.rows(64), case.weights[0]
    whole = _multiply(a, w, launch)
    many = case.rows(16 * max(gemm.MANY_TILES, gemm.MANY_TILES_16))  # a kernel of its own, on Hopper
    last = many[0][-64:].contiguous(), None if many[1] is None else many[1][-64:].contiguous()
    if not torch.equal(_multiply(many, w, launch)[-64:], _multiply(last, w, launch)):
        return False
    for rows in (1, 2, 3, 5, 8, 16, 17, 32, 33, 63):
        part = a[0][-rows:].contiguous(), None if a[1] is None else a[1][-rows:].contiguous()
        if not torch.equal(_multiply(part, w, launch), whole[-rows:]):
            return False
    return True


def _random(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
