"""Accept and commit on the device, without the host: walk the tree, move the cache, count tokens.

The walk is coupled acceptance (2408.07978): a draft is accepted if it equals the token that the target drew at its
parent. The result stays on the device for the next step; the host reads a record of it.

Legend: `B` sequences, `E` rows of each (the root is row 0), `A` = depth of the tree + 1, the most tokens a step can
commit.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mtp_spec.kernels.checks import expect
from mtp_spec.kernels.launching import late, next_power, runs_triton
from mtp_spec.kernels.mla.cache import KEYS, Cache

try:
    import triton
    import triton.language as tl

    from mtp_spec.kernels.launching import follow
    from mtp_spec.kernels.mla.kernels import paged_rows
except ImportError:  # no Triton for this platform: the references remain
    triton = None

COUNT, FAILED, UNSEEN, HEADER = 0, 1, 2, 3  # indices into a record
COLUMNS, KEPT_COLUMNS, CLEANED_COLUMNS = 64, 1024, 4096


def record_size(most: int) -> int:
    """Returns the length of a record: tokens committed, 1 if a row had no token to draw, how many of the tokens the MTP
    modules have not seen, `most` tokens, `most` rows."""
    return HEADER + 2 * most


def accept(
    drawn: Tensor, failed: Tensor, ids: Tensor, parents: Tensor, path: Tensor, tokens: Tensor, record: Tensor,
    seen: Tensor | None = None, depth: int | None = None,
) -> None:  # fmt: skip
    """Walks from the root along the drafts that the target drew, up to a row that failed.

    Args:
        drawn: `[B E]` int32, the target's token at each row.
        failed: `[B E]` int32, 1 where no token could be drawn.
        ids: `[B E]` int64, the tokens of the pass.
        parents: `[E]` int32, row 0 has -1.
        path: `[B, A]` int64, receives the rows (within a sequence) whose draws were committed, the last one repeated.
        tokens: `[B, A]` int64, receives these draws, the last one repeated.
        record: `[B, 3 + 2 A]` int32, receives count, failure, count again, tokens and path.
        seen: `[B, V]` int32, counts each committed token, if given.
        depth: of the tree, less than A; None if it is not known.
    """
    (sequences, most), rows = path.shape, parents.shape[0]
    expect("ids", ids, (sequences * rows,), torch.int64)
    for name, x in (("drawn", drawn), ("failed", failed)):
        expect(name, x, (sequences * rows,), torch.int32, beside=ids)
    expect("parents", parents, (rows,), torch.int32, beside=ids)
    expect("path", path, (sequences, most), torch.int64, beside=ids)
    expect("tokens", tokens, (sequences, most), torch.int64, beside=ids)
    expect("record", record, (sequences, record_size(most)), torch.int32, beside=ids)
    if seen is not None:
        expect("seen", seen, (sequences, None), torch.int32, beside=ids)
    if depth is not None and not 0 <= depth < most:
        raise ValueError(f"depth is {depth}: 0 to {most - 1} fit into {most} tokens")
    if not runs_triton(ids):
        return accept_reference(drawn, failed, ids, parents, path, tokens, record, seen)
    walked = min(rows, most) if depth is None else depth + 1
    _accept_kernel[(sequences,)](
        drawn, failed, ids, parents, path, tokens, record, record if seen is None else seen, rows,
        0 if seen is None else seen.shape[1], MOST=most, WALKED=walked, WIDE=next_power(rows),
        LANES=next_power(most), COUNTED=seen is not None, num_warps=1, **late(ids),
    )  # fmt: skip


def keep(outputs: Tensor, tokens: Tensor, length: Tensor, hidden: Tensor, ring: Tensor, ring_tokens: Tensor) -> None:
    """Queues the row of each sequence's undrafted step for the MTP modules, which read it when drafting resumes.

    Args:
        outputs: `[B, D]` of the pass.
        tokens: `[B, A]` int64, the first is the drawn token.
        length: `[B]` int32, the rows' positions.
        hidden: `[B, R, D]`, receives the row as its first, as in every step.
        ring: `[B, W, D]`, receives it at its position modulo W.
        ring_tokens: `[B, W]` int64, the token there.
    """
    (sequences, width), (rows, places) = outputs.shape, (hidden.shape[1], ring.shape[1])
    expect("outputs", outputs, (sequences, width), outputs.dtype)
    expect("tokens", tokens, (sequences, None), torch.int64, beside=outputs)
    expect("length", length, (sequences,), torch.int32, beside=outputs)
    expect("hidden", hidden, (sequences, rows, width), outputs.dtype, beside=outputs)
    expect("ring", ring, (sequences, places, width), outputs.dtype, beside=outputs)
    expect("ring_tokens", ring_tokens, (sequences, places), torch.int64, beside=outputs)
    if not runs_triton(outputs):
        return keep_reference(outputs, tokens, length, hidden, ring, ring_tokens)
    _keep_kernel[(-(-width // KEPT_COLUMNS), sequences)](
        outputs, tokens, length, hidden, ring, ring_tokens, width, rows, places, tokens.shape[1],
        COLUMNS=KEPT_COLUMNS, **late(outputs),
    )  # fmt: skip


def commit(
    caches: list[Cache], length: Tensor, path: Tensor, record: Tensor, pages: Tensor | None = None,
    depth: int | None = None,
) -> None:  # fmt: skip
    """Moves each sequence's committed rows' latents to the slots from its `length` `[B]` on, in all layers at once.

    Args:
        path: `[B, A]` int64.
        record: `[B, 3 + 2 A]` int32.
        pages: `[B, P]` int32, see `mla.Plan`.
        depth: of the tree, as for `accept`.
    """
    store, (sequences, most) = caches[0].words, path.shape
    expect("length", length, (sequences,), torch.int32, beside=store)
    expect("path", path, (sequences, most), torch.int64, beside=store)
    expect("record", record, (sequences, record_size(most)), torch.int32, beside=store)
    if pages is not None:
        expect("pages", pages, (sequences, caches[0].capacity // KEYS), torch.int32, beside=store)
    apart = _distance(caches)
    if not runs_triton(store):
        return commit_reference(caches, length, path, record, pages)
    width = store.shape[1]
    _commit_kernel[(len(caches), -(-width // COLUMNS), sequences)](
        store, length, length if pages is None else pages, 0 if pages is None else pages.shape[1], path, record, apart,
        caches[0].base, width, PAGED=pages is not None, BLOCK=KEYS,
        MOST=next_power(most if depth is None else depth + 1), ROWS=most, COLUMNS=COLUMNS, **late(store),
    )  # fmt: skip


def clean(caches: list[Cache], pages: Tensor) -> None:
    """Writes zeros to pages `[n]` int64, numbered from the caches' first row, in all layers at once."""
    store, apart = caches[0].words, _distance(caches)
    expect("pages", pages, (None,), torch.int64, beside=store)
    if not runs_triton(store):
        return clean_reference(caches, pages)
    width = store.shape[1]
    # pages first: there may be more than a grid's other dimensions have, 65,535
    _clean_kernel[(len(pages), len(caches))](
        store, pages, apart, caches[0].base, width, ROWS=KEYS, COLUMNS=CLEANED_COLUMNS, **late(store),
    )  # fmt: skip


def _distance(caches: list[Cache]) -> int:
    """Returns the number of rows from one layer to the next."""
    apart = caches[1].base - caches[0].base if len(caches) > 1 else 0
    if any(cache.base != caches[0].base + layer * apart for layer, cache in enumerate(caches)):
        raise ValueError("caches lie at unequal distances: those of one model's layers, in order, are expected")
    return apart


def accept_reference(
    drawn: Tensor, failed: Tensor, ids: Tensor, parents: Tensor, path: Tensor, tokens: Tensor, record: Tensor,
    seen: Tensor | None = None,
) -> None:  # fmt: skip
    """`accept` in plain torch, one sequence at a time."""
    rows = parents.shape[0]
    for sequence in range(path.shape[0]):
        part = slice(sequence * rows, (sequence + 1) * rows)
        _walk(drawn[part], failed[part], ids[part], parents, path[sequence], tokens[sequence], record[sequence],
              None if seen is None else seen[sequence])  # fmt: skip


def keep_reference(
    outputs: Tensor, tokens: Tensor, length: Tensor, hidden: Tensor, ring: Tensor, ring_tokens: Tensor
) -> None:
    """`keep` in plain torch."""
    every, place = torch.arange(outputs.shape[0], device=outputs.device), length.long() % ring.shape[1]
    hidden[:, 0] = ring[every, place] = outputs
    ring_tokens[every, place] = tokens[:, 0]


def commit_reference(
    caches: list[Cache], length: Tensor, path: Tensor, record: Tensor, pages: Tensor | None = None
) -> None:
    """`commit` in plain torch, one sequence and layer at a time."""
    for sequence in range(path.shape[0]):
        slots = int(length[sequence]) + torch.arange(int(record[sequence, COUNT]), device=path.device)
        for cache in caches:
            own = cache if pages is None else replace(cache, pages=pages[sequence])
            cache.store[own.rows(slots)] = cache.store[own.rows(length[sequence] + path[sequence, : len(slots)])]


def clean_reference(caches: list[Cache], pages: Tensor) -> None:
    """`clean` in plain torch."""
    for cache in caches:
        cache.store[cache.base :].unflatten(0, (-1, KEYS)).index_fill_(0, pages, 0)


def _walk(
    drawn: Tensor, failed: Tensor, ids: Tensor, parents: Tensor, path: Tensor, tokens: Tensor, record: Tensor,
    seen: Tensor | None,
) -> None:  # fmt: skip
    row, rows, bad = 0, [0], 0
    while True:
        bad |= int(failed[row])
        children = ((parents == row) & (ids == drawn[row].long())).nonzero().flatten().tolist()
        if bad or not children:
            break
        row = children[0]
        rows.append(row)
    count = len(rows)
    rows += [rows[-1]] * (path.shape[0] - count)
    path.copy_(torch.tensor(rows))
    tokens.copy_(drawn[path])
    record.copy_(torch.cat((torch.tensor([count, bad, count]), tokens, path)))
    if seen is not None:
        for token in tokens[:count].tolist():
            seen[token] += 1


if triton is not None:

    @triton.jit
    def _accept_kernel(
        drawn, failed, ids, parents, path, tokens, record, seen, rows, vocabulary,
        MOST: tl.constexpr, WALKED: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr, COUNTED: tl.constexpr,
        PDL: tl.constexpr,
    ):  # fmt: skip
        """One program per sequence; WALKED rows are as many as a path has at most."""
        follow(PDL)
        sequence = tl.program_id(0)
        drawn, failed, ids = drawn + sequence * rows, failed + sequence * rows, ids + sequence * rows
        path, tokens, record = path + sequence * MOST, tokens + sequence * MOST, record + sequence * (3 + 2 * MOST)
        seen += sequence.to(tl.int64) * vocabulary
        lane = tl.arange(0, WIDE)
        its_parent = tl.load(parents + lane, mask=lane < rows, other=-2)
        its_token = tl.load(ids + lane, mask=lane < rows, other=-1)
        row, count, bad, alive = 0, 0, 0, 1
        token = tl.load(drawn)
        for step in tl.static_range(WALKED):
            token = tl.load(drawn + row)
            bad = bad | tl.load(failed + row)
            tl.store(path + step, row)
            tl.store(tokens + step, token)
            tl.store(record + 3 + step, token)
            tl.store(record + 3 + MOST + step, row)
            if COUNTED:
                tl.atomic_add(seen + token, alive)
            count += alive
            child = tl.min(tl.where((its_parent == row) & (its_token == token), lane, WIDE), axis=0)
            alive = tl.where((child < WIDE) & (bad == 0), alive, 0)
            row = tl.where(alive > 0, child, row)
        # the deepest row has no children, so both are still the last ones
        place = tl.arange(0, LANES)
        padded = (place >= WALKED) & (place < MOST)
        tl.store(path + place, row, mask=padded)
        tl.store(tokens + place, token, mask=padded)
        tl.store(record + 3 + place, token, mask=padded)
        tl.store(record + 3 + MOST + place, row, mask=padded)
        tl.store(record, count)
        tl.store(record + 1, bad)
        tl.store(record + 2, count)

    @triton.jit
    def _keep_kernel(
        outputs, tokens, length, hidden, ring, ring_tokens, width, rows, places, most,
        COLUMNS: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        follow(PDL)
        sequence = tl.program_id(1).to(tl.int64)
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        mask = column < width
        place = sequence * places + tl.load(length + sequence) % places
        values = tl.load(outputs + sequence * width + column, mask=mask)
        tl.store(hidden + sequence * rows * width + column, values, mask=mask)
        tl.store(ring + place * width + column, values, mask=mask)
        if tl.program_id(0) == 0:
            tl.store(ring_tokens + place, tl.load(tokens + sequence * most))

    @triton.jit
    def _commit_kernel(
        store, length, pages, page_count, path, record, apart, base, width,
        PAGED: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
        PDL: tl.constexpr,
    ):  # fmt: skip
        follow(PDL)
        sequence = tl.program_id(2)
        lane = tl.arange(0, MOST)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        row = tl.load(path + sequence * ROWS + lane, mask=lane < ROWS, other=0)
        moves = (lane < tl.load(record + sequence * (3 + 2 * ROWS))) & (row != lane)
        mask = moves[:, None] & (column < width)[None, :]
        if PAGED:
            start, own = tl.load(length + sequence), pages + sequence * page_count
            first = store + (base + tl.program_id(0) * apart).to(tl.int64) * width
            source = paged_rows(start + row, moves, own, BLOCK).to(tl.int64)
            target = paged_rows(start + lane, moves, own, BLOCK).to(tl.int64)
        else:
            first = store + (base + tl.program_id(0) * apart + tl.load(length + sequence)).to(tl.int64) * width
            source, target = row, lane
        values = tl.load(first + source[:, None] * width + column[None, :], mask=mask, other=0)
        tl.debug_barrier()  # a slot may be both read and written
        tl.store(first + target[:, None] * width + column[None, :], values, mask=mask)

    @triton.jit
    def _clean_kernel(
        store, pages, apart, base, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        follow(PDL)
        row = base + tl.program_id(1) * apart + tl.load(pages + tl.program_id(0)) * ROWS
        column, words = tl.arange(0, COLUMNS), width * ROWS
        for first in range(0, words, COLUMNS):
            target = store + row.to(tl.int64) * width + first + column
            tl.store(target, tl.zeros((COLUMNS,), dtype=tl.int32), mask=first + column < words)
