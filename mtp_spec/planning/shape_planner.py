"""Which captured step comes next on a GPU: what "auto" and `Speculation(adaptive=True)` do there.

A captured step has one shape, so the choice is among a few of them: plain decoding and trees of growing depth. Each
brings some tokens, by the chances of its nodes learned from the text, and takes some time, measured when it was
captured and again whenever it runs. The shape with most tokens per second is taken. Because a shape teaches nothing
about depths it does not reach, a deeper one runs now and then; because plain steps teach nothing at all, a drafted one
is tried now and then; what both lose is a fixed share of the time.

Nothing here changes the text: it decides in the host's time, while the GPU is busy with the steps before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, log, log2

from mtp_spec.planning.base import Outcome
from mtp_spec.planning.chances import MODEL_MEMORY, TEXT_MEMORY, Chances
from mtp_spec.planning.correction import Correction, surprise
from mtp_spec.planning.governor import ALLOWED, LEAST_PRICE, Pace
from mtp_spec.tree_shape import TreeShape

PLAIN = 0
# plain steps that a text may lose again of what drafting has won it, before it pauses
CREDIT = 8.0
# steps are plain where the best tree is expected to bring less than this part of plain decoding's tokens per second
LOSING = 0.95
# texts side by side end with the slowest of them, which accepts less than their mean: what drafting must promise more
# with every doubling of their number
LAG = 0.02
# weights of a step's time in the corrections: of its shape, and of all; and how far from the expected one, as the
# logarithm of a factor, it is taken to be at most
OWN, COMMON, MOST_SURPRISE = 0.1, 0.01, log(1.5)


class ShapeTable:
    """What the texts of a loaded model have taught about some shapes.

    Args:
        shapes: the first is plain decoding.
        seconds: of each shape's step, measured.
        settling: seconds that going from drafting to plain steps takes.
        catching_up: and of going back, by the most rows that the MTP modules then read.
        chances: what was learned beside steps of other times; None: nothing yet.

    Raises:
        ValueError: the first shape has nodes, or the numbers do not match.
    """

    def __init__(
        self, shapes: Sequence[TreeShape], seconds: Sequence[float], settling: float, catching_up: Mapping[int, float],
        chances: Chances | None = None,
    ) -> None:  # fmt: skip
        if shapes[PLAIN].parents or len(shapes) != len(seconds) or len(shapes) < 2 or min(seconds) <= 0:
            raise ValueError("shapes are plain decoding, then trees, each with its seconds")
        self.shapes, self._seconds = tuple(shapes), tuple(seconds)
        self._settling, self._catching_up = settling, sorted(catching_up.items())
        self.chances, self.debt = chances or Chances(MODEL_MEMORY), 0.0
        # all shapes are slower than measured by one factor (longer contexts), each by one of its own
        self._common, self._own = Correction(), [Correction() for _ in shapes]

    def seconds(self, shape: int) -> float:
        """Returns the seconds expected of a shape's step."""
        return self._seconds[shape] * self._common.factor * self._own[shape].factor

    def relative(self, shape: int) -> float:
        """Returns the time of a shape's step, a plain step being 1."""
        return self.seconds(shape) / self.seconds(PLAIN)

    def switching(self, behind: int) -> float:
        """Returns the time of going from plain steps to drafting and back, in plain steps.

        Args:
            behind: rows that the MTP modules have not read; the drafting step itself reads one.
        """
        passes = ((0, 0.0), *self._catching_up)
        reading = next((seconds for rows, seconds in passes if behind - 1 <= rows), passes[-1][1])
        return (self._settling + reading) / self._seconds[PLAIN]

    def learn(self, shape: int, seconds: float) -> None:
        """Takes the seconds that a shape's step took."""
        found = surprise(seconds, self.seconds(shape), MOST_SURPRISE)
        self._common.follow(found, COMMON)
        self._own[shape].follow(found, OWN)


@dataclass(frozen=True, slots=True)
class ShapeBatch:
    """The sequences that take a step of one shape together.

    Attributes:
        table: of so many.
        texts: how many they are.
        left: tokens that the longest of them may still get.
        behind: rows of theirs that the MTP modules have not read.
    """

    table: ShapeTable
    texts: int = 1
    left: float = inf
    behind: int = 0


@dataclass(frozen=True, slots=True)
class ShapePlan:
    """Which shape a step has.

    Attributes:
        table: that it was chosen from.
        shape: its number there.
        tokens, seconds: expected of the step.
    """

    table: ShapeTable
    shape: int
    tokens: float
    seconds: float


class ShapePlanner:
    """Chooses the shapes of one text, or of several that take their steps together; see `base.Planner`.

    Args:
        table: what earlier texts have taught.
    """

    def __init__(self, table: ShapeTable) -> None:
        self._chances = Chances(TEXT_MEMORY, table.chances)
        self._pace = Pace(table.debt, CREDIT)
        self._saved = 0.0  # for looking deeper

    def plan(self, batch: ShapeBatch) -> ShapePlan:
        """Returns the shape of the next step."""
        table = batch.table
        tokens = [self._chances.tokens(shape) for shape in table.shapes]
        shape = self._choose(batch, tokens)
        return ShapePlan(table, shape, tokens[shape], table.seconds(shape))

    def _choose(self, batch: ShapeBatch, tokens: Sequence[float]) -> int:
        table, drafting = batch.table, range(1, len(batch.table.shapes))
        rate, best = max((tokens[shape] / table.relative(shape), -shape) for shape in drafting)
        best = -best
        least = LOSING if batch.texts == 1 else 1.0 + LAG * log2(batch.texts)
        losing, switching = rate < least, table.switching(batch.behind)
        if batch.behind > 1 and not losing and rate > 1.0 and batch.left * (1.0 - 1.0 / rate) < switching:
            return PLAIN  # what is left to win is less than what beginning again costs
        if not self._pace.drafts(switching, losing):
            return PLAIN
        if best + 1 < len(table.shapes):
            forgone = rate * table.relative(best + 1) - tokens[best + 1]
            self._saved += ALLOWED
            if self._saved >= max(forgone, LEAST_PRICE):
                self._saved = 0.0
                return best + 1
        return best

    def learn(self, plan: ShapePlan, outcome: Outcome) -> None:
        """Takes what came of a step; without paths its seconds only."""
        table, shape = plan.table, plan.table.shapes[plan.shape]
        if outcome.seconds is not None:
            table.learn(plan.shape, outcome.seconds.step)
        paths = [tuple(path) for path in outcome.paths if path is not None]
        if plan.shape == PLAIN or not paths:
            return
        for path, times in Counter(paths).items():
            for chances in (self._chances, table.chances):
                chances.learn(shape, path, times, len(paths))
        # half chance, half expectation: either alone pauses too early or too late
        tokens = (1.0 + sum(map(len, paths)) / len(paths) + self._chances.tokens(shape)) / 2.0
        self._pace.record(tokens - table.relative(plan.shape))
        table.debt = max(0.0, self._pace.debt)
