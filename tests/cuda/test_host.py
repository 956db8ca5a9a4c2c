"""What the host does for many texts at once is what it does for each of them: tokens, events, pages, places.

On a CPU by the kernels' references.
"""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mtp_spec
from device_models import FEW, batch_lm, checkpoint
from lms import assert_same, device
from mtp_spec.acceptance.accept import Drawn
from mtp_spec.api import LM
from mtp_spec.cuda import memory
from mtp_spec.cuda import pool as pools
from mtp_spec.cuda.group import Group
from mtp_spec.cuda.kinds import Kind
from mtp_spec.cuda.pages import LEASES, DevicePages
from mtp_spec.cuda.pool import Pool
from mtp_spec.cuda.prefill import Reader
from mtp_spec.cuda.runtime import DeviceRuntime
from mtp_spec.cuda.sequence import DeviceSequence, Results
from mtp_spec.cuda.state import State, copy_states
from mtp_spec.kernels import commit
from mtp_spec.model.cache import PAGE
from mtp_spec.model.cuda.checkpoint import load_device_model
from mtp_spec.results import EventLog, Generation, TokenEvent
from mtp_spec.text.stopping import StopChecker
from mtp_spec.tree_shape import TreeShape

END = 3
# tokens of steps: how many of each were drafted follows
STEPS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model"), "two modules", num_hidden_layers=2, eos_token_ids=(END,))


@settings(max_examples=60, deadline=None)
@given(STEPS, st.integers(1, 20), st.data())
def test_tokens_taken_together_are_the_same_as_one_by_one(steps: list[list[int]], limit: int, data: Any) -> None:
    """However often somebody reads in between."""
    checkers = [StopChecker(None, frozenset({END}), (), limit) for _ in range(2)]
    logs = [EventLog(checker, Generation()) for checker in checkers]
    events: list[list[TokenEvent]] = [[], []]
    for number, tokens in enumerate(steps):
        singly = list[Drawn]()
        for place, token in enumerate(tokens):
            singly.append(Drawn(token, place + 1 if place + 1 < len(tokens) else 0, None))
            if ended := checkers[1].push(token):
                break
        logs[1].take([one.token for one in singly], sum(one.depth > 0 for one in singly), number)
        assert checkers[0].pass_by(tokens) == (not ended)
        if ended:  # then one by one here, too
            assert [checkers[0].push(one.token) for one in singly][-1]
            logs[0].take([one.token for one in singly], sum(one.depth > 0 for one in singly), number)
        else:
            logs[0].take(tokens, len(tokens) - 1, number)
        for log, seen in zip(logs, events, strict=True):
            for _ in range(data.draw(st.integers(0, 6))):
                if (event := log.pop()) is not None:
                    seen.append(event)
        if ended:
            break
    whole = [log.finish() for log in logs]
    assert whole[0] == whole[1] == logs[0].finish()
    for log, seen in zip(logs, events, strict=True):
        while (event := log.pop()) is not None:
            seen.append(event)
    assert events[0] == events[1]
    assert [event.token_id for event in events[0]] == whole[0].token_ids
    assert checkers[0].reason == checkers[1].reason
    sources: dict[int, list[Any]] = {event.step: [] for event in events[0]}
    for event in events[0]:
        sources[event.step].append(event.source)
    for number, found in sources.items():
        assert found == [*range(1, len(steps[number])), "target"][: len(found)]


def test_pages_are_offered_as_soon_as_they_are_full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take, asks, seen = DeviceSequence.take, {"after every step": False}, list[tuple[int, int]]()

    def watched(text: DeviceSequence, results: Results, slot: int) -> None:
        text._due = 0 if asks["after every step"] else text._due
        take(text, results, slot)
        seen.append((len(text.tokens), text.lease.published))

    monkeypatch.setattr(DeviceSequence, "take", watched)
    options: dict[str, Any] = {"seed": 1, "logit_bias": {**FEW, END: -float("inf")}}
    for prompt, speculation, new in ((60, None, 72), (125, 2, 30)):
        found = list[list[tuple[int, int]]]()
        for asks["after every step"] in (False, True):
            seen.clear()
            batch_lm(folder, 1, 320).generate([5] * prompt, max_new_tokens=new, speculation=speculation, **options)
            found.append(list(seen))
        assert {published for _, published in found[0]} == {0 if prompt < PAGE else PAGE, PAGE, 2 * PAGE}
        assert found[0] == found[1]


def test_a_round_of_leases_is_prepared_together(folder: Path) -> None:
    model = load_device_model(folder, "cpu")
    count = LEASES + 3
    pages = DevicePages(model, 100, 2 * count, count)
    store = pages.caches[0].store
    store.fill_(float("nan"))
    leases = [pages.lease([], PAGE + 1 - number % 2, True) for number in range(count)]
    # one that goes before it was prepared leaves its row and pages to the next
    gone, leases[4] = leases[4], None
    assert gone is not None
    gone.end()
    leases[4] = pages.lease([], 2 * PAGE, True)
    pages.prepare()
    used = [place for lease in leases if lease is not None for place in sorted({*pages.tables[lease.row].tolist()})]
    assert len(used) == len({*used}) == sum(1 + (number % 2 == 0) for number in range(count))
    clean = store[: pages.caches[0].spare].isfinite().all(1).view(len(pages.caches), -1)
    for place in used:
        assert clean[:, place : place + PAGE].all()
    before = pages.tables.clone()
    store.fill_(1.0)
    pages.prepare()
    assert torch.equal(before, pages.tables)
    assert store.min() == 1.0


def test_leases_are_prepared_after_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They belong to several texts, of which the error ends one: the others must not use unprepared pages."""
    model = load_device_model(folder, "cpu")
    pages = DevicePages(model, 100, 8, 4)
    leases = [pages.lease([], 2 * PAGE, True) for _ in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(commit, "clean", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            pages.prepare()
    store = pages.caches[0].store
    store.fill_(float("nan"))
    pages.prepare()
    clean = store[: pages.caches[0].spare].isfinite().all(1).view(len(pages.caches), -1)
    for lease in leases:
        assert lease is not None
        own = sorted({*pages.tables[lease.row].tolist()})
        assert len(own) == 2
        assert all(bool(clean[:, place : place + PAGE].all()) for place in own)
    assert int(clean.sum()) == 6 * PAGE * len(pages.caches)


def test_any_number_of_pages_is_zeroed_in_one_launch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first dimension of a grid may have more than 65,535 programs."""
    grids = list[tuple[int, ...]]()

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *_, **__: None

    caches = DevicePages(load_device_model(folder, "cpu"), 100, 4, 2).caches
    monkeypatch.setattr(commit, "runs_triton", lambda _: True)
    monkeypatch.setattr(commit, "_clean_kernel", Kernel(), raising=False)
    commit.clean(caches, torch.zeros(70_000, dtype=torch.int64))
    assert grids == [(70_000, len(caches))]


def test_memory_of_a_dropped_group_is_free_for_the_next(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not wait for the garbage collector."""
    runtime = DeviceRuntime(load_device_model(folder, "cpu"), 100)
    pool, dropped = Pool(runtime, 8, 2), list[bool]()
    runtime.graphs = Once()  # type: ignore[assignment]
    monkeypatch.setattr(pools, "GROUPS", 1)
    monkeypatch.setattr(pools, "SLOTS", 1)
    gc.disable()
    try:
        group = pool.group(Kind((TreeShape(),)), False)
        pool.give_back(None, [group])
        state = weakref.ref(group.state)
        del group

        def made(*given: Any) -> Group:
            dropped.append(state() is None)
            return Group(*given)

        monkeypatch.setattr(pools, "Group", made)
        pool.group(Kind((TreeShape(),), watched=True), False)
        assert dropped == [True]
    finally:
        gc.enable()


KINDS = [Kind((TreeShape.chain(depth),), modules=True) for depth in range(70)]


@pytest.mark.parametrize(
    ("most", "kinds", "made"), [(1, 64, 64), (1, 65, 3 * 65), (16, 8, 8), (16, 9, 27), (6, 10, 10)]
)
def test_kinds_in_turn_are_captured_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, most: int, kinds: int, made: int
) -> None:
    """A benchmark of ten ways to draft captured each of them again for every text: "auto" ran at a quarter of plain."""
    runtime, created = DeviceRuntime(load_device_model(folder, "cpu"), 100), list[Kind]()
    pool, logits = Pool(runtime, 8, most), set[int]()

    def make(runtime: DeviceRuntime, pages: DevicePages, kind: Kind, most: int, room: torch.Tensor) -> Any:
        created.append(kind)
        logits.add(room.data_ptr())
        return SimpleNamespace(kind=kind, most=most, clear=lambda: None)

    monkeypatch.setattr(pools, "Group", make)
    for _ in range(3):
        for kind in KINDS[:kinds]:
            pool.give_back(None, [pool.group(kind, most > 1)])
    assert (len(created), len(logits), len(pool.known)) == (made, 1, min(kinds, max(8, 64 // most)))


def test_idle_groups_give_way_to_a_new_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is short, before it is refused."""
    runtime = DeviceRuntime(load_device_model(folder, "cpu"), 100)
    pool, free = Pool(runtime, 8, 1), [3]
    runtime.model = SimpleNamespace(device=torch.device("cuda"), config=runtime.model.config)  # type: ignore[assignment]
    monkeypatch.setattr(pools, "group_bytes", lambda model, slots: 1)
    monkeypatch.setattr(pools, "logits_bytes", lambda model, most: 0)
    monkeypatch.setattr(memory, "_free", lambda device: free[0] - len(pool.known))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(pools, "Group", lambda *given: SimpleNamespace(kind=given[2], most=1, clear=lambda: None))
    for kind in KINDS[:5]:
        pool.give_back(None, [pool.group(kind, False)])
    assert [group.kind for group in pool.known] == KINDS[2:5]
    for kind in KINDS[2:5]:
        pool.group(kind, False)
    with pytest.raises(mtp_spec.MTPSpecError, match="A step of 1 sequences needs"):
        pool.group(KINDS[5], False)


class Once:
    """In place of `Graphs`, which need a GPU."""

    def later(self, work: Callable[[], None]) -> Callable[[], None]:
        return lambda: work()


def test_copied_states_are_equal_in_every_part(folder: Path) -> None:
    model, dice = load_device_model(folder, "cpu"), torch.Generator().manual_seed(0)
    pages = DevicePages(model, 100, 4, 4)
    several, others = (State(model, 100, pages.caches, pages.tables[:4]) for _ in range(2))
    for words in others._words():
        words.random_(generator=dice)
    kept = [words.clone() for words in several._words()]
    copy_states([several.part(2, 1), several.part(0, 1)], [others.part(3, 1), others.part(1, 1)])
    for own, other, before in zip(several._words(), others._words(), kept, strict=True):
        rows, given, old = own.view(4, -1), other.view(4, -1), before.view(4, -1)
        assert torch.equal(rows, torch.stack((given[1], old[1], given[3], old[3])))
    assert torch.equal(several.settings.values[2].view(torch.int64), others.settings.values[3].view(torch.int64))


def test_texts_that_come_and_go_at_random(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many more texts than places, of all lengths; some are cancelled in the queue, some while they run."""
    moved = list[int]()
    settle = Group._settle_down

    def counted(group: Group) -> None:
        moved.append(group._slots.count(None))
        settle(group)

    monkeypatch.setattr(Group, "_settle_down", counted)
    lm, dice = batch_lm(folder, 6), random.Random(3)
    asked: list[tuple[list[int], dict[str, Any]]] = [
        ([dice.randrange(4, 160) for _ in range(dice.randrange(1, 40))],
         {"max_new_tokens": dice.randrange(1, 14), "seed": number, "speculation": dice.choice((None, 2, 2)),
          "logprobs": dice.choice((0, 0, 1)), "logit_bias": FEW})
        for number in range(30)
    ]  # fmt: skip
    handles = [lm.submit(prompt, **options) for prompt, options in asked]
    left = {number for number in range(30) if number % 7 == 5 and handles[number].cancel()}
    alone = batch_lm(folder, 1)
    for number, (handle, (prompt, options)) in enumerate(zip(handles, asked, strict=True)):
        if number not in left:
            assert_same(handle.result(300), alone.generate(prompt, **options))
    lm.generate([1, 2], max_new_tokens=1)
    assert max(moved) > 0
    store = device(lm).pool.pages
    lm.close()
    assert not store.leased


def test_prompts_of_one_size_are_read_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a few longer ones would make every pass of short ones long."""
    read, passes = Reader.whole, list[tuple[int, list[int]]]()

    def watched(reader: Reader, texts: Any, rows: int, drafts: bool) -> Any:
        passes.append((rows, [len(text.tokens) for text in texts]))
        return read(reader, texts, rows, drafts)

    monkeypatch.setattr(Reader, "whole", watched)
    monkeypatch.setattr("mtp_spec.cuda.prefill.STEP_ROWS", 128)  # two long prompts or eight short ones
    lm: LM = batch_lm(folder, 12)
    lengths = [20, 3, 4, 5, 21, 6, 22, 7, 23]
    texts = lm.generate([[9] * length for length in lengths], max_new_tokens=2, seed=1, speculation=None)
    assert passes == [(64, [20, 21]), (16, [3, 4, 5, 6, 7]), (64, [22, 23])]
    for text, length in zip(texts, lengths, strict=True):
        assert_same(text, lm.generate([9] * length, max_new_tokens=2, seed=text.seed, speculation=None))
