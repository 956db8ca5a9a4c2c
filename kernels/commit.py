"""From the target's draws to the next step's state, without the host: walk the tree, move the cache, count tokens.

The walk is coupled acceptance (2408.07978): a draft is accepted where it is the token that the target drew at its
parent. The walk's result stays on the device for the next step; a record of it is what the host reads.

Legend: `M` rows of the pass (the root is row 0), `A` = depth of the tree + 1: the most tokens a step can commit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_spec.kernels.checks import expect
from mtp_spec.kernels.launching import late, runs_triton
from mtp_spec.kernels.mla_cache import Cache

try:
    import triton
    import triton.language as tl

    from mtp_spec.kernels.launching import follow
except ImportError:  # no Triton for this platform: the references remain
    triton = None

COUNT, FAILED, HEADER = 0, 1, 2  # places of a record
COLUMNS, KEPT_COLUMNS = 64, 1024


def record_size(most: int) -> int:
    """Returns numbers of a record: tokens committed, 1 if a row had no token to draw, `most` tokens, `most` rows."""
    return HEADER + 2 * most


def accept(
    drawn: Tensor, failed: Tensor, ids: Tensor, parents: Tensor, path: Tensor, tokens: Tensor, record: Tensor,
    seen: Tensor | None = None,
) -> None:  # fmt: skip
    """Walks from the root along the drafts that the target drew.

    Args:
        drawn: `[M]` int32, the target's token at each row.  failed: `[M]` int32, 1 where none could be drawn.
        ids: `[M]` int64, the tokens of the pass.  parents: `[M]` int32, row 0 has -1.
        path: `[A]` int64, receives the rows whose draws were committed, the last one repeated.
        tokens: `[A]` int64, receives these draws, the last one repeated.
        record: `[2 + 2 A]` int32, receives count, failure, tokens and path.
        seen: `[V]` int32, has each committed token counted, if given.
    """
    rows, most = ids.shape[0], path.shape[0]
    expect("ids", ids, (rows,), torch.int64)
    for name, x in (("drawn", drawn), ("failed", failed), ("parents", parents)):
        expect(name, x, (rows,), torch.int32, beside=ids)
    expect("path", path, (most,), torch.int64, beside=ids)
    expect("tokens", tokens, (most,), torch.int64, beside=ids)
    expect("record", record, (record_size(most),), torch.int32, beside=ids)
    if seen is not None:
        expect("seen", seen, (None,), torch.int32, beside=ids)
    if not runs_triton(ids):
        return _accept_reference(drawn, failed, ids, parents, path, tokens, record, seen)
    _accept_kernel[(1,)](
        drawn, failed, ids, parents, path, tokens, record, record if seen is None else seen, rows,
        MOST=most, WIDE=triton.next_power_of_2(rows), COUNTED=seen is not None, num_warps=1,
        **late(ids),
    )  # fmt: skip


def keep(
    outputs: Tensor, tokens: Tensor, length: Tensor, hidden: Tensor, ring: Tensor, ring_tokens: Tensor
) -> None:
    """Puts a plain step's row aside for MTP modules that will read it when drafting begins again.

    Args:
        outputs: `[1, D]` of the pass.  tokens: `[A]` int64, the first is what it drew.
        length: `[1]` int32, the row's position.
        hidden: `[R, D]`, receives the row as its first, as every step does.
        ring: `[W, D]`, receives it at its position modulo W.  ring_tokens: `[W]` int64, the token there.
    """
    width, places = outputs.shape[1], ring.shape[0]
    expect("outputs", outputs, (1, None), outputs.dtype)
    expect("tokens", tokens, (None,), torch.int64, beside=outputs)
    expect("length", length, (1,), torch.int32, beside=outputs)
    expect("hidden", hidden, (None, width), outputs.dtype, beside=outputs)
    expect("ring", ring, (None, width), outputs.dtype, beside=outputs)
    expect("ring_tokens", ring_tokens, (places,), torch.int64, beside=outputs)
    if not runs_triton(outputs):
        place = int(length) % places
        hidden[:1] = ring[place] = outputs[0]
        ring_tokens[place] = tokens[0]
        return
    _keep_kernel[(-(-width // KEPT_COLUMNS),)](
        outputs, tokens, length, hidden, ring, ring_tokens, width, places, COLUMNS=KEPT_COLUMNS, **late(outputs)
    )


def commit(caches: list[Cache], length: Tensor, path: Tensor, record: Tensor) -> None:
    """Moves the committed rows' latents to the slots behind `length` `[1]`, in all layers at once."""
    store, most = caches[0].words, path.shape[0]
    expect("length", length, (1,), torch.int32, beside=store)
    expect("path", path, (most,), torch.int64, beside=store)
    expect("record", record, (record_size(most),), torch.int32, beside=store)
    if not runs_triton(store):
        start, count = int(length), int(record[COUNT])
        for cache in caches:
            cache.slots[start : start + count] = cache.slots[start + path[:count]].clone()
        return
    width = store.shape[1]
    _commit_kernel[(len(caches), -(-width // COLUMNS))](
        store, length, path, record, caches[0].capacity, caches[0].base, width,
        MOST=triton.next_power_of_2(most), ROWS=most, COLUMNS=COLUMNS, **late(store),
    )  # fmt: skip


def _accept_reference(
    drawn: Tensor, failed: Tensor, ids: Tensor, parents: Tensor, path: Tensor, tokens: Tensor, record: Tensor,
    seen: Tensor | None,
) -> None:  # fmt: skip
    row, rows, bad = 0, [0], 0
    while True:
        bad |= int(failed[row])
        children = ((parents == row) & (ids == drawn[row].long())).nonzero().flatten().tolist()
        if not children:
            break
        row = children[0]
        rows.append(row)
    count = len(rows)
    rows += [rows[-1]] * (path.shape[0] - count)
    path.copy_(torch.tensor(rows))
    tokens.copy_(drawn[path])
    record.copy_(torch.cat((torch.tensor([count, bad]), tokens, path)))
    if seen is not None:
        for token in tokens[:count].tolist():
            seen[token] += 1


if triton is not None:

    @triton.jit
    def _accept_kernel(
        drawn, failed, ids, parents, path, tokens, record, seen, rows,
        MOST: tl.constexpr, WIDE: tl.constexpr, COUNTED: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        follow(PDL)
        lane = tl.arange(0, WIDE)
        its_parent = tl.load(parents + lane, mask=lane < rows, other=-2)
        its_token = tl.load(ids + lane, mask=lane < rows, other=-1)
        row, count, bad, alive = 0, 0, 0, 1
        for step in tl.static_range(MOST):
            token = tl.load(drawn + row)
            bad = bad | tl.load(failed + row)
            tl.store(path + step, row)
            tl.store(tokens + step, token)
            tl.store(record + 2 + step, token)
            tl.store(record + 2 + MOST + step, row)
            if COUNTED:
                tl.atomic_add(seen + token, alive)
            count += alive
            child = tl.min(tl.where((its_parent == row) & (its_token == token), lane, WIDE), axis=0)
            alive = tl.where(child < WIDE, alive, 0)
            row = tl.where(alive > 0, child, row)
        tl.store(record, count)
        tl.store(record + 1, bad)

    @triton.jit
    def _keep_kernel(
        outputs, tokens, length, hidden, ring, ring_tokens, width, places, COLUMNS: tl.constexpr, PDL: tl.constexpr
    ):
        follow(PDL)
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        mask = column < width
        place = tl.load(length) % places
        values = tl.load(outputs + column, mask=mask)
        tl.store(hidden + column, values, mask=mask)
        tl.store(ring + place.to(tl.int64) * width + column, values, mask=mask)
        if tl.program_id(0) == 0:
            tl.store(ring_tokens + place, tl.load(tokens))

    @triton.jit
    def _commit_kernel(
        store, length, path, record, capacity, base, width,
        MOST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        follow(PDL)
        lane = tl.arange(0, MOST)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        row = tl.load(path + lane, mask=lane < ROWS, other=0)
        moves = (lane < tl.load(record)) & (row != lane)
        first = store + (base + tl.program_id(0) * capacity + tl.load(length)).to(tl.int64) * width
        mask = moves[:, None] & (column < width)[None, :]
        values = tl.load(first + row[:, None] * width + column[None, :], mask=mask, other=0)
        tl.debug_barrier()  # a slot may be read and written
        tl.store(first + lane[:, None] * width + column[None, :], values, mask=mask)
