"""The choice among captured shapes, with simulated outcomes and times: near the best of them, never far under plain."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from mtp_spec.planning.base import Outcome, Seconds
from mtp_spec.planning.chances import Chances, Seen
from mtp_spec.planning.shape_planner import PLAIN, ShapeBatch, ShapePlan, ShapePlanner, ShapeTable
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
    shape: int

    def plan(self, batch: ShapeBatch) -> ShapePlan:
        return ShapePlan(batch.table, self.shape, 1.0, 1.0)

    def learn(self, plan: ShapePlan, outcome: Outcome) -> None:
        pass


@dataclass
class Wrote:
    tokens: int = 0
    seconds: float = 0.0
    shapes: list[int] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def write(
    planners: Callable[[], Fixed | ShapePlanner],
    table: ShapeTable,
    times: tuple[float, ...],
    accept: Accept,
    texts: int,
) -> Wrote:
    """Writes texts of 150 tokens, results known two steps late, as the decoder does."""
    wrote, chance = Wrote(), random.Random(0)
    for text in range(texts):
        planner, made, launched, last = planners(), 0, list[ShapePlan](), PLAIN
        while made < 150:
            while len(launched) < AHEAD:
                launched.append(planner.plan(ShapeBatch(table)))
            plan, draws = launched.pop(0), [chance.random() for _ in SHAPES]
            shape = plan.shape
            count = next((d for d in range(shape) if draws[d] > accept(text, made)), shape)
            seconds = times[shape] * chance.uniform(0.97, 1.03)
            wrote.seconds += seconds + TURNING / 2 * times[PLAIN] * ((shape > PLAIN) != (last > PLAIN))
            made, last = made + 1 + count, shape
            wrote.tokens += 1 + count
            wrote.shapes.append(shape)
            planner.learn(plan, Outcome([range(count)], Seconds(seconds)))
    return wrote


def table_of(times: tuple[float, ...]) -> ShapeTable:
    return ShapeTable(SHAPES, times, TURNING * times[PLAIN], {})


def planned(times: tuple[float, ...], accept: Accept, texts: int) -> Wrote:
    table = table_of(times)
    return write(lambda: ShapePlanner(table), table, times, accept, texts)


def fixed(shape: int, times: tuple[float, ...], accept: Accept, texts: int) -> Wrote:
    return write(lambda: Fixed(shape), table_of(times), times, accept, texts)


def best_fixed(times: tuple[float, ...], accept: Accept) -> float:
    return max(fixed(shape, times, accept, 40).rate for shape in range(len(SHAPES)))


@pytest.mark.parametrize("times", [CHEAP, DEAR], ids=["cheap rows", "dear rows"])
@pytest.mark.parametrize("kind", KINDS)
def test_near_the_best_fixed_step(kind: str, times: tuple[float, ...]) -> None:
    assert planned(times, KINDS[kind], 40).rate >= 0.98 * best_fixed(times, KINDS[kind])


def test_better_than_any_where_texts_differ() -> None:
    def accept(text: int, _: int) -> float:
        return 0.95 if text % 2 else 0.02

    assert planned(CHEAP, accept, 40).rate > 1.05 * best_fixed(CHEAP, accept)


def test_notices_in_the_middle_of_a_text() -> None:
    wrote = planned(DEAR, lambda _, made: 0.95 if made > 75 else 0.02, 20)
    assert wrote.rate > fixed(PLAIN, DEAR, lambda *_: 0.0, 20).rate


def test_wrong_first_times_are_mended() -> None:
    # timed on one token repeated, whose rows share their experts
    hopeful = ShapeTable(SHAPES, (17.1, 17.5, 18.0, 18.5, 19.0), TURNING * 17.1, {})
    wrote = write(lambda: ShapePlanner(hopeful), hopeful, DEAR, KINDS["fair"], 40)
    assert wrote.rate > 0.97 * best_fixed(DEAR, KINDS["fair"])
    for shape, seconds in enumerate(DEAR):
        if wrote.shapes.count(shape) > 100:
            assert hopeful.seconds(shape) == pytest.approx(seconds, rel=0.1)


@pytest.mark.parametrize(("texts", "drafts"), [(1, True), (4, True), (16, False), (64, False)])
def test_many_texts_want_more_of_drafting(texts: int, drafts: bool) -> None:
    """They end with the slowest of them, so a little more tokens a second on the average brings nothing."""
    times = (1.0, 1.7, 2.42, 3.2, 4.0)
    table = table_of(times)
    planner, shapes = ShapePlanner(table), list[int]()
    for _ in range(400):
        plan = planner.plan(ShapeBatch(table, texts))
        shapes.append(plan.shape)
        paths = [[*range(plan.shape)] if text % 5 else [] for text in range(5)]
        planner.learn(plan, Outcome(paths, Seconds(times[plan.shape])))
    assert (sum(shape > PLAIN for shape in shapes[100:]) > 250) == drafts


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
        chances.learn(Seen.of(shape, {tuple(path): 1}))
    for key, chance in truth.items():
        assert chances.chance(*key) == pytest.approx(chance, abs=0.05)
    assert chances.tokens(shape)[0] == pytest.approx(tokens / 4000, rel=0.04)


def test_a_step_of_several_texts_shows_what_each_of_them_does() -> None:
    shape = TreeShape.of(Speculation(branching=(2, 1)))
    assert shape.parents == (ROOT, ROOT, 0, 1)
    seen = Seen.of(shape, {(0, 2): 2, (): 1, (1,): 1})
    assert seen == Seen({(1, 0): (2, 4), (1, 1): (1, 2), (2, 0): (2, 3)}, 4)
    together, singly = Chances(1e9), Chances(1e9)  # so long a memory that the order does not matter
    together.learn(seen)
    for path in ((0, 2), (), (1,), (0, 2)):
        singly.learn(Seen.of(shape, {path: 1}))
    for key in seen.tries:
        assert together.chance(*key) == pytest.approx(singly.chance(*key))


def test_shapes_must_fit() -> None:
    wrong = ((SHAPES[1:], CHEAP[1:]), (SHAPES, CHEAP[1:]), (SHAPES[:1], CHEAP[:1]), (SHAPES, (0.0,) * 5))
    for shapes, seconds in wrong:
        with pytest.raises(ValueError, match="shapes are plain decoding"):
            ShapeTable(shapes, seconds, 0.1, {})


def test_beginning_again_costs_what_is_to_be_read() -> None:
    table = ShapeTable(SHAPES, DEAR, 2.0, {16: 3.0, 128: 9.0})
    costs = {0: 2.0, 1: 2.0, 2: 5.0, 17: 5.0, 18: 11.0, 128: 11.0, 200: 11.0}
    for behind, seconds in costs.items():
        assert table.switching(behind) == pytest.approx(seconds / DEAR[PLAIN])


def test_a_text_near_its_end_does_not_begin_again() -> None:
    table = ShapeTable(SHAPES, DEAR, 0.0, {128: 10 * DEAR[PLAIN]}, certain())
    planner = ShapePlanner(table)
    for behind, left, drafts in ((100, 200, True), (100, 4, False), (1, 4, True)):
        assert (planner.plan(ShapeBatch(table, 1, left, behind)).shape > PLAIN) == drafts


def test_drafting_that_is_about_as_fast_goes_on() -> None:
    """Also where a text has no end that is known: steps that look three parts in a hundred slower teach something."""
    times = (1.0, 2.0 / 0.97, 9.0, 9.0, 9.0)
    table = ShapeTable(SHAPES, times, 0.0, {128: 10.0}, certain())
    planner = ShapePlanner(table)
    assert sum(planner.plan(ShapeBatch(table, behind=100)).shape > PLAIN for _ in range(200)) > 150


def test_tries_lose_a_fixed_share_however_dear_they_are() -> None:
    """Drafting that never pays is tried the less often the more there is to be read before."""
    for cost in (1.0, 10.0):
        table = ShapeTable(SHAPES, DEAR, 0.0, {128: cost * DEAR[PLAIN]}, hopeless())
        planner, lost = ShapePlanner(table), 0.0
        for _ in range(20_000):
            plan = planner.plan(ShapeBatch(table, behind=100))
            if plan.shape != PLAIN:
                lost += cost + table.relative(plan.shape) - 1.0
                planner.learn(plan, Outcome([[]]))
        assert 0 < lost < 0.01 * 20_000


def test_a_sequence_that_ended_teaches_nothing_but_its_time() -> None:
    """Its path was cut short, which is not the drafts' fault."""
    table = table_of(DEAR)
    planner, before = ShapePlanner(table), table.chances.chance(1, 0)
    plan = ShapePlan(table, 2, 1.0, 1.0)
    planner.learn(plan, Outcome([None], Seconds(2 * DEAR[2])))
    assert table.chances.chance(1, 0) == before
    assert table.seconds(2) > DEAR[2]
    planner.learn(plan, Outcome([[], None]))
    assert table.chances.chance(1, 0) < before


@pytest.mark.parametrize("modules", [True, False])
def test_every_step_drafts_where_the_tree_is_fixed(modules: bool) -> None:
    """However bad drafts are; other drafters' proposals are taken if they promise more than the modules' tree."""
    tree, chain = (TreeShape.of(Speculation(depth)) for depth in (2, 4))
    shapes, times = ([TreeShape(), tree, chain], (1.0, 1.5, 1.6)) if modules else ([TreeShape(), chain], (1.0, 1.6))

    def chosen(chances: Chances, given: float) -> int:
        table = ShapeTable(shapes, times, 0.1, {}, chances, 1)
        return ShapePlanner(table).plan(ShapeBatch(table, given=[given], eager=True)).shape

    assert chosen(hopeless(), 1.0) == len(shapes) - 2
    assert chosen(hopeless(), 1.3) == len(shapes) - 1
    assert chosen(certain(), 1.3) == (1 if modules else PLAIN + 1)
    assert chosen(certain(), 3.9) == len(shapes) - 1


def test_a_long_chain_of_proposals_is_taken_where_it_promises_more() -> None:
    """Of other drafters' chains the one with most tokens a second, if that is clearly more than the modules' best."""
    shapes = [TreeShape(), TreeShape.of(Speculation(2)), TreeShape.chain(8), TreeShape.chain(31)]

    def chosen(chances: Chances, *given: float) -> int:
        table = ShapeTable(shapes, (1.0, 1.5, 1.25, 1.5), 0.1, {}, chances, 2)
        return ShapePlanner(table).plan(ShapeBatch(table, given=given)).shape

    assert chosen(hopeless(), 1.0, 1.0) < 2
    assert chosen(hopeless(), 1.2, 1.2) < 2  # less than plain decoding
    assert chosen(hopeless(), 4.0, 4.5) == 2
    assert chosen(hopeless(), 8.0, 20.0) == 3
    assert chosen(certain(), 2.0, 2.0) == 1
    assert chosen(certain(), 8.0, 20.0) == 3


def test_a_step_of_proposals_among_plain_ones_pays_for_the_switch() -> None:
    shapes = [TreeShape(), TreeShape.of(Speculation(2)), TreeShape.chain(8)]
    table = ShapeTable(shapes, (1.0, 1.5, 1.25), 0.5, {16: 0.5}, hopeless(), 1)
    for behind in (1, 10):
        chosen = ShapePlanner(table).plan(ShapeBatch(table, given=[1.8], behind=behind)).shape
        assert (chosen == 2) == (behind == 1)


def hopeless() -> Chances:
    """Returns chances of a model whose drafts were never accepted."""
    return learned([])


def certain() -> Chances:
    """Returns chances of a model whose drafts were always accepted."""
    return learned([0, 1, 2, 3])


def learned(path: list[int]) -> Chances:
    chances = Chances(400.0)
    for _ in range(400):
        chances.learn(Seen.of(SHAPES[-1], {tuple(path): 1}))
    return chances
