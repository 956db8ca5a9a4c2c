"""NumPy reference of the engine, exact to the last bit, with which every kernel is compared.

Every sum has the order that lanes.h fixes. A fused multiply-add rounds once; NumPy has none, so it is emulated in
float64, where the product of two float32 is exact: see `fused`. All NaN count as equal, whatever their bits.

Legend: `R` rows, `N` and `K` rows and columns of a matrix, `Q` queries, `T` slots, `W` width of a cached latent,
`C` columns of it that are values, `E` experts. Arrays are float32 unless stated otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mtp_spec.kernels.cpu.engine import LANES, Matrix

Array = npt.NDArray[np.float32]
Index = npt.NDArray[np.int32]

GROUP = 64  # columns of FP8 that the lanes share in a special order; those beyond the last count as zero
# Entry j is the column of such a group that lane j % 16 adds in step j // 16; columns of other types are in order. Keep
# in step with lanes.h: nothing else defines this order.
FP8_ORDER = np.arange(GROUP).reshape(2, LANES, 2).transpose(0, 2, 1).ravel()
FP8_AFTER = np.float32(2.0**8)  # undoes the factor 2^-8 of widened codes
TINY = np.float32(1e-20)  # added to the sum by which experts' weights are divided
SOFTMAX, SIGMOID = 0, 1
GREEDY, GROUP_MAX, GROUP_TWO = 0, 1, 2


def fused(a: Any, b: Any, c: Any) -> Array:
    """Returns a * b + c, rounded once.

    The product is exact in float64. The sum is rounded to odd there: where it is not exact, its last bit is set, so it
    never lies halfway between two float32 unless the exact value does. float64 has more than two bits beyond those of
    float32, subnormal ones included, and so the second rounding gives what one alone would have given.
    """
    with np.errstate(all="ignore"):
        product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
        addend = np.asarray(c, np.float64)
        total = np.asarray(product + addend)
        # rounding error of this sum (Knuth's TwoSum); nothing here is near float64's limits
        back = total - product
        error = (product - (total - back)) + (addend - back)
        bits = total.view(np.int64)
        wants = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
        # bits order magnitudes: one up if the error points away from zero, else one down
        step = np.where((error > 0) == (total > 0), 1, -1)
        return (bits + np.where(wants, step, 0)).view(np.float64).astype(np.float32)


def total(lanes: Array) -> Array:
    """Returns the sums of lanes `[..., 16]`, added by halves."""
    with np.errstate(all="ignore"):
        for half in (8, 4, 2, 1):
            lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def dot(x: Array, w: Array, order: npt.NDArray[np.int64] | None = None) -> Array:
    """Returns `[R, N]`: rows x `[R, K]` times rows w `[N, K]`, each sum in sixteen lanes.

    Args:
        order: order of the columns within every group of that size; None for 0, 1, 2, ...
    """
    order = np.arange(LANES) if order is None else order
    pad = ((0, 0), (0, -x.shape[1] % len(order)))  # columns beyond the last count as zero
    left, right = np.pad(x, pad), np.pad(w, pad)
    sums = np.zeros((len(x), len(w), LANES), np.float32)
    places = (np.arange(0, left.shape[1], len(order))[:, None] + order).reshape(-1, LANES)
    for step in places:
        sums = fused(left[:, None, step], right[None, :, step], sums)
    return total(sums)


def axpy(p: Array, w: Array, y: Array) -> Array:
    """Returns y `[R, C]` plus p `[R, T]` times w `[T, C]`: one sum per output, over the rows of w in order."""
    for t in range(len(w)):
        y = fused(p[:, t, None], w[t], y)
    return y


def widen(matrix: Matrix) -> Array:
    """Returns a matrix's stored numbers `[N, K]`, those of FP8 times 2^-8 and without their scales.

    An FP8 code is shifted to float16's bit positions. This turns the code of NaN into 480: the loader refuses NaN.
    """
    if matrix.data.dtype == torch.float8_e4m3fn:
        codes = matrix.data.view(torch.int8).numpy().astype(np.int16)
        return np.asarray(((codes << 7) & -0x4080).view(np.float16).astype(np.float32))
    return np.asarray(matrix.data.float().numpy())


def product(matrix: Matrix, first: int, end: int, x: Array) -> Array:
    """Returns `[R, end - first]`: rows x `[R, K]` times the matrix's rows from `first` to `end` - 1.

    FP8: a row of x is first multiplied by the scales of its columns, once for every block of the matrix's rows.
    """
    stored = widen(matrix)
    if matrix.scale is None:
        return dot(x, stored[first:end])
    high, wide = matrix.block
    out = np.empty((len(x), end - first), np.float32)
    scales = np.repeat(matrix.scale.numpy(), wide, 1)[:, : x.shape[1]]
    with np.errstate(all="ignore"):
        for block in range(first // high, -(-end // high)):
            low, stop = max(first, block * high), min(end, (block + 1) * high)
            out[:, low - first : stop - first] = dot(x * scales[block], stored[low:stop], FP8_ORDER) * FP8_AFTER
    return out


def columns(matrix: Matrix, first: int, count: int, x: Array) -> Array:
    """Returns `[R, K]`: the sum of `count` rows of the matrix from `first` on, each times its factor x `[R, count]`."""
    stored = widen(matrix)[first : first + count]
    out = np.zeros((len(x), stored.shape[1]), np.float32)
    if matrix.scale is None:
        return axpy(x, stored, out)
    high, wide = matrix.block
    scales = matrix.scale.numpy()[np.arange(first, first + count) // high]
    with np.errstate(all="ignore"):
        for block in range(scales.shape[1]):
            part = slice(block * wide, (block + 1) * wide)
            out[:, part] = axpy(x * scales[:, block], stored[:, part], out[:, part]) * FP8_AFTER
    return out


def exponential(x: Any) -> Array:
    """Returns e^x: 2^n times a polynomial of the rest; exactly 0 below -87, e^88 above 88, and NaN of NaN."""
    x = np.asarray(x, np.float32)
    magic = np.float32(12582912.0)  # 1.5 * 2^23: added to a number, it leaves the nearest integer in the last bits
    with np.errstate(all="ignore"):
        far = x < np.float32(-87.0)
        clipped = np.where(far, np.float32(-87.0), np.where(x > 88, np.float32(88.0), x))
        t = fused(clipped, np.float32(1.44269504088896341), magic)
        n = t - magic
        r = fused(n, np.float32(-0.693145751953125), clipped)
        r = fused(n, np.float32(-1.428606765330187e-06), r)
        p = fused(np.float32(1.9875691500e-4), r, np.float32(1.3981999507e-3))
        for factor in (8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            p = fused(p, r, np.float32(factor))
        p = fused(p, r * r, r) + np.float32(1.0)
        power = ((t.view(np.int32) - np.int32(0x4B400000) + np.int32(127)) << 23).view(np.float32)
        return np.asarray(np.where(far, np.float32(0.0), p * power))


def soften(scores: Array, scale: float) -> tuple[Array, np.float32]:
    """Returns unnormalised softmax weights `[T]` of scores `[T]`, and 1 / their sum."""
    factor = np.float32(scale)
    with np.errstate(all="ignore"):
        highest = np.fmax.reduce(scores)
        weights = exponential((scores - highest) * factor)
        sums = np.zeros(LANES, np.float32)
        for part in np.pad(weights, (0, -len(weights) % LANES)).reshape(-1, LANES):
            sums = sums + part
        return weights, np.float32(1.0) / np.float32(total(sums))


def attend(q: Array, latents: Array, slots: Sequence[int], values: int, scale: float) -> Array:
    """Returns the attention-weighted latents `[Q, C]` for one row's queries q `[Q, W]`, one per head.

    Args:
        latents: `[all slots, W]`, in order of position.
        slots: T slots that the row sees, in the order in which it reads them: its run, then further ones.
        values: C, the first columns of a latent.
    """
    seen = latents[list(slots)]
    softened = [soften(row, scale) for row in dot(q, seen)]
    weights, shares = np.stack([w for w, _ in softened]), np.array([s for _, s in softened], np.float32)
    with np.errstate(all="ignore"):
        return axpy(weights, seen[:, :values], np.zeros((len(q), values), np.float32)) * shares[:, None]


def norm(x: Array, weight: Array, eps: float) -> Array:
    """Returns x `[n]` / sqrt(mean(x^2) + eps) * weight; NaN where the sum of squares is infinite."""
    sums, padded = np.zeros(LANES, np.float32), np.pad(x, (0, -len(x) % LANES))
    for part in padded.reshape(-1, LANES):
        sums = fused(part, part, sums)
    with np.errstate(all="ignore"):
        square = np.float32(total(sums))
        mean = (np.float32(np.nan) if np.isposinf(square) else square) / np.float32(len(x))
        factor = np.float32(1.0) / np.sqrt(mean + np.float32(eps))
        return np.asarray((x * factor) * weight)


def rotate(x: Array, table: Array, interleaved: bool) -> Array:
    """Returns x `[n]` times the table's first row plus x with its pairs swapped times its second; table `[2, n]`."""
    swapped = x.reshape(-1, 2)[:, ::-1].ravel() if interleaved else np.roll(x, len(x) // 2)
    with np.errstate(all="ignore"):
        return np.asarray(x * table[0] + swapped * table[1])


def activate(gate: Array, up: Array) -> Array:
    """Returns gate / (1 + e^-gate) * up; any shape."""
    with np.errstate(all="ignore"):
        return np.asarray(gate / (np.float32(1.0) + exponential(-gate)) * up)


@dataclass(frozen=True, slots=True)
class Routing:
    """How experts are chosen, as layers.h has it."""

    experts: int
    chosen: int
    groups: int = 1
    kept_groups: int = 1
    scoring: int = SIGMOID
    method: int = GREEDY
    normalised: bool = True
    factor: float = 1.0


def choose(routing: Routing, logits: Array, bias: Array | None) -> tuple[Index, Array]:
    """Returns a row's experts in ascending order and their weights; of equal scores the lower number wins.

    NaN compares as neither greater nor less: an expert whose score is NaN is taken if it is the first one left. If a
    logit or a bias is NaN or infinite, all weights are NaN.

    Args:
        logits: `[E]` of the gate.
        bias: `[E]` added to scores for the choice only.
    """
    if routing.scoring == SIGMOID:
        with np.errstate(all="ignore"):
            scores = np.asarray(np.float32(1.0) / (np.float32(1.0) + exponential(-logits)))
    else:
        weights, share = soften(logits, 1.0)
        scores = weights * share
    with np.errstate(all="ignore"):
        choice = scores.copy() if bias is None else scores + bias
    if routing.method != GREEDY and routing.groups != routing.kept_groups:
        worth = [_worth(routing, part) for part in choice.reshape(routing.groups, -1)]
        left = set(range(routing.groups))
        for _ in range(routing.groups - routing.kept_groups):  # drop the worst; of equals the higher number
            worst = max(left)
            for group in sorted(left, reverse=True):
                worst = worst if worth[group] >= worth[worst] else group
            left.remove(worst)
            choice.reshape(routing.groups, -1)[worst] = -np.inf
    taken: list[int] = []
    for _ in range(routing.chosen):
        open_ones = [e for e in range(routing.experts) if e not in taken]
        best = open_ones[0]
        for expert in open_ones:
            best = expert if choice[expert] > choice[best] else best
        taken.append(best)
    index = np.array(sorted(taken), np.int32)
    out, factor = scores[index], np.float32(routing.factor)
    with np.errstate(all="ignore"):
        if routing.normalised:
            whole = np.float32(0.0)
            for weight in out:
                whole = np.float32(whole + weight)
            factor = factor / np.float32(whole + TINY)
        sound = bool(np.isfinite(logits if bias is None else logits + bias).all())
        return index, np.asarray(out * factor if sound else np.full_like(out, np.nan))


def _worth(routing: Routing, choice: Array) -> np.float32:
    """Returns the score of a group of experts: its best, or the sum of its two best."""
    first = second = np.float32(-np.inf)
    for value in choice:
        if value > first:
            first, second = value, first
        elif value > second:
            second = value
    return first if routing.method == GROUP_MAX or len(choice) == 1 else np.float32(first + second)
