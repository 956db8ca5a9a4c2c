"""Which captured step comes next on a GPU: what "auto" and `Speculation(adaptive=True)` do there.

A captured step has one shape, so the choice is among a few of them, the rungs: plain decoding and trees of growing
depth. Each brings some tokens, by the chances of its nodes learned from the text, and takes some time, measured when it
was captured and again whenever it runs. The rung with most tokens per second is taken. Because a rung teaches nothing
about depths it does not reach, a deeper one runs now and then; because plain steps teach nothing at all, a drafted one
is tried now and then; what both lose is a fixed share of the time.

Nothing here changes the text: it decides in the host's time, while the GPU is busy with the steps before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import exp, inf, log, log2

from mtp_spec.planning.governor import ALLOWED, LEAST_PRICE, Pace
from mtp_spec.tree import ROOT
from mtp_spec.tree_shape import TreeShape

PLAIN = 0
# before anything was seen: the chance of a best child, and of a sibling once the better ones have failed
FIRST_CHANCE, FIRST_SHARE = 0.7, 0.4
# observations that a text remembers, that a model's texts remember, and what the latter count for in a new text
TEXT_MEMORY, MODEL_MEMORY, CARRIED = 40.0, 400.0, 8.0
# plain steps that a text may lose again of what drafting has won it, before it pauses
CREDIT = 8.0
# steps are plain where the best tree is expected to bring less than this part of plain decoding's tokens per second
LOSING = 0.95
# texts side by side end with the slowest of them, which accepts less than their mean: what drafting must promise more
# with every doubling of their number
LAG = 0.02
# weights of a step's time in the corrections: of its rung, and of all; it is taken to be at most this far from expected
OWN, COMMON, MOST_SURPRISE = 0.1, 0.01, log(1.5)


class Chances:
    """How often the child of each depth and rank was accepted, once its parent was and its better siblings were not.

    Args:
        memory: observations after which an old one counts for a third.
        before: what is expected of a depth and rank that were not seen yet.
    """

    def __init__(self, memory: float, before: Chances | None = None) -> None:
        self._keep, self._before = 1.0 - 1.0 / memory, before
        self._seen: dict[tuple[int, int], tuple[float, float]] = {}

    def chance(self, depth: int, rank: int) -> float:
        """Returns the probability of the child of this rank (0 the best) at this depth (1 the root's children)."""
        won, tried = self._seen.get((depth, rank), (0.0, 0.0))
        return (won + CARRIED * self._expected(depth, rank)) / (tried + CARRIED)

    def _expected(self, depth: int, rank: int) -> float:
        if self._before is not None:
            return self._before.chance(depth, rank)
        return FIRST_SHARE if rank else FIRST_CHANCE

    def learn(self, shape: TreeShape, path: Sequence[int], times: int = 1, texts: int = 1) -> None:
        """Takes the nodes of an accepted path, depth 1 first.

        Args:
            times: texts of which it was the path.
            texts: those that took the step: all of them are one observation
                as far as it is to be forgotten.
        """
        keep = self._keep ** (times / texts)
        for parent in (ROOT, *path):
            for node, its_parent in enumerate(shape.parents):
                if its_parent != parent:
                    continue
                key, accepted = (shape.depths[node], shape.ranks[node]), node in path
                won, tried = self._seen.get(key, (0.0, 0.0))
                self._seen[key] = (won * keep + accepted * times, tried * keep + times)
                if accepted:
                    break

    def tokens(self, shape: TreeShape) -> float:
        """Returns the expected tokens of a step, the bonus token included."""
        reached, left = {ROOT: 1.0}, dict[int, float]()
        for node, parent in enumerate(shape.parents):
            open_to = left.get(parent, reached[parent])  # siblings follow their betters
            reached[node] = open_to * self.chance(shape.depths[node], shape.ranks[node])
            left[parent] = open_to - reached[node]
        return sum(reached.values())


class Ladder:
    """What the texts of a loaded model have taught about some rungs.

    Args:
        shapes: the rungs' trees; the first is plain decoding.
        seconds: of each rung's step, measured.
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
            raise ValueError("rungs are plain decoding, then trees, each with its seconds")
        self.shapes, self._seconds = tuple(shapes), tuple(seconds)
        self._settling, self._catching_up = settling, sorted(catching_up.items())
        self.chances, self.debt = chances or Chances(MODEL_MEMORY), 0.0
        # logarithms: all rungs are slower than measured by one factor (longer contexts), each by one of its own
        self._common, self._own = 0.0, [0.0] * len(shapes)

    def seconds(self, rung: int) -> float:
        """Returns the seconds expected of a rung's step."""
        return self._seconds[rung] * exp(self._common + self._own[rung])

    def relative(self, rung: int) -> float:
        """Returns the time of a rung's step, a plain step being 1."""
        return self.seconds(rung) / self.seconds(PLAIN)

    def turning(self, behind: int) -> float:
        """Returns the time of going from plain steps to drafting and back, in plain steps.

        Args:
            behind: rows that the MTP modules have not read; the drafting step itself reads one.
        """
        passes = ((0, 0.0), *self._catching_up)
        reading = next((seconds for rows, seconds in passes if behind - 1 <= rows), passes[-1][1])
        return (self._settling + reading) / self._seconds[PLAIN]

    def learn(self, rung: int, seconds: float) -> None:
        """Takes the seconds that a rung's step took."""
        surprise = log(max(seconds, 1e-9) / self.seconds(rung))
        surprise = max(-MOST_SURPRISE, min(MOST_SURPRISE, surprise))
        self._common += COMMON * surprise
        self._own[rung] += OWN * surprise


class TextLadder:
    """Chooses the rungs of one text, or of several that take their steps together.

    Steps are launched before the results of those before are known, so `choose` may be called several times between
    two calls of `learn`.

    Attributes:
        ladder: that of the next step; another one where another number of texts takes it.
        texts: that take it.
        left: tokens that the longest of them may still get.
        behind: rows of theirs that the MTP modules have not read.
    """

    def __init__(self, ladder: Ladder) -> None:
        self.ladder, self.texts, self.left, self.behind = ladder, 1, inf, 0
        self._chances = Chances(TEXT_MEMORY, ladder.chances)
        self._pace = Pace(ladder.debt, CREDIT)
        self._saved = 0.0  # for looking deeper

    def choose(self) -> int:
        """Returns the rung of the next step."""
        ladder = self.ladder
        drafting = range(1, len(ladder.shapes))
        rate, best = max((self.tokens(rung) / ladder.relative(rung), -rung) for rung in drafting)
        best = -best
        least = LOSING if self.texts == 1 else 1.0 + LAG * log2(self.texts)
        losing, turning = rate < least, ladder.turning(self.behind)
        if self.behind > 1 and not losing and rate > 1.0 and self.left * (1.0 - 1.0 / rate) < turning:
            return PLAIN  # what is left to win is less than what beginning again costs
        if not self._pace.drafts(turning, losing):
            return PLAIN
        if best + 1 < len(ladder.shapes):
            forgone = rate * ladder.relative(best + 1) - self.tokens(best + 1)
            self._saved += ALLOWED
            if self._saved >= max(forgone, LEAST_PRICE):
                self._saved = 0.0
                return best + 1
        return best

    def tokens(self, rung: int) -> float:
        """Returns the tokens expected of a rung's step."""
        return self._chances.tokens(self.ladder.shapes[rung])

    def learn(self, rung: int, path: Sequence[int], seconds: float | None) -> None:
        """Takes the outcome of a step.

        Args:
            path: the accepted nodes, depth 1 first.
            seconds: of the step; None where they were not measured.
        """
        self.learn_all(rung, [path], seconds)

    def learn_all(self, rung: int, paths: Sequence[Sequence[int]], seconds: float | None) -> None:
        """Takes the outcome of a step of several texts, each with a path; else as `learn`."""
        if seconds is not None:
            self.ladder.learn(rung, seconds)
        if rung == PLAIN:
            return
        for path, times in Counter(tuple(path) for path in paths).items():
            for chances in (self._chances, self.ladder.chances):
                chances.learn(self.ladder.shapes[rung], path, times, len(paths))
        # half chance, half expectation: either alone pauses too early or too late
        tokens = (1.0 + sum(map(len, paths)) / len(paths) + self.tokens(rung)) / 2.0
        self._pace.record(tokens - self.ladder.relative(rung))
        self.ladder.debt = max(0.0, self._pace.debt)
