"""Times of the forward passes in a step, measured on this machine with this model.

How much one more verified row costs depends on the machine (is the pass bound by memory or arithmetic?), on the model
(a row of a mixture of experts activates more experts) and on the context. So it is measured, on a real text, whose
neighbouring tokens share experts as in use. The planner itself follows changes of the machine's load.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median
from time import get_clock_info, perf_counter, thread_time
from typing import Any

from torch import Tensor

from mtp_spec.model.attention import plan_rows
from mtp_spec.model.cache import LatentCache
from mtp_spec.model.host import HostModel, Technique
from mtp_spec.model.rows import row_logits, verify_rows
from mtp_spec.model.undisturbed import undisturbed
from mtp_spec.sampling.params import SamplingParams
from mtp_spec.sampling.sampler import Sampler
from mtp_spec.text import Tokenizer

TEXT = (
    "Rain had fallen on the hills for three days when the old bridge gave way. The farmer, who was on the far bank "
    "with two of her sheep, looked at the brown water and decided to walk to the next village. It took until evening."
)
# measured contexts: that of a first answer, and one at which reading the cache takes noticeable time
NEAR, FAR = 32, 512
VERIFY_ROWS, TREE_ROWS, LEVEL_ROWS, EXTEND_ROWS = (1, 2, 4, 8, 16, 64), (3, 8), (1, 4, 16), (1, 8, 32)
# part of the key under which times are stored: times of other passes cannot be used
PASSES = str((NEAR, FAR, VERIFY_ROWS, TREE_ROWS, LEVEL_ROWS, EXTEND_ROWS))
# Passes are timed in turn, for this many rounds. The result is the median ratio of a pass to the plain step of the same
# round, because a machine that slows down for a while slows all of them. If the thread's clock is fine enough, time in
# which other processes had the processor is not counted.
ROUNDS, MOST_SECONDS = 5, 2.0
FINE = 1e-6
FEW = 16  # passes of fewer rows run once untimed first, as steps follow each other in use, to warm the caches
OTHERS = 4  # this many times the longest pass's tokens: each pass takes the next ones, as generation does
# most variation between rounds, beyond which times would mislead, and most seconds for the first two rounds
STEADY, TOO_LONG = 1.4, 30.0
Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds of a pass by rows and context; linear interpolation between measurements and extrapolation beyond.

    Attributes:
        contexts: the two contexts.
        rows: numbers of rows, ascending, at least two.
        seconds: for each number of rows, at each context.
    """

    contexts: tuple[int, int]
    rows: tuple[int, ...]
    seconds: tuple[tuple[float, float], ...]

    def __call__(self, rows: int, context: int) -> float:
        upper = min(max(1, bisect_right(self.rows, rows)), len(self.rows) - 1)
        share = (rows - self.rows[upper - 1]) / (self.rows[upper] - self.rows[upper - 1])
        further = max(0.0, (context - self.contexts[0]) / (self.contexts[1] - self.contexts[0]))
        low, high = (near + further * (far - near) for near, far in self.seconds[upper - 1 : upper + 1])
        return max(low + share * max(0.0, high - low), low / 2)

    @classmethod
    def rising(cls, contexts: tuple[int, int], points: dict[int, tuple[float, float]]) -> Curve:
        """Returns the curve through points, raised wherever more rows or more context seemed to take less time."""
        rows, seconds, near, far = tuple(sorted(points)), [], 0.0, 0.0
        for count in rows:
            near = max(near, points[count][0])
            far = max(far, points[count][1], near)
            seconds.append((near, far))
        return cls(contexts, rows, tuple(seconds))


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Times of the parts of a step.

    Attributes:
        verify: the main model over a chain's rows, with logits; one row is a plain step.
        tree: the same over a tree's rows.
        level: an MTP module over the leaves of a level, with head and sampling.
        extend: an MTP module over the tokens committed since it last ran; like `level` that of `verify`, and not used,
            if the model has no module.
    """

    verify: Curve
    tree: Curve
    level: Curve
    extend: Curve

    @classmethod
    def typical(cls) -> StepTimes:
        """Returns ratios seen on processors with bfloat16 products, for use without measuring."""
        parts = {
            "verify": {1: 1.0, 2: 1.18, 4: 1.45, 8: 1.87, 16: 2.6, 64: 6.5},
            "tree": {3: 1.37, 8: 1.95},
            "level": {1: 0.18, 4: 0.28},
            "extend": {1: 0.13, 32: 0.6},
        }
        return cls(**{name: _flat(points) for name, points in parts.items()})

    def to_json(self) -> dict[str, Any]:
        """Returns the document that `from_json` reads."""
        return {
            name: {"contexts": curve.contexts, "rows": curve.rows, "seconds": curve.seconds}
            for name, curve in (("verify", self.verify), ("tree", self.tree), ("level", self.level),
                                ("extend", self.extend))
        }  # fmt: skip

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> StepTimes:
        """Returns the times that `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: `to_json` did not write this document.
        """
        curves = {}
        for name in ("verify", "tree", "level", "extend"):
            part = document[name]
            near, far = (int(context) for context in part["contexts"])
            rows = tuple(int(count) for count in part["rows"])
            seconds = tuple((float(first), float(second)) for first, second in part["seconds"])
            apart = len(set(rows)) > 1 and len(rows) == len(seconds) and near < far
            if not apart or min(min(pair) for pair in seconds) <= 0:
                raise ValueError(f"{name}: not times of rows")
            curves[name] = Curve.rising((near, far), dict(zip(rows, seconds, strict=True)))
        return cls(**curves)

    def scaled(self, plain: float, factor: float) -> StepTimes:
        """Returns times in which a plain step takes `plain` seconds and everything else `factor` times as long."""
        near, far = self.verify.seconds[0]
        single = plain, plain * far / near
        curves = {}
        for name, curve in (("verify", self.verify), ("tree", self.tree), ("level", self.level),
                            ("extend", self.extend)):  # fmt: skip
            points = {rows: (factor * one, factor * two)
                      for rows, (one, two) in zip(curve.rows, curve.seconds, strict=True)}  # fmt: skip
            if name == "verify":
                points[1] = single
            curves[name] = Curve.rising(curve.contexts, points)
        return StepTimes(**curves)


def _flat(points: dict[int, float]) -> Curve:
    return Curve.rising((NEAR, FAR), {rows: (seconds, seconds) for rows, seconds in points.items()})


@undisturbed()
def measure(
    model: HostModel, technique: Technique, tokenizer: Tokenizer | None, longest: int, report: Report | None = None
) -> StepTimes | None:
    """Returns the times of this model on this machine.

    None if they vary too much from round to round, or if measuring would take too long.

    Args:
        technique: how rows are computed here (`model.rows`).
        longest: longest context in use, which bounds the second measured context.
        report: called with the number of measurements done and of all.
    """
    ids = tokenizer.encode(TEXT) if tokenizer is not None else []
    need = NEAR + OTHERS * max(VERIFY_ROWS + EXTEND_ROWS) + 1
    ids = ids or [(31 * i + 7) % model.config.vocab_size for i in range(need)]
    ids = (ids * -(-need // len(ids)))[:need]
    contexts = (NEAR, max(2 * NEAR, min(FAR, longest)))
    passes = {context: _passes(model, technique, ids, context) for context in contexts}
    taken: dict[tuple[str, int, int], list[float]] = {
        key: [] for key in _points(contexts) if key[0] in passes[contexts[0]]
    }
    clock = thread_time if get_clock_info("thread_time").resolution <= FINE else perf_counter
    start, ranks = perf_counter(), model.ranks
    for number, key in product(range(ROUNDS), taken):
        (spent,) = ranks.first((perf_counter() - start,))
        if spent > (MOST_SECONDS if number > 1 else TOO_LONG):
            break
        kind, rows, context = key
        if rows < FEW:
            passes[context][kind](rows)
        begin = clock()
        passes[context][kind](rows)
        taken[key].append(clock() - begin)
        if report is not None:
            report(sum(map(len, taken.values())), ROUNDS * len(taken))
    taken = {key: ranks.first(times) for key, times in taken.items()}
    plain = taken["verify", 1, contexts[0]]
    steps = {key: [time / step for time, step in zip(times, plain, strict=False)] for key, times in taken.items()}
    if not _steady(steps.values()):
        return None
    return _curves({key: median(ratios) * min(plain) for key, ratios in steps.items()}, contexts)


def _points(contexts: tuple[int, int]) -> Iterator[tuple[str, int, int]]:
    for kind, counts in (("verify", VERIFY_ROWS), ("tree", TREE_ROWS), ("level", LEVEL_ROWS), ("extend", EXTEND_ROWS)):
        for rows, context in product(counts, contexts):
            yield kind, rows, context


def _steady(taken: Iterable[list[float]]) -> bool:
    """Whether every pass was timed at least twice and, for most, the median agrees with the minimum."""
    lists = [sorted(times) for times in taken]
    return min(map(len, lists)) > 1 and median(times[-len(times) // 2] / times[0] for times in lists) < STEADY


def _curves(taken: dict[tuple[str, int, int], float], contexts: tuple[int, int]) -> StepTimes:
    curves = {}
    for kind in dict.fromkeys(kind for kind, _, _ in taken):
        counts = [rows for name, rows, context in taken if name == kind and context == contexts[0]]
        points = {rows: (taken[kind, rows, contexts[0]], taken[kind, rows, contexts[1]]) for rows in counts}
        curves[kind] = Curve.rising(contexts, points)
    return StepTimes(**{name: curves.get(name, curves["verify"]) for name in ("verify", "tree", "level", "extend")})


def _passes(
    model: HostModel, technique: Technique, ids: Sequence[int], context: int
) -> dict[str, Callable[[int], object]]:
    """Returns the passes at a context that consists of the text's first tokens, repeated as needed."""
    most = max(VERIFY_ROWS + EXTEND_ROWS)
    cache, drafts = model.new_cache(context + most), model.new_mtp_cache(context + most)
    hidden = model.rows(ids[:NEAR], cache, range(-1, NEAR - 1))
    _repeat(cache, context)
    if model.mtp:
        plan = plan_rows(model.table(context + most + 2), 0, range(-1, NEAR - 1), offset=1)
        model.mtp_rows(0, ids[1 : NEAR + 1], hidden, drafts, plan)
        _repeat(drafts, context)
    taken = 0

    def some(rows: int) -> Sequence[int]:
        """Returns the text's next tokens: neighbouring tokens share experts."""
        nonlocal taken
        first = NEAR + taken % (len(ids) - NEAR - rows)
        taken += rows
        return ids[first : first + rows]

    sampler = Sampler(SamplingParams(temperature=1.0, seed=0), model.config.vocab_size)
    history = sampler.history(ids[:1])

    def verify(rows: int, parents: Sequence[int] | None = None) -> None:
        after = range(-1, rows - 1) if parents is None else parents
        row_logits(model, verify_rows(model, some(rows), cache, after, technique), technique)

    def extend(rows: int) -> Tensor:
        plan = plan_rows(model.table(context + rows + 2), context, range(-1, rows - 1), offset=1)
        return model.mtp_rows(0, some(rows), hidden[:rows], drafts, plan)

    def level(rows: int) -> None:
        for row in model.draft_logits(extend(rows), model.config.head_of(0)):
            scores = sampler.process(row, history)
            sampler.lead(scores, context, sampler.top(scores, context, 2)[0])

    # a tree is a chain with a sibling of its first node
    found: dict[str, Callable[[int], object]] = {
        "verify": verify, "tree": lambda rows: verify(rows, [*range(-1, rows - 2), 0])
    }  # fmt: skip
    return found | {"level": level, "extend": extend} if model.mtp else found


def _repeat(cache: LatentCache, context: int) -> None:
    """Fills a cache up to a context with its first slots."""
    for slots in cache.slots:
        for first in range(NEAR, context, NEAR):
            part = slots[first : min(first + NEAR, context)]
            part.copy_(slots[: len(part)])
    cache.length = context
