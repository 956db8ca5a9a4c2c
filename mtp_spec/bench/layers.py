"""`bench kernels --what attention`: one pass over the latent cache for a chain or a tree.

Its floor is the larger of the cache's bytes and the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from mtp_spec.bench.common import Row
from mtp_spec.bench.timing import CACHE_BYTES, graph_time
from mtp_spec.errors import OptionError
from mtp_spec.kernels import mla
from mtp_spec.kernels.mla import Cache, attend_reference, new_caches

HEADS, CONTEXTS, MOST_ROWS = (128, 16), (1024, 8192, 32768), 16


def attention(counts: Sequence[int], heads_of: Sequence[int], contexts: Sequence[int], rate: float) -> list[Row]:
    """Times attention over the latent cache for chains and for trees of the same size.

    Args:
        counts: rows of a pass; those above 16 are left out.
        heads_of: numbers of heads.
        contexts: tokens in the cache, the pass's own included.
        rate: TB/s of a copy.
    """
    counts = _few(counts)
    rows = []
    for heads in heads_of if counts else ():
        head = mla.Head(heads, 128, 64, 512, 128, 192**-0.5)
        for context, packed in product(contexts, (False, True)):
            layout = head.layout(packed)
            copies = max(2, -(-CACHE_BYTES // (context * layout.row_bytes)))
            caches = new_caches(copies, context, max(counts), layout, "cuda")
            everything = torch.arange(caches[0].store.shape[0], device="cuda")
            replace(caches[0], capacity=len(everything)).write(
                everything, torch.randn(len(everything), head.width, device="cuda")
            )
            for m in counts:
                # the rows are at the end of the context, as in FlashMLA's calls
                length = torch.tensor([context - m], dtype=torch.int32, device="cuda")
                for kind, plan in (("chain", mla.chain(length, m)), ("tree", tree(length, m))):
                    if kind == "tree" and m == 1:
                        continue
                    q = torch.randn(m, head.padded, head.width, device="cuda").bfloat16()

                    def run(q: Tensor = q, plan: mla.Plan = plan) -> None:
                        for cache in caches:  # noqa: B023 - called at once
                            mla.attend(q, cache, plan, head)  # noqa: B023

                    micro = graph_time(run) / copies
                    got = mla.attend(q, caches[1], plan, head)
                    expected = attend_reference(q, caches[1], plan, head).float()
                    error = float((got.float() - expected).norm() / expected.norm())
                    exact = torch.equal(decoded_alone(q, caches[1], plan, head), got[-1])
                    size = context * layout.row_bytes
                    name = f"{heads} heads, {context} tokens, {kind}" + (", FP8 cache" if packed else "")
                    rows.append(_row("attention", name, m, micro, size, rate, error, exact))
    return rows


def check_contexts(counts: Sequence[int], contexts: Sequence[int]) -> None:
    """Rejects contexts that are too short for a pass of `attention`, before anything is timed.

    Raises:
        OptionError: there is one.
    """
    most = max(_few(counts), default=0)
    if most and min(contexts) <= most:
        raise OptionError(f"--contexts {min(contexts)}: give more tokens than the {most} rows of a pass")


def _few(counts: Sequence[int]) -> list[int]:
    return [count for count in counts if count <= MOST_ROWS]


def tree(length: Tensor, m: int) -> mla.Plan:
    """Returns a tree of m rows: the root, then pairs of siblings of which the first has children."""
    paths = [[0]]
    for row in range(1, m):
        parent = max(0, (row - 1) // 2 * 2 - 1)
        paths.append([*paths[parent], row])
    most = max(len(path) for path in paths)
    table = torch.tensor([path + [-1] * (most - len(path)) for path in paths], dtype=torch.int32, device=length.device)
    depths = torch.tensor([len(path) - 1 for path in paths], dtype=torch.int32, device=length.device)
    return mla.Plan(length, depths, torch.arange(m, dtype=torch.int32, device=length.device), table, most - 1)


def decoded_alone(q: Tensor, cache: Cache, plan: mla.Plan, head: mla.Head) -> Tensor:
    """Returns the last row decoded alone after its ancestors, which are first written to the cache."""
    start, depth = int(plan.length), int(plan.depths[-1])
    if plan.ancestors is not None:
        path = plan.ancestors[-1, : depth + 1].long()
        cache.slots[start : start + depth + 1] = cache.slots[start + path].clone()
    return mla.attend(q[-1:], cache, mla.chain(plan.length + depth, 1), head)[0]


def _row(kernel: str, shape: str, m: int, micro: float, size: float, rate: float, error: float, exact: bool) -> Row:
    return kernel_row(kernel, shape, m, micro, size / micro / 1e6, rate, error, exact)


def kernel_row(
    kernel: str, shape: str, m: int, micro: float, speed: float, rate: float, error: float, exact: bool,
    launch: str = "", operations: float = float("nan"), torch_time: float = float("nan"),
) -> Row:  # fmt: skip
    """Returns a line of `bench kernels` without a peer's time.

    Args:
        micro: microseconds.
        speed: TB/s of what is read.
        rate: TB/s of a copy.
        error: relative to the reference.
        exact: whether a row alone has the same bits.
        launch: how it ran.
        operations: arithmetic operations.
        torch_time: microseconds of torch's.
    """
    return {
        "kernel": kernel,
        "shape": shape,
        "M": m,
        "us": micro,
        "TB/s": speed,
        "of copy": speed / rate,
        "TFLOP/s": operations / micro / 1e6,
        "torch us": torch_time,
        "bf16 us": float("nan"),
        "error": error,
        "rows exact": exact,
        "launch": launch,
    }
