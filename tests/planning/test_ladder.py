"""The choice among captured steps, with simulated outcomes and times: near the best of them, never far under plain."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest

from mtp_spec.planning.shape_planner import PLAIN, Chances, Ladder, TextLadder
from mtp_spec.speculation import Speculation
from mtp_spec.tree import ROOT
from mtp_spec.tree_shape import TreeShape

SHAPES = [TreeShape.of(None), *(TreeShape.of(Speculation(depth)) for depth in (1, 2, 3, 4))]
# milliseconds of a small model's steps, where rows are cheap, and of one whose rows bring experts of their own
CHEAP, DEAR = (0.43, 0.60, 0.79, 0.93, 1.10), (17.1, 24.0, 31.0, 36.0, 42.0)
TURNING, AHEAD = 0.25, 2
Accept = Callable[[int, int], float]  # text, tokens made -> chance of a draft
KINDS: dict[str, Accept] = {
    "sure": lambda _, __: 0.97, "good": lambda _, __: 0.8, "fair": lambda _, __: 0.6, "poor": lambda _, __: 0.3,
    "hopeless": lambda _, __: 0.02,
}  # fmt: skip


@dataclass
class Fixed:
    rung: int

    def choose(self) -> int:
        return self.rung

    def learn(self, rung: int, path: list[int], seconds: float) -> None:
        pass


@dataclass
class Wrote:
    tokens: int = 0
    seconds: float = 0.0
    rungs: list[int] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def write(policy: Callable[[], Fixed | TextLadder], times: tuple[float, ...], accept: Accept, texts: int) -> Wrote:
    """Writes texts of 150 tokens, results known two steps late, as the decoder does."""
    wrote, chance = Wrote(), random.Random(0)
    for text in range(texts):
        steps, made, launched, last = policy(), 0, list[int](), PLAIN
        while made < 150:
            while len(launched) < AHEAD:
                launched.append(steps.choose())
            rung, draws = launched.pop(0), [chance.random() for _ in SHAPES]
            count = next((d for d in range(rung) if draws[d] > accept(text, made)), rung)
            seconds = times[rung] * chance.uniform(0.97, 1.03)
            wrote.seconds += seconds + TURNING / 2 * times[PLAIN] * ((rung > PLAIN) != (last > PLAIN))
            made, last = made + 1 + count, rung
            wrote.tokens += 1 + count
            wrote.rungs.append(rung)
            steps.learn(rung, list(range(count)), seconds)
    return wrote


def climbing(times: tuple[float, ...]) -> Callable[[], TextLadder]:
    ladder = Ladder(SHAPES, times, TURNING * times[PLAIN], {})
    return lambda: TextLadder(ladder)


@pytest.mark.parametrize("times", [CHEAP, DEAR], ids=["cheap rows", "dear rows"])
@pytest.mark.parametrize("kind", KINDS)
def test_near_the_best_fixed_step(kind: str, times: tuple[float, ...]) -> None:
    best = max(write(partial(Fixed, rung), times, KINDS[kind], 40).rate for rung in range(len(SHAPES)))
    assert write(climbing(times), times, KINDS[kind], 40).rate >= 0.98 * best


def test_better_than_any_where_texts_differ() -> None:
    def accept(text: int, _: int) -> float:
        return 0.95 if text % 2 else 0.02

    best = max(write(partial(Fixed, rung), CHEAP, accept, 40).rate for rung in range(len(SHAPES)))
    assert write(climbing(CHEAP), CHEAP, accept, 40).rate > 1.05 * best


def test_notices_in_the_middle_of_a_text() -> None:
    wrote = write(climbing(DEAR), DEAR, lambda _, made: 0.95 if made > 75 else 0.02, 20)
    assert wrote.rate > write(lambda: Fixed(PLAIN), DEAR, lambda *_: 0.0, 20).rate


def test_wrong_first_times_are_mended() -> None:
    # timed on one token repeated, whose rows share their experts
    hopeful = Ladder(SHAPES, (17.1, 17.5, 18.0, 18.5, 19.0), TURNING * 17.1, {})
    wrote = write(lambda: TextLadder(hopeful), DEAR, KINDS["fair"], 40)
    best = max(write(partial(Fixed, rung), DEAR, KINDS["fair"], 40).rate for rung in range(len(SHAPES)))
    assert wrote.rate > 0.97 * best
    for rung, seconds in enumerate(DEAR):
        if wrote.rungs.count(rung) > 100:
            assert hopeful.seconds(rung) == pytest.approx(seconds, rel=0.1)


@pytest.mark.parametrize(("texts", "drafts"), [(1, True), (4, True), (16, False), (64, False)])
def test_many_texts_want_more_of_drafting(texts: int, drafts: bool) -> None:
    """They end with the slowest of them, so a little more tokens a second on the average brings nothing."""
    times = (1.0, 1.7, 2.42, 3.2, 4.0)
    planner = climbing(times)()
    planner.texts = texts
    rungs = list[int]()
    for _ in range(400):
        rung = planner.choose()
        rungs.append(rung)
        planner.learn_all(rung, [[*range(rung)] if text % 5 else [] for text in range(5)], times[rung])
    assert (sum(rung > PLAIN for rung in rungs[100:]) > 250) == drafts


def test_chances_are_learned_by_depth_and_rank() -> None:
    shape, chances, draw = TreeShape.of(Speculation(branching=(2, 1))), Chances(2000.0), random.Random(1)
    truth = {(1, 0): 0.6, (1, 1): 0.5, (2, 0): 0.3}
    tokens = 0
    for _ in range(4000):
        path = list[int]()
        while True:
            parent = path[-1] if path else ROOT
            children = [node for node, its in enumerate(shape.parents) if its == parent]
            hit = [n for n in children if draw.random() < truth[shape.depths[n], shape.ranks[n]]]
            if not hit:
                break
            path.append(hit[0])
        tokens += 1 + len(path)
        chances.learn(shape, path)
    for key, chance in truth.items():
        assert chances.chance(*key) == pytest.approx(chance, abs=0.05)
    assert chances.tokens(shape) == pytest.approx(tokens / 4000, rel=0.04)


def test_rungs_must_fit() -> None:
    wrong = ((SHAPES[1:], CHEAP[1:]), (SHAPES, CHEAP[1:]), (SHAPES[:1], CHEAP[:1]), (SHAPES, (0.0,) * 5))
    for shapes, seconds in wrong:
        with pytest.raises(ValueError, match="rungs are plain decoding"):
            Ladder(shapes, seconds, 0.1, {})


def test_beginning_again_costs_what_is_to_be_read() -> None:
    ladder = Ladder(SHAPES, DEAR, 2.0, {16: 3.0, 128: 9.0})
    costs = {0: 2.0, 1: 2.0, 2: 5.0, 17: 5.0, 18: 11.0, 128: 11.0, 200: 11.0}
    for behind, seconds in costs.items():
        assert ladder.turning(behind) == pytest.approx(seconds / DEAR[PLAIN])


def test_a_text_near_its_end_does_not_begin_again() -> None:
    steps = TextLadder(Ladder(SHAPES, DEAR, 0.0, {128: 10 * DEAR[PLAIN]}, certain()))
    for behind, left, drafts in ((100, 200, True), (100, 4, False), (1, 4, True)):
        steps.behind, steps.left = behind, left
        assert (steps.choose() > PLAIN) == drafts


def test_drafting_that_is_about_as_fast_goes_on() -> None:
    """Also where a text has no end that is known: steps that look three parts in a hundred slower teach something."""
    times = (1.0, 2.0 / 0.97, 9.0, 9.0, 9.0)
    steps = TextLadder(Ladder(SHAPES, times, 0.0, {128: 10.0}, certain()))
    steps.behind = 100
    assert sum(steps.choose() > PLAIN for _ in range(200)) > 150


def test_tries_lose_a_fixed_share_however_dear_they_are() -> None:
    """Drafting that never pays is tried the less often the more there is to be read before."""
    for cost in (1.0, 10.0):
        steps = TextLadder(Ladder(SHAPES, DEAR, 0.0, {128: cost * DEAR[PLAIN]}, hopeless()))
        steps.behind, lost = 100, 0.0
        for _ in range(20_000):
            rung = steps.choose()
            if rung != PLAIN:
                lost += cost + steps.ladder.relative(rung) - 1.0
                steps.learn(rung, [], None)
        assert 0 < lost < 0.01 * 20_000


def hopeless() -> Chances:
    """Returns chances of a model whose drafts were never accepted."""
    return learned([])


def certain() -> Chances:
    """Returns chances of a model whose drafts were always accepted."""
    return learned([0, 1, 2, 3])


def learned(path: list[int]) -> Chances:
    chances = Chances(400.0)
    for _ in range(400):
        chances.learn(SHAPES[-1], path)
    return chances
