"""Sampling as Triton kernels; imported by `sampling` if Triton is available.

A row is cut into fixed stretches of the vocabulary, one program each, and every launch adds the previous launch's
stretches in order, so a row's token depends only on the row. Nothing waits for the host.

Legend: `M` rows, `V` vocabulary, `S` stretches, `R` requests, `B` best tokens per row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtp_spec.kernels.launching import follow

# columns of the settings, [R, 8] float64
TEMPERATURE: tl.constexpr = tl.constexpr(0)
TOP_K: tl.constexpr = tl.constexpr(1)
TOP_P: tl.constexpr = tl.constexpr(2)
LOG_MIN_P: tl.constexpr = tl.constexpr(3)
REPETITION: tl.constexpr = tl.constexpr(4)
PRESENCE: tl.constexpr = tl.constexpr(5)
FREQUENCY: tl.constexpr = tl.constexpr(6)
SETTINGS: tl.constexpr = tl.constexpr(8)
IN_PROMPT: tl.constexpr = tl.constexpr(1 << 30)  # flag added to a token's count
TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)
INFINITE: tl.constexpr = tl.constexpr(0x7F800000)  # magnitude of -inf
BITS: tl.constexpr = tl.constexpr(4)  # per search step
WAYS: tl.constexpr = tl.constexpr(16)  # thresholds per step
TOP_SHIFT: tl.constexpr = tl.constexpr(28)  # bits below those of the first step


@triton.jit
def _setting(settings, request, which: tl.constexpr):
    return tl.load(settings + request * SETTINGS + which)


@triton.jit
def _penalise_kernel(
    logits,  # [M, V]
    request,  # [M] int32
    settings,
    bias,  # [R, V] float32, used with BIAS
    seen,  # [R, V] int32: count of generated, IN_PROMPT; used with PENALTY
    path,  # [M, DEPTH] int32: tokens drafted since, -1 for none; used with PENALTY
    work,  # [M, V] float32
    highest,  # [M, S] float32
    vocabulary,
    STRETCH: tl.constexpr,
    BIAS: tl.constexpr,
    PENALTY: tl.constexpr,
    DEPTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """work = logits + bias, penalised; highest = the largest of each stretch, +inf if one is NaN."""
    follow(PDL)
    row, stretch = tl.program_id(0).to(tl.int64), tl.program_id(1)
    of = tl.load(request + row).to(tl.int64)
    token = stretch * STRETCH + tl.arange(0, STRETCH)
    inside = token < vocabulary
    value = tl.load(logits + row * vocabulary + token, mask=inside, other=float("-inf")).to(tl.float32)
    if BIAS:
        value += tl.load(bias + of * vocabulary + token, mask=inside, other=0.0)
    if PENALTY:
        known = tl.load(seen + of * vocabulary + token, mask=inside, other=0)
        for step in tl.static_range(DEPTH):
            known += (token == tl.load(path + row * DEPTH + step)).to(tl.int32)
        count = known & (IN_PROMPT - 1)
        repetition = _setting(settings, of, REPETITION).to(tl.float32)
        repeated = tl.where(value > 0, tl.div_rn(value, repetition), value * repetition)
        value = tl.where(known > 0, repeated, value)  # a penalty of 1 changes nothing
        off = _setting(settings, of, PRESENCE) + _setting(settings, of, FREQUENCY) * count.to(tl.float64)
        value = tl.where(count > 0, value - off.to(tl.float32), value)
    tl.store(work + row * vocabulary + token, value, mask=inside)
    # NaN differs from itself; such a row is reported, not drawn from
    tl.store(highest + row * tl.num_programs(1) + stretch, tl.max(tl.where(value == value, value, float("inf"))))


@triton.jit
def _row_highest(highest, row, stretches, STRETCHES: tl.constexpr):
    lane = tl.arange(0, STRETCHES)
    return tl.max(tl.load(highest + row * stretches + lane, mask=lane < stretches, other=float("-inf")), axis=0)


@triton.jit
def _scaled(value, top, temperature):
    """(row - max) / temperature; a temperature too small for float32 keeps only the best tokens."""
    return tl.div_rn(value - top, tl.maximum(temperature, TINY))


@triton.jit
def _magnitude(scaled):
    """Bits of |x| for x <= 0, int32: ascending as x descends."""
    return scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _choose(sums, counts, state, row, stretches, shift, share, STRETCHES: tl.constexpr):
    """Reads one search step's result: the first threshold at which the sum reaches the target.

    Args:
        sums: [M, S, WAYS], sums over elements up to each threshold.
        counts: [M, S, WAYS], numbers of elements.
        state: [M, 3] float64 of that step: prefix of the threshold, sum below the prefix, target.
        shift: number of bits below those that the step searched.
        share: whether the target is a share of the total, which is known after the first step.
    Returns:
        prefix, sum below it, target, elements of each stretch [STRETCHES] exactly at the threshold (after shift 0).
    """
    lane, way = tl.arange(0, STRETCHES), tl.arange(0, WAYS)
    source = (row * stretches + lane)[:, None] * WAYS + way[None, :]
    inside = (lane < stretches)[:, None]
    parts = tl.load(sums + source, mask=inside, other=0.0)
    total = tl.sum(parts, axis=0)  # [WAYS]
    prefix = tl.load(state + row * 3).to(tl.int64)
    below, target = tl.load(state + row * 3 + 1), tl.load(state + row * 3 + 2)
    target = tl.where(share, target * tl.max(total, axis=0), target)
    found = tl.minimum(tl.sum((total < target).to(tl.int32), axis=0), WAYS - 1)
    before = tl.sum(tl.where(way == found - 1, total, 0.0), axis=0)
    below = tl.where(found > 0, before, below)
    each = tl.load(counts + source, mask=inside, other=0)
    there = tl.sum(tl.where((way == found)[None, :], each, 0), axis=1)
    there -= tl.sum(tl.where((way == found - 1)[None, :], each, 0), axis=1)
    return prefix + (found.to(tl.int64) << shift), below, target, there


@triton.jit(do_not_specialize=["shift"])
def _search_kernel(
    work, highest, request, settings,
    old_sums, old_counts, old_state,  # of the previous step
    sums,  # [M, S, WAYS] float64
    counts,  # [M, S, WAYS] int32: elements of the prefix
    state,  # [M, 3] float64
    edge,  # [M, 2] int64: top-k's magnitude and how many exactly there stay; used with MASS and CUT
    vocabulary, stretches,
    shift,  # bits below those that this step searches
    STRETCH: tl.constexpr, CHUNK: tl.constexpr, STRETCHES: tl.constexpr,
    FIRST: tl.constexpr, MASS: tl.constexpr, CUT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One step of four bits: sums of counts (top-k) or masses (top-p) over elements up to each of WAYS thresholds."""
    follow(PDL)
    row, stretch = tl.program_id(0).to(tl.int64), tl.program_id(1)
    of = tl.load(request + row).to(tl.int64)
    if FIRST:
        prefix = tl.zeros((), dtype=tl.int64)
        below = tl.zeros((), dtype=tl.float64)
        if MASS:
            target = _setting(settings, of, TOP_P)
        else:
            target = _setting(settings, of, TOP_K)
    else:
        prefix, below, target, _ = _choose(
            old_sums, old_counts, old_state, row, stretches, shift + BITS, MASS and shift == TOP_SHIFT - BITS, STRETCHES
        )
    if stretch == 0:
        tl.store(state + row * 3, prefix.to(tl.float64))
        tl.store(state + row * 3 + 1, below)
        tl.store(state + row * 3 + 2, target)
    top = _row_highest(highest, row, stretches, STRETCHES)
    temperature = _setting(settings, of, TEMPERATURE).to(tl.float32)
    way = tl.arange(0, WAYS)
    # magnitudes have 31 bits; the first step's last threshold has 32, and no element is at or above it
    threshold = tl.minimum(prefix + ((way + 1).to(tl.int64) << shift) - 1, 0x7FFFFFFF).to(tl.int32)
    least = tl.minimum(prefix, 0x7FFFFFFF).to(tl.int32)
    if CUT:
        cut = tl.load(edge + row * 2).to(tl.int32)
    # summed per lane, over the lanes once at the end; unrolled, so that a whole stretch is loaded at once
    sums_here = tl.zeros((WAYS, CHUNK), dtype=tl.float64)
    counts_here = tl.zeros((WAYS, CHUNK), dtype=tl.int32)
    for first in tl.static_range(0, STRETCH, CHUNK):
        token = stretch * STRETCH + first + tl.arange(0, CHUNK)
        inside = token < vocabulary
        scaled = _scaled(tl.load(work + row * vocabulary + token, mask=inside, other=float("-inf")), top, temperature)
        size = _magnitude(scaled)
        upto = (size[None, :] <= threshold[:, None]) & inside[None, :]
        # only those of this prefix: differences of adjacent sums are then exact for each threshold, also the first
        counts_here += (upto & (size >= least)[None, :]).to(tl.int32)
        if MASS:
            mass = tl.exp(scaled)
            if CUT:
                mass = tl.where(size < cut, mass, 0.0)
            sums_here += tl.where(upto, mass.to(tl.float64)[None, :], 0.0)
        else:
            sums_here += upto.to(tl.float64)
    sum_here, count_here = tl.sum(sums_here, axis=1), tl.sum(counts_here, axis=1)
    if MASS:
        if CUT:
            if stretch == 0:
                # elements exactly at top-k's edge are equal: their mass is a product, wherever they are
                value = -(cut.to(tl.float32, bitcast=True))
                alike = tl.load(edge + row * 2 + 1).to(tl.float64) * tl.exp(value).to(tl.float64)
                sum_here += tl.where(threshold >= cut, alike, 0.0)
    place = (row * stretches + stretch) * WAYS + way
    tl.store(sums + place, sum_here)
    tl.store(counts + place, count_here)


@triton.jit
def _edge_kernel(
    sums, counts, state, request, settings,
    edge,  # [M, 2] int64: the last magnitude that stays, and how many exactly there; holds top-k's with CUT
    ties,  # [M, S] int32: elements exactly there in earlier stretches
    vocabulary, stretches,
    STRETCHES: tl.constexpr, MASS: tl.constexpr, CUT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Ends a search. Rows without truncation keep everything."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    of = tl.load(request + row).to(tl.int64)
    at, below, target, there = _choose(sums, counts, state, row, stretches, 0, False, STRETCHES)
    change = at >= 0
    if MASS:
        value = -(at.to(tl.int32).to(tl.float32, bitcast=True))
        # the smallest number of equal elements whose mass reaches the target, at least one
        stay = tl.ceil((target - below) / tl.maximum(tl.exp(value), TINY).to(tl.float64))
        stay = tl.minimum(tl.maximum(stay, 1.0), 1e9).to(tl.int64)
        active = _setting(settings, of, TOP_P) < 1.0
        if CUT:
            cut = tl.load(edge + row * 2)
            stay = tl.where(at == cut, tl.minimum(stay, tl.load(edge + row * 2 + 1)), stay)
            # without a search, or if rounding carries it past top-k's edge, that edge is kept
            change = active & (at <= cut)
    else:
        stay = (target - below).to(tl.int64)
        wanted = _setting(settings, of, TOP_K)
        active = (wanted > 0) & (wanted < vocabulary)
    tl.debug_barrier()  # until every thread has read the edge
    tl.store(edge + row * 2, tl.where(active, at, INFINITE), mask=change)
    tl.store(edge + row * 2 + 1, tl.where(active, stay, vocabulary), mask=change)
    lane = tl.arange(0, STRETCHES)
    before = tl.cumsum(there, axis=0) - there
    tl.store(ties + row * stretches + lane, before, mask=lane < tl.where(change, stretches, 0))


@triton.jit
def _philox_round(c0, c1, c2, c3, k0, k1):
    high0, low0 = tl.umulhi(c0, 0xD2E7470EE14C6C93), c0 * 0xD2E7470EE14C6C93
    high1, low1 = tl.umulhi(c2, 0xCA5A826395121157), c2 * 0xCA5A826395121157
    return high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0


@triton.jit
def random_words(seed, position, first, COUNT: tl.constexpr):
    """Returns 32-bit words [COUNT] of tokens from `first` on, multiples of 8; `mtp_spec.sampling.noise.random_bits`."""
    block = (first // 8 + tl.arange(0, COUNT // 8) + 1).to(tl.uint64)
    zero = block * 0
    c0, c1, c2, c3 = block, zero + position.to(tl.uint64), zero, zero
    k0, k1 = zero + seed.to(tl.uint64), zero
    for _ in tl.static_range(10):
        c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0, k1)
        k0 += 0x9E3779B97F4A7C15
        k1 += 0xBB67AE8584CAA73B
    # join stacks its two along a new last dimension: words, then halves, end up in order
    low = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    words = tl.join(low & 0xFFFFFFFF, low >> 32)
    return tl.reshape(words, (COUNT,)).to(tl.uint32)


@triton.jit
def gumbel(seed, position, first, COUNT: tl.constexpr):
    """Returns [COUNT] float32 standard Gumbel noise; `mtp_spec.sampling.noise.gumbel`, logarithms in float64."""
    uniform = (random_words(seed, position, first, COUNT).to(tl.float64) + 0.5) * 2.3283064365386963e-10
    uniform = tl.minimum(uniform, 0.999999940395355224609375)
    return (-tl.log(-tl.log(1.0 - uniform))).to(tl.float32)


@triton.jit
def _gumbel_kernel(seed, position, out, vocabulary, STRETCH: tl.constexpr, PDL: tl.constexpr):
    follow(PDL)
    row, stretch = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = stretch * STRETCH + tl.arange(0, STRETCH)
    noise = gumbel(tl.load(seed + row), tl.load(position + row), stretch * STRETCH, STRETCH)
    tl.store(out + row * vocabulary + token, noise, mask=token < vocabulary)


@triton.jit
def _draw_kernel(
    work,  # with KEEP it receives the truncated rows
    highest, request, settings,
    seed,  # [R] int64, bits of an unsigned number
    position,  # [M] int64
    edge, ties,  # of the last search, used with SEARCHED
    best_value,  # [M, S, B] float32
    best_token,  # [M, S, B] int32
    vocabulary, stretches,
    STRETCH: tl.constexpr, STRETCHES: tl.constexpr, BEST: tl.constexpr, SEARCHED: tl.constexpr, MIN_P: tl.constexpr,
    NOISE: tl.constexpr, KEEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The best tokens of a stretch: largest scaled logit plus noise, lowest index among equals."""
    follow(PDL)
    row, stretch = tl.program_id(0).to(tl.int64), tl.program_id(1)
    of = tl.load(request + row).to(tl.int64)
    token = stretch * STRETCH + tl.arange(0, STRETCH)
    inside = token < vocabulary
    score = tl.load(work + row * vocabulary + token, mask=inside, other=float("-inf"))
    temperature = _setting(settings, of, TEMPERATURE).to(tl.float32)
    if NOISE:
        if _setting(settings, of, TEMPERATURE) > 0:
            scaled = _scaled(score, _row_highest(highest, row, stretches, STRETCHES), temperature)
            if SEARCHED:
                size, at = _magnitude(scaled), tl.load(edge + row * 2)
                alike = (size == at) & inside
                rank = tl.load(ties + row * stretches + stretch) + tl.cumsum(alike.to(tl.int32), axis=0) - 1
                stays = (size < at) | (alike & (rank < tl.load(edge + row * 2 + 1)))
                scaled = tl.where(stays, scaled, float("-inf"))
            if MIN_P:
                lowest = _setting(settings, of, LOG_MIN_P).to(tl.float32)
                scaled = tl.where(scaled < lowest, float("-inf"), scaled)
            if KEEP:
                tl.store(work + row * vocabulary + token, scaled, mask=inside)
            noise = gumbel(tl.load(seed + of), tl.load(position + row), stretch * STRETCH, STRETCH)
            score = scaled + noise
    score = tl.where(inside & (score == score), score, float("-inf"))
    for rank in tl.static_range(BEST):
        value = tl.max(score, axis=0)
        where = tl.min(tl.where(score == value, token, 0x7FFFFFFF), axis=0)
        place = (row * stretches + stretch) * BEST + rank
        tl.store(best_value + place, value)
        tl.store(best_token + place, where)
        score = tl.where(token == where, float("-inf"), score)


@triton.jit
def _pick_kernel(
    best_value, best_token, highest,
    tokens,  # [M, B] int32
    scores,  # [M, B] float32
    failed,  # [M] int32: 1 where no token can be drawn
    stretches,
    STRETCHES: tl.constexpr, BEST: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The best of all stretches. If fewer than B tokens are left, the best is repeated: harmless in a tree."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WIDE)
    inside = lane < stretches * BEST
    value = tl.load(best_value + row * stretches * BEST + lane, mask=inside, other=float("-inf"))
    token = tl.load(best_token + row * stretches * BEST + lane, mask=inside, other=0x7FFFFFFF)
    top = _row_highest(highest, row, stretches, STRETCHES)
    first_value = tl.max(value, axis=0)
    bad = (top == float("inf")) | (first_value == float("-inf"))
    tl.store(failed + row, bad.to(tl.int32))
    first_token = tl.min(tl.where(value == first_value, token, 0x7FFFFFFF), axis=0)
    first_token = tl.where(bad, 0, first_token)
    for rank in tl.static_range(BEST):
        largest = tl.max(value, axis=0)
        where = tl.min(tl.where(value == largest, token, 0x7FFFFFFF), axis=0)
        left = (largest > float("-inf")) & (bad == 0)
        tl.store(tokens + row * BEST + rank, tl.where(left, where, first_token))
        tl.store(scores + row * BEST + rank, largest)
        value = tl.where(token == where, float("-inf"), value)
