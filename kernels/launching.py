"""Checks common to all kernel launches, and how a kernel starts while the previous one still runs.

Programmatic dependent launch: a kernel launched with `late` is resident and has prefetched its first weights into the
cache by the time the previous kernel ends. Three rules preserve the order of a stream:

- Such a kernel calls `follow` (or `gdc_wait`) before it reads anything that an earlier kernel wrote and before it
  writes anything at all: buffers, workspaces and arrival counts are reused by the next kernel.
- `gdc_wait` returns when the previous kernel has ended and its writes are visible. Every kernel of a chain waits, so
  that kernel ended after all earlier ones. A kernel launched without the attribute waits automatically.
- Only three things may come before the wait: a prefetch, which changes no value, whoever wrote the bytes and when; a
  read of weights, which no kernel of a chain writes; and a read of committed slots of a cache and of the numbers that
  say where they are. Those were written before the pass, which begins with a kernel launched without the attribute
  (looking up embeddings).
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

# The first version with everything the kernels use. 3.4 has the names, but its `gdc_wait` does not compile; 3.5 lacks
# parts of Gluon. The kernel files import `follow` from here, so with an older version they run without Triton too.
OLDEST_TRITON = (3, 6)

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        triton = None
except ImportError:  # no Triton for this platform, or an old one: the references remain
    triton = None

MULTIPROCESSORS = 132  # of an H100 or H200; fixed, because the number of splits is part of the arithmetic
RESERVED = 11 * 1024  # bytes of a program's shared memory for purposes other than tiles
HOPPER = (9, 0)  # the first cards that launch a kernel before its predecessor has ended


def runs_triton(x: Tensor) -> bool:
    """Whether a kernel runs on this tensor: on CUDA, or anywhere while Triton interprets."""
    return triton is not None and (x.is_cuda or interpreted())


def triton_obstacle() -> str | None:
    """Returns why no kernel runs on a GPU here, with a remedy; None if they run."""
    if triton is not None:
        return None
    try:
        found = import_module("triton").__version__
    except ImportError:
        return "Triton is not installed (pip install triton)"
    oldest = ".".join(str(part) for part in OLDEST_TRITON)
    return f"Triton {found} is not one that the kernels run with, {oldest} is the first (pip install -U torch triton)"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which cannot multiply bfloat16."""
    return bool(triton.knobs.runtime.interpret)


def late(x: Tensor) -> dict[str, bool]:
    """Returns launch options for a kernel (with a constexpr PDL) that may start while the previous one still runs."""
    return {"PDL": True, "launch_pdl": True} if overlaps(x.device) else {"PDL": False}


def next_power(number: int) -> int:
    """Returns the least power of two that is not less than a number of at least 1, as `triton.next_power_of_2`."""
    return 1 << (number - 1).bit_length()


def tuned_name(rows: int, columns: int, kind: str) -> str:
    """Returns the key of a shape in kernels/tuned: "fp8" matrices by their shape alone, "bf16" ones (16 bits) named."""
    return f"{rows}x{columns}" + ("" if kind == "fp8" else f" {kind}")


def stages_that_fit(stages: int, step: int, device: torch.device) -> int:
    """Returns how many of `stages` steps of `step` bytes fit in shared memory; not part of the arithmetic."""
    return max(1, min(stages, (shared_memory(device) - RESERVED) // step))


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Returns the bytes of shared memory that a program can have; Hopper's if there is no GPU."""
    if device.type != "cuda":
        return 227 * 1024
    number = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(number)["max_shared_mem"])


@lru_cache  # asking the driver takes longer than a launch
def on_hopper(device: torch.device) -> bool:
    """Whether the device is a Hopper GPU, which has warpgroups."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == HOPPER[0]


@lru_cache
def hopper_module(name: str) -> Any:
    """Returns the module of Gluon kernels `mtp_spec.kernels.NAME`, or None if this Triton has no Gluon for Hopper."""
    try:
        return import_module(f"mtp_spec.kernels.{name}")
    except ImportError:
        return None


@lru_cache
def overlaps(device: torch.device) -> bool:
    """Whether kernels on this device overlap: from compute capability 9.0, and not in the interpreter."""
    return device.type == "cuda" and not interpreted() and torch.cuda.get_device_capability(device) >= HOPPER


if triton is not None:

    @triton.jit
    def follow(PDL: tl.constexpr):
        """Lets the next kernel become resident, then waits for the previous one; first statement of a late kernel."""
        if PDL:
            gdc_launch_dependents()
            gdc_wait()

    @triton.jit
    def call_at(block, at):
        """Lets the next kernel become resident when `block` is `at`; without a branch, which breaks pipelining."""
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.eq.s32 p, $1, $2; @p griddepcontrol.launch_dependents; mov.b32 $0, 0; }", "=r,r,r",
            [block, at], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip

    # about how many programs are resident before the previous kernel ends: later ones gain nothing from a prefetch
    EARLY: tl.constexpr = tl.constexpr(4 * MULTIPROCESSORS)

    @triton.jit
    def prefetch(addresses, sizes, wanted):
        """Starts prefetching `sizes` bytes at `addresses`, both multiples of 16, into the L2 cache.

        Only where `wanted`; all three are [N]. Threads issue one after another, so a warp's cost is N / 32.
        """
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }",
            "=r,l,r,r", [addresses, sizes, wanted.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip

    @triton.jit
    def pull(w, first_row, first_block, rows, k, TILE: tl.constexpr, BLOCKS: tl.constexpr):
        """Prefetches BLOCKS blocks of 128 of K of TILE rows of w [rows, k]."""
        lane = tl.arange(0, 2 * TILE)  # every other thread has a row, to spread rows over all warps
        row = tl.minimum(first_row + lane // 2, rows - 1).to(tl.int64)
        size: tl.constexpr = w.dtype.element_ty.primitive_bitwidth // 8
        start = tl.minimum(first_block * 128, k - 16)
        count = tl.minimum(k - start, BLOCKS * 128) * size
        prefetch(w + row * k + start, tl.zeros_like(lane) + count, lane % 2 == 0)
