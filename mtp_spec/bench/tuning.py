"""`bench kernels --tune`: finds the best launches of products and experts on the machine that will use them.

Candidates of a round are compiled in parallel, then timed one after another; the next round starts from the fastest.
If a candidate does not compile or fit, its error is recorded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from mtp_spec.kernels import fp8, gemm, moe

Chosen = TypeVar("Chosen", gemm.Launch, moe.Launch)
Changes = list[dict[str, int]]
COMPILERS = 12

# tile, steps of K in flight, blocks of K a step, warps
PRODUCT_SHAPES = ((64, 6, 1, 4), (64, 8, 1, 4), (64, 12, 1, 4), (64, 16, 1, 4), (64, 20, 1, 4), (64, 3, 2, 4),
                  (64, 4, 2, 4), (64, 5, 2, 4), (64, 6, 2, 4), (64, 8, 2, 4), (64, 10, 2, 4), (64, 3, 4, 4),
                  (64, 4, 4, 4), (128, 3, 2, 4), (128, 4, 2, 4), (128, 6, 2, 8))  # fmt: skip
UP_SHAPES = ((64, 5, 1, 4), (64, 6, 1, 4), (64, 2, 2, 4), (64, 3, 2, 4), (64, 2, 4, 4), (64, 4, 2, 4), (64, 5, 2, 4),
             (128, 3, 1, 4), (128, 5, 1, 8), (128, 3, 2, 8), (128, 3, 2, 4))  # fmt: skip
DOWN_SHAPES = ((64, 8, 1, 4), (64, 3, 2, 4), (64, 4, 2, 4), (64, 5, 2, 4), (64, 2, 4, 4), (64, 3, 4, 4), (128, 2, 2, 4),
               (128, 3, 2, 4), (128, 3, 2, 8), (128, 6, 1, 4))  # fmt: skip
AHEAD = (0, 4, 8)
CALL = (0, 4, 12, 32)
FURTHER = (2, 12, 16)  # numbers of prefetched blocks, tried once the point of prefetching is chosen
SPLITS = (1, 2, 4, 8)
PROGRAMS = (100, 1500)  # fewer programs leave multiprocessors idle; splitting into more only adds work


def product_rounds(n: int, k: int) -> list[Changes]:
    """Returns the candidates for a product: shapes and splits together, then how much is prefetched, and when."""
    first: Changes = []
    for tile, stages, unroll, warps in PRODUCT_SHAPES:
        tiles, blocks = -(-n // tile), -(-k // fp8.BLOCK)
        allowed = [splits for splits in SPLITS
                   if splits == 1 or (tiles * splits <= PROGRAMS[1] and blocks // splits >= 3 * unroll)]  # fmt: skip
        # all that give every multiprocessor something to do, or, of a small matrix, the most
        enough = [splits for splits in allowed if tiles * splits >= PROGRAMS[0]] or allowed[-2:]
        first += [{"tile": tile, "splits": splits, "stages": stages, "unroll": unroll, "warps": warps}
                  for splits in enough]  # fmt: skip
    both = [{"ahead": ahead, "call": call} for ahead in AHEAD for call in CALL]
    return [first, both, [{"ahead": ahead} for ahead in FURTHER]]


def expert_rounds(which: str) -> list[Changes]:
    """Returns the candidates for the experts' "up" or "down" product, or for prefetching ("ahead")."""
    if which == "ahead":
        return [[{f"{product}_ahead": ahead} for ahead in AHEAD + FURTHER] for product in ("up", "down")]
    shapes = UP_SHAPES if which == "up" else DOWN_SHAPES
    names = tuple(f"{which}_{field}" for field in ("tile", "stages", "unroll", "warps"))
    return [[dict(zip(names, shape, strict=True)) for shape in shapes]]


def search(
    start: Chosen, rounds: Iterable[Changes], run: Callable[[Chosen], Any], time: Callable[[Chosen], float],
    tried: dict[str, Any],
) -> Chosen:  # fmt: skip
    """Returns the launch with the least time.

    Args:
        rounds: for each round the changes that are tried on the best launch so far.
        run: launches once, which compiles.
        time: returns microseconds.
        tried: receives microseconds, or the error, of every candidate by its fields.
    """
    best, least = start, _attempt(start, time, tried)
    for changes in rounds:
        candidates = [replace(best, **change) for change in changes]
        with ThreadPoolExecutor(COMPILERS) as pool:
            list(pool.map(lambda candidate: _attempt(candidate, run, {}), candidates))
        for candidate in candidates:
            micro = _attempt(candidate, time, tried)
            if micro < least:
                best, least = candidate, micro
    return best


def label(launch: gemm.Launch | moe.Launch) -> str:
    """Returns a launch in one line."""
    return "/".join(str(value) for value in asdict(launch).values())


def write(folder: Path, found: dict[str, dict[str, gemm.Launch | moe.Launch]]) -> None:
    """Writes tables of launches, by file and shape, over those in `folder`; other shapes stay."""
    for name, launches in found.items():
        path = folder / name
        table = json.loads(path.read_text()) if path.exists() else {}
        table |= {shape: asdict(launch) for shape, launch in launches.items()}
        lines = (f' "{shape}": {json.dumps(fields)}' for shape, fields in table.items())
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _attempt(launch: Chosen, work: Callable[[Chosen], Any], tried: dict[str, Any]) -> float:
    try:
        micro = work(launch)
    except Exception as error:  # any exception of a configuration is a result
        tried[label(launch)] = repr(error)[:300]
        return float("inf")
    tried[label(launch)] = micro
    return float(micro) if isinstance(micro, float) else 0.0
