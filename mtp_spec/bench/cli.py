"""`mtp-spec bench`: the benchmarks by name."""

from __future__ import annotations

import argparse

from mtp_spec.bench import (
    cache,
    cpu,
    exactness,
    files,
    heads,
    host,
    kernels,
    plan,
    prefill,
    replay,
    rows,
    side_by_side,
    speed,
    step,
    train,
)
from mtp_spec.bench.acceptance import command as acceptance
from mtp_spec.bench.acceptance import comparing
from mtp_spec.bench.options import Benchmark
from mtp_spec.bench.peers import command as peers

BENCHMARKS: dict[str, Benchmark] = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (
        exactness,
        rows,
        acceptance,
        comparing,
        speed,
        replay,
        plan,
        cache,
        side_by_side,
        host,
        kernels,
        step,
        prefill,
        cpu,
        peers,
        files,
        train,
        heads,
    )
}


def add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the verb `bench` with one subcommand for each benchmark."""
    bench = commands.add_parser("bench", help="measure: same text, bitwise rows, acceptance, speed")
    kinds = bench.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    for benchmark in BENCHMARKS.values():
        benchmark.add(kinds)


def run_bench(args: argparse.Namespace) -> None:
    """Runs the chosen benchmark."""
    BENCHMARKS[args.benchmark].execute(args)
