"""Groups (row, expert) pairs by expert for the experts' products, without the host.

A few pairs are sorted by one program, the last one of `router` to choose. For many pairs, each expert's program finds
its own.

Legend: `M` rows, `E` experts including the shared ones, `K` experts per row, `P` = M K pairs, pair m K + j is row m
with its j-th expert. A slot is one expert with up to `tokens` of its pairs, the work of one GEMM program.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_spec.kernels.direct import enqueue
from mtp_spec.kernels.launching import late, next_power, runs_triton
from mtp_spec.kernels.moe.operands import Groups, most_slots
from mtp_spec.kernels.moe.reference import group_reference
from mtp_spec.kernels.workspace import Workspace

try:
    import triton
    import triton.language as tl

    from mtp_spec.kernels.launching import follow
except ImportError:  # no Triton for this platform: the references remain
    triton = None

MOST_ROWS = 64  # up to which one program sorts the pairs
PAIRS_AT_ONCE = 512  # that a program scans if there are many
ARRIVALS = Workspace(torch.int32, zeros=True)  # one count: of the router's rows, then of the experts


def group(indices: Tensor, experts: int, tokens: int) -> Groups:
    """Returns the pairs of indices `[M, K]` int32 grouped by expert; `experts` counts the shared ones."""
    if not runs_triton(indices):
        return group_reference(indices, experts, tokens)
    groups = empty_groups(indices, experts, tokens)
    if indices.shape[0] > MOST_ROWS:
        enqueue(
            _group_many_kernel, (experts,),
            indices, groups.order, groups.expert, groups.first, groups.count,
            torch.empty(experts, dtype=torch.int32, device=indices.device), ARRIVALS.room(indices.device, 1),
            indices.numel(), groups.count.shape[0], CHUNK=PAIRS_AT_ONCE, TOKENS=tokens,
            WIDE_EXPERTS=next_power(experts), **late(indices),
        )  # fmt: skip
        return groups
    enqueue(
        _group_kernel, (1,),
        indices, groups.order, groups.expert, groups.first, groups.count, indices.numel(), groups.count.shape[0],
        PAIRS=max(32, next_power(indices.numel())), TOKENS=tokens,
        WIDE_EXPERTS=next_power(experts), SLOTS=next_power(groups.count.shape[0]),
        **late(indices),
    )  # fmt: skip
    return groups


def empty_groups(indices: Tensor, experts: int, tokens: int | None) -> Groups:
    slots = 1 if tokens is None else most_slots(indices.numel(), experts, tokens)
    space = torch.empty(indices.numel() + 3 * slots, dtype=torch.int32, device=indices.device)
    return Groups(*space.split_with_sizes((indices.numel(), slots, slots, slots)))


if triton is not None:

    @triton.jit
    def group_few(
        indices, order, slot_expert, slot_first, slot_count, pairs, slots,
        PAIRS: tl.constexpr, TOKENS: tl.constexpr, WIDE_EXPERTS: tl.constexpr, SLOTS: tl.constexpr,
    ):  # fmt: skip
        """Counting sort of a few pairs by one program. Loads are volatile: other programs wrote the indices."""
        every = tl.arange(0, PAIRS)
        # keys are unique: expert first, then the pair's number
        keys = tl.load(indices + every, mask=every < pairs, other=1 << 20, volatile=True) * PAIRS + every
        expert = tl.arange(0, WIDE_EXPERTS)
        count = tl.zeros((WIDE_EXPERTS,), dtype=tl.int32)
        for first in range(0, PAIRS, 32):
            pair = first + tl.arange(0, 32)
            its = tl.load(indices + pair, mask=pair < pairs, other=1 << 20, volatile=True)
            rank = tl.sum((keys[None, :] < (its * PAIRS + pair)[:, None]).to(tl.int32), axis=1)
            tl.store(order + rank, pair, mask=pair < pairs)
            count += tl.sum((its[None, :] == expert[:, None]).to(tl.int32), axis=1)
        _deal(count, expert, slot_expert, slot_first, slot_count, TOKENS)
        slot = tl.arange(0, SLOTS)
        unused = (slot >= tl.sum((count + TOKENS - 1) // TOKENS, axis=0)) & (slot < slots)
        tl.store(slot_expert + slot, 0, mask=unused)
        tl.store(slot_first + slot, 0, mask=unused)
        tl.store(slot_count + slot, 0, mask=unused)

    @triton.jit(do_not_specialize=["pairs", "slots"])
    def _group_many_kernel(
        indices, order, slot_expert, slot_first, slot_count, counts, arrivals, pairs, slots,
        CHUNK: tl.constexpr, TOKENS: tl.constexpr, WIDE_EXPERTS: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """One program per expert puts its pairs in place; the last to finish distributes all of them over slots."""
        follow(PDL)
        own, lane = tl.program_id(0), tl.arange(0, CHUNK)
        place = 0  # its pairs come after those of all earlier experts
        for first in range(0, pairs, CHUNK):
            its = tl.load(indices + first + lane, mask=first + lane < pairs, other=1 << 20)
            place += tl.sum((its < own).to(tl.int32), axis=0)
        count = 0
        for first in range(0, pairs, CHUNK):
            its = tl.load(indices + first + lane, mask=first + lane < pairs, other=1 << 20)
            mine = (its == own).to(tl.int32)
            tl.store(order + place + count + tl.cumsum(mine, axis=0) - 1, first + lane, mask=mine > 0)
            count += tl.sum(mine, axis=0)
        tl.store(counts + own, count)
        tl.debug_barrier()  # all threads' stores must precede the one thread's arrival
        if tl.atomic_add(arrivals, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            tl.debug_barrier()
            expert = tl.arange(0, WIDE_EXPERTS)
            each = tl.load(counts + expert, mask=expert < tl.num_programs(0), other=0, volatile=True)
            _deal(each, expert, slot_expert, slot_first, slot_count, TOKENS)
            used = tl.sum((each + TOKENS - 1) // TOKENS, axis=0)
            for first in range(used, slots, CHUNK):
                unused = first + lane < slots
                tl.store(slot_expert + first + lane, 0, mask=unused)
                tl.store(slot_first + first + lane, 0, mask=unused)
                tl.store(slot_count + first + lane, 0, mask=unused)
            tl.store(arrivals, 0)

    @triton.jit
    def _deal(count, expert, slot_expert, slot_first, slot_count, TOKENS: tl.constexpr):
        """Distributes `count` pairs of every expert over slots of up to TOKENS, in order."""
        chunks = (count + TOKENS - 1) // TOKENS
        first_slot = tl.cumsum(chunks, axis=0) - chunks
        first_pair = tl.cumsum(count, axis=0) - count
        for chunk in range(tl.max(chunks, axis=0)):
            used = chunk < chunks
            tl.store(slot_expert + first_slot + chunk, expert, mask=used)
            tl.store(slot_first + first_slot + chunk, first_pair + chunk * TOKENS, mask=used)
            tl.store(slot_count + first_slot + chunk, tl.minimum(count - chunk * TOKENS, TOKENS), mask=used)

    @triton.jit
    def _group_kernel(
        indices, order, slot_expert, slot_first, slot_count, pairs, slots,
        PAIRS: tl.constexpr, TOKENS: tl.constexpr, WIDE_EXPERTS: tl.constexpr, SLOTS: tl.constexpr,
        PDL: tl.constexpr,
    ):  # fmt: skip
        follow(PDL)
        group_few(indices, order, slot_expert, slot_first, slot_count, pairs, slots, PAIRS, TOKENS, WIDE_EXPERTS, SLOTS)
