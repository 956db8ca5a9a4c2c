"""Chooses the next captured step on a GPU: what "auto" and `Speculation(adaptive=True)` do there.

A captured step has a fixed shape, so the choice is among a few: plain decoding and trees of growing depth. The expected
tokens of a shape follow from the acceptance probabilities of its nodes, learned from the sequence, and its time is
measured at capture and again whenever it runs. The shape with most tokens per second is chosen. Exploration: a deeper
shape is tried now and then, because a shallow one says nothing about deeper drafts, and so is a drafted step among
plain ones, which say nothing at all. Both together cost a fixed share of the time.

Nothing here changes the generated text. The host decides while the GPU is busy with earlier steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, log, log2

from mtp_spec.planning.base import Outcome
from mtp_spec.planning.chances import MODEL_MEMORY, SEQUENCE_MEMORY, Chances, Seen
from mtp_spec.planning.correction import Correction, surprise
from mtp_spec.planning.governor import ALLOWED, LEAST_PRICE, Pace
from mtp_spec.tree_shape import TreeShape

PLAIN = 0
# how much of its gain from drafting, in plain steps, a sequence may lose again before drafting pauses
CREDIT = 8.0
# steps are plain if the best tree is expected to reach less than this fraction of plain decoding's tokens per second
LOSING = 0.95
# a batch ends with its slowest sequence, which accepts less than average: the additional gain that drafting must
# promise for each doubling of the batch
LAG = 0.02
# how much more tokens per second other drafters' proposals must promise than the MTP modules' drafts
CLEARLY = 1.02
# weights of a step's time in the corrections of its shape and of all shapes; and the bound to which its log-ratio to
# the expected time is clipped
OWN, COMMON, MOST_SURPRISE = 0.1, 0.01, log(1.5)


class ShapeTable:
    """What has been learned about a set of shapes from all sequences of a loaded model.

    Args:
        shapes: the first is plain decoding.
        seconds: measured time of each shape's step.
        settling: seconds for the switch from drafting to plain steps.
        catching_up: seconds for the switch back, by the most rows that the MTP modules then read.
        chances: acceptance rates learned earlier, with other step times; None if there are none yet.
        scripted: of how many shapes, the last ones, the drafts are those of drafters other than the MTP modules.

    Raises:
        ValueError: the first shape has nodes, or the numbers do not match.
    """

    def __init__(
        self, shapes: Sequence[TreeShape], seconds: Sequence[float], settling: float, catching_up: Mapping[int, float],
        chances: Chances | None = None, scripted: int = 0,
    ) -> None:  # fmt: skip
        if shapes[PLAIN].parents or len(shapes) != len(seconds) or len(shapes) < 2 or min(seconds) <= 0:
            raise ValueError("shapes are plain decoding, then trees, each with its seconds")
        self.shapes, self._seconds = tuple(shapes), tuple(seconds)
        others = len(self.shapes) - scripted
        # those of the MTP modules, and of other drafters
        self.drafting, self.scripted = range(1, others), range(others, len(self.shapes))
        self._settling, self._catching_up = settling, sorted(catching_up.items())
        self.chances, self.debt = chances or Chances(MODEL_MEMORY), 0.0
        # one factor is common to all shapes (longer contexts are slower), another is each shape's own
        self._common, self._own = Correction(), [Correction() for _ in shapes]

    def seconds(self, shape: int) -> float:
        """Returns the expected seconds of a shape's step."""
        return self._seconds[shape] * self._common.factor * self._own[shape].factor

    def relative(self, shape: int) -> float:
        """Returns the time of a shape's step, in plain steps."""
        return self.seconds(shape) / self.seconds(PLAIN)

    def switching(self, behind: int) -> float:
        """Returns the time of switching from plain steps to drafting and back, in plain steps.

        Args:
            behind: rows that the MTP modules have not processed; the drafting step itself processes one.
        """
        passes = ((0, 0.0), *self._catching_up)
        reading = next((seconds for rows, seconds in passes if behind - 1 <= rows), passes[-1][1])
        return (self._settling + reading) / self._seconds[PLAIN]

    def learn(self, shape: int, seconds: float) -> None:
        """Learns from the seconds of a shape's step."""
        found = surprise(seconds, self.seconds(shape), MOST_SURPRISE)
        self._common.follow(found, COMMON)
        self._own[shape].follow(found, OWN)


@dataclass(frozen=True, slots=True)
class ShapeBatch:
    """The sequences that take a step of one shape together.

    Attributes:
        table: the shapes for this number of sequences.
        sequences: number of sequences.
        left: most tokens that any of them may still generate.
        behind: their rows that the MTP modules have not processed.
        given: expected tokens of a step with other drafters' proposals, for each of their shapes; 1 if they have none.
        eager: whether every step drafts: the deepest of the modules' trees, if other drafters do not promise more.
    """

    table: ShapeTable
    sequences: int = 1
    left: float = inf
    behind: int = 0
    given: Sequence[float] = ()
    eager: bool = False


@dataclass(frozen=True, slots=True)
class ShapePlan:
    """The shape of a step.

    Attributes:
        table: the shapes that it was chosen from.
        shape: its index there.
        tokens: expected number of tokens from the step.
        seconds: expected time of the step.
    """

    table: ShapeTable
    shape: int
    tokens: float
    seconds: float


class ShapePlanner:
    """Chooses the shapes of one sequence, or of a batch that steps together; see `base.Planner`.

    Args:
        table: what was learned from earlier sequences.
    """

    def __init__(self, table: ShapeTable) -> None:
        self._chances = Chances(SEQUENCE_MEMORY, table.chances)
        self._pace = Pace(table.debt, CREDIT)
        self._saved = 0.0  # for trying deeper shapes

    def plan(self, batch: ShapeBatch) -> ShapePlan:
        """Returns the shape of the next step."""
        table = batch.table
        own = table.shapes[: table.scripted.start]
        tokens = [*self._chances.tokens(*own), *(batch.given or [1.0] * len(table.scripted))]
        shape = self._choose(batch, tokens)
        return ShapePlan(table, shape, tokens[shape], table.seconds(shape))

    def _choose(self, batch: ShapeBatch, tokens: Sequence[float]) -> int:
        table, drafting = batch.table, batch.table.drafting
        if any(tokens[shape] > 1.0 for shape in table.scripted):
            paused = self._pace.paused and not batch.eager
            own = [tokens[shape] / table.relative(shape) for shape in drafting if not paused]
            least = max([*own, *([] if batch.eager else [1.0])], default=0.0)
            # each such step among plain ones is a switch and back
            catching_up = table.switching(batch.behind) if batch.behind > 1 else 0.0
            others, shape = max(
                (tokens[shape] / (table.relative(shape) + catching_up), -shape) for shape in table.scripted
            )
            if others > CLEARLY * least:
                return -shape
        if not drafting:
            return PLAIN
        if batch.eager:
            return drafting[-1]
        rate, best = max((tokens[shape] / table.relative(shape), -shape) for shape in drafting)
        best = -best
        least = LOSING if batch.sequences == 1 else 1.0 + LAG * log2(batch.sequences)
        losing, switching = rate < least, table.switching(batch.behind)
        if batch.behind > 1 and not losing and rate > 1.0 and batch.left * (1.0 - 1.0 / rate) < switching:
            return PLAIN  # the rest is too short to win back the cost of the switch
        if not self._pace.drafts(switching, losing):
            return PLAIN
        if best + 1 in drafting:
            forgone = rate * table.relative(best + 1) - tokens[best + 1]
            self._saved += ALLOWED
            if self._saved >= max(forgone, LEAST_PRICE):
                self._saved = 0.0
                return best + 1
        return best

    def learn(self, plan: ShapePlan, outcome: Outcome) -> None:
        """Learns from the outcome of a step; only its seconds if there are no paths."""
        table, shape = plan.table, plan.table.shapes[plan.shape]
        if outcome.seconds is not None:
            table.learn(plan.shape, outcome.seconds.step)
        paths = [tuple(path) for path in outcome.paths if path is not None]
        if plan.shape == PLAIN or plan.shape in table.scripted or not paths:
            return
        seen = Seen.of(shape, Counter(paths))
        for chances in (self._chances, table.chances):
            chances.learn(seen)
        (expected,) = self._chances.tokens(shape)
        # the mean of actual and expected tokens: either alone pauses too early or too late
        tokens = (1.0 + sum(map(len, paths)) / len(paths) + expected) / 2.0
        self._pace.record(tokens - table.relative(plan.shape))
        table.debt = max(0.0, self._pace.debt)
