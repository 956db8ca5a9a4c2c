"""Texts that share captured steps: each is what it is alone, whoever its neighbours are and whenever they come and go.

On a CPU by the kernels' references, on a GPU (`pytest -m gpu`) as they are.
"""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mtp_spec
from asked import SHAPES, check, wishes
from device_models import FEW, SAMPLING, OnceThenAgain, batch_lm, checkpoint
from lms import assert_same, runtime
from mtp_spec.cuda import group as device_group
from mtp_spec.cuda.group import Group
from mtp_spec.cuda.lock import FairLock
from mtp_spec.cuda.memory import group_bytes, pages_bytes
from mtp_spec.cuda.pages import DevicePages
from mtp_spec.cuda.sequence import DeviceSequence
from mtp_spec.cuda.state import State
from mtp_spec.cuda.step import Prefill
from mtp_spec.load_checks import check_batch
from mtp_spec.model.cache import PAGE
from mtp_spec.model.cuda.checkpoint import load_device_model
from mtp_spec.serving import Worker
from mtp_spec.speculation import Speculation
from ranks import Deserted
from scripted import RING


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model"), "two modules", num_hidden_layers=2, eos_token_ids=(3,))


@pytest.mark.parametrize("most", [2, 5])
def test_a_text_is_the_same_beside_any_others(folder: Path, most: int) -> None:
    rules: list[Any] = [Speculation(2, acceptance=rule) for rule in ("rejection", "typical")]
    check(batch_lm(folder, most), wishes(most + 3, most, [*SHAPES, *rules]))


def test_more_rows_than_a_step_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # four texts of three rows: two captured parts a step, and catching up one by one
    monkeypatch.setattr(device_group, "STEP_ROWS", 8)
    check(batch_lm(folder, 5), wishes(5, 1, [2]))


def test_capturing_leaves_running_texts_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("pool", "group"):
        monkeypatch.setattr(f"mtp_spec.cuda.{place}.check_room", lambda *_: None)
    lm, asked = batch_lm(folder, 4), wishes(5, 2, [2])
    runtime(lm).graphs = OnceThenAgain()
    handles = [lm.submit(prompt, **options) for prompt, options in asked]
    texts = [handle.result(300) for handle in handles]
    runtime(lm).graphs = None
    for text, (prompt, options) in zip(texts, asked, strict=True):
        assert_same(text, batch_lm(folder, 1).generate(prompt, **options))


@pytest.mark.parametrize("most", [3, 5])
def test_as_many_prompts_as_share_steps_are_read_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Captured passes are for powers of two, but never for more than there are places."""
    for place in ("pool", "group"):
        monkeypatch.setattr(f"mtp_spec.cuda.{place}.check_room", lambda *_: None)
    lm, prompts = batch_lm(folder, most), [[number + 1, 5, 7] for number in range(most)]
    runtime(lm).graphs = OnceThenAgain()
    texts = lm.generate(prompts, max_new_tokens=5, seed=1, speculation=1)
    runtime(lm).graphs = None
    for text, prompt in zip(texts, prompts, strict=True):
        assert_same(text, batch_lm(folder, 1).generate(prompt, max_new_tokens=5, seed=text.seed, speculation=1))


def test_who_comes_later_joins_the_others(folder: Path) -> None:
    lm = batch_lm(folder, 2)
    reached, go = threading.Event(), threading.Event()

    def waits(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(ids) == 4:
            reached.set()
            go.wait(60)
        return logits

    options: dict[str, Any] = {"speculation": 2, "max_new_tokens": 5, "temperature": 0.0}
    slow = lm.submit([1, 2], logits_processor=waits, **options)  # the host draws: a step of its own
    assert reached.wait(60)
    handles = [lm.submit([7] * length, **{**options, "max_new_tokens": 12}) for length in (1, 18, 2)]
    go.set()
    assert slow.result(300).token_ids == lm.generate([1, 2], **options).token_ids
    for handle, length in zip(handles, (1, 18, 2), strict=True):
        assert_same(handle.result(300), lm.generate([7] * length, **{**options, "max_new_tokens": 12}))


def test_neighbours_that_fail_or_leave(folder: Path) -> None:
    lm = batch_lm(folder, 3)
    lm.model.embed_tokens[159] = float("nan")  # a text that reads it has no number left
    harmless = {"logit_bias": {159: -float("inf")}}
    asked = [(prompt, {**options, **harmless}) for prompt, options in wishes(6, 3) if 159 not in prompt]
    handles, lost, left = [], [], []
    for prompt, options in asked:
        handles.append(lm.submit(prompt, **options))
        lost.append(lm.submit([1, 159], speculation=options["speculation"], max_new_tokens=20))
        left.append(lm.submit([4, 5], max_new_tokens=90, speculation=2, **harmless))
    for handle in left:
        handle.cancel()
    for handle in lost:
        with pytest.raises(mtp_spec.MTPSpecError, match="no token can be drawn at position 2"):
            handle.result(300)
    for handle, (prompt, options) in zip(handles, asked, strict=True):
        assert_same(handle.result(300), lm.generate(prompt, **options))


def test_a_step_that_fails_ends_its_texts_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = batch_lm(folder, 3)
    capture = Group._capture

    def fails(group: Group, first: int, slots: int) -> Any:
        if group.kind.modules:
            raise MemoryError("no room")
        return capture(group, first, slots)

    monkeypatch.setattr(Group, "_capture", fails)
    good = [lm.submit([5, n], max_new_tokens=6, seed=0, speculation=None) for n in range(2)]
    bad = [lm.submit([5, n], max_new_tokens=6, speculation=2) for n in range(3)]
    for handle in bad:
        with pytest.raises(MemoryError, match="no room"):
            handle.result(300)
    for n, handle in enumerate(good):
        assert_same(handle.result(300), lm.generate([5, n], max_new_tokens=6, seed=0, speculation=None))


@pytest.mark.parametrize("call", [1, 2], ids=["at its first token", "in a step"])
def test_a_rank_where_a_text_fails_launches_nothing_more(
    call: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, launched, calls, before = batch_lm(folder, 2), list[Group](), 0, -1
    launch = Group.launch

    def counted(group: Group, alone: bool) -> None:
        launched.append(group)
        launch(group, alone)

    def fails(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        nonlocal calls, before
        calls += 1
        if calls == call:
            before = len(launched)
            raise LookupError("a processor's own error")
        return logits

    monkeypatch.setattr(Group, "launch", counted)
    worker = Worker(lm.backend.runner(True), 2, Deserted(1, 2))
    options: list[dict[str, Any]] = [{"logits_processor": fails}, {"speculation": 2}]
    asked = [lm._request([1, 2], {"seed": 0, "max_new_tokens": 9, **one}) for one in options]
    for handle in worker.submit([lm._sequence(one) for one in asked], lm):
        with pytest.raises(mtp_spec.RankError, match="text 0: a processor's own error"):
            handle.result(60)
    worker.rest()
    assert before == len(launched)


def test_at_the_end_of_the_context(folder: Path) -> None:
    lm = batch_lm(folder, 3, 40)
    check(lm, [(list(range(10, 10 + length)), {"speculation": speculation, "temperature": 0.0})
               for length, speculation in ((39, 3), (33, 3), (34, None), (31, 8))])  # fmt: skip


def test_closing_cancels_and_begins_again(folder: Path) -> None:
    with batch_lm(folder, 2) as lm:
        handles = [lm.submit([n], max_new_tokens=100) for n in range(4)]
    assert all(handle.done() for handle in handles)
    assert any(handle.cancelled() for handle in handles)
    check(lm, wishes(3, 4))


@pytest.mark.parametrize("shapes", [[0, 0, 3, 1, 0], [0] * (RING + 4) + [4, 1]], ids=["in turn", "long pauses"])
def test_turns_change_nothing(folder: Path, scripted: Any, shapes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[tuple[list[int], int, list[torch.Tensor]]] = []
    leave = Group.leave

    def watched(group: Group, text: DeviceSequence) -> None:
        if text in group._slots and group.kind.takes_turns:
            fed = int(group.state.fed[group._slots.index(text)])
            table = text.lease.store.tables[text.lease.row]
            caches = [replace(cache, pages=table) for cache in text.lease.store.caches[2:]]
            known = [cache.slots[: fed - module].clone() for module, cache in enumerate(caches)]
            held.append((text.tokens, fed, known))
        leave(group, text)

    monkeypatch.setattr(Group, "leave", watched)
    scripted(shapes)
    lm = batch_lm(folder, 3)
    options: dict[str, Any] = {"top_k": 4, "logit_bias": {**FEW, 3: -float("inf")}, "seed": 2}
    asked = [([5] * n, {**options, "max_new_tokens": 10 * n}) for n in (4, 1, 3, 2)]
    handles = [lm.submit(prompt, speculation=Speculation(4, adaptive=True), **own) for prompt, own in asked]
    texts = [handle.result(300) for handle in handles]
    for text, (prompt, own) in zip(texts, asked, strict=True):
        assert text.token_ids == lm.generate(prompt, speculation=None, **own).token_ids
    assert sum(text.stats.accepted for text in texts) > 0
    # the modules know of every text what they know of one that is read at once
    for tokens, fed, caches in held:
        alone = State(lm.model, 120)
        Prefill(lm.model, alone, len(tokens), True)(torch.tensor(tokens), 0)
        known = max(0, min(fed, len(tokens) - 1) - len(caches))
        assert known > len(tokens) - RING - 8
        for ours, theirs in zip(caches, alone.mtp_caches, strict=True):
            torch.testing.assert_close(ours[:known], theirs.slots[:known], rtol=0.02, atol=0.02)


def test_auto_writes_the_plain_texts(folder: Path) -> None:
    lm = batch_lm(folder, 3)
    asked = [([n, 2 * n], {"max_new_tokens": 12, "seed": n, "top_k": 4, "logit_bias": FEW}) for n in range(4)]
    handles = [lm.submit(prompt, **options) for prompt, options in asked]
    for handle, (prompt, options) in zip(handles, asked, strict=True):
        assert handle.result(300).token_ids == lm.generate(prompt, speculation=None, **options).token_ids


def test_memory_of_pages_and_groups(folder: Path) -> None:
    model = load_device_model(folder, "cpu")
    pages = DevicePages(model, 100, 7, 3)
    store = pages.caches[0].store
    assert store.nbytes == pages_bytes(model, 100, 3, 7)
    several = State(model, 100, pages.caches, pages.tables[:3])
    held = sum(x.nbytes for x in vars(several).values() if isinstance(x, torch.Tensor)) - several.store.nbytes
    assert held < group_bytes(model, 3)
    store.fill_(float("nan"))
    one, two = pages.lease([], 3 * PAGE, True), pages.lease([], 2 * PAGE + 1, True)
    assert one is not None
    assert two is not None
    assert pages.lease([], 2 * PAGE, True) is None
    pages.prepare()
    clean = store[: pages.caches[0].spare].isfinite().all(1).view(len(pages.caches), -1)
    # what was leased, in every layer, and nothing else
    assert clean[:, : 6 * PAGE].all()
    assert not clean[:, 6 * PAGE :].any()
    assert sorted({*pages.tables[one.row].tolist(), *pages.tables[two.row].tolist()}) == list(range(0, 6 * PAGE, PAGE))
    one.end()
    one.end()
    third = pages.lease([], 4 * PAGE, True)
    assert third is not None
    assert third.row == one.row
    pages.prepare()
    assert not {*pages.tables[third.row].tolist()} & {*pages.tables[two.row].tolist()}
    assert min(pages.tables[pages.idle_row].tolist()) == 7 * PAGE


def test_a_thread_in_a_loop_keeps_nobody_out() -> None:
    turns, rounds, stop, inside = FairLock(), list[int](), threading.Event(), threading.Event()

    def loop() -> None:
        while not stop.is_set():
            with turns, turns:  # the thread that has it may enter again
                inside.set()
                rounds.append(0)
                stop.wait(0.001)

    worker = threading.Thread(target=loop)
    worker.start()
    assert inside.wait(60)
    for _ in range(5):
        before = len(rounds)
        with turns:
            during = len(rounds)
            assert during - before <= 3
            stop.wait(0.005)
            assert len(rounds) == during
    stop.set()
    worker.join()


def test_what_is_refused() -> None:
    check_batch(64, None, "cuda")
    check_batch(2, 64, "cuda")
    with pytest.raises(mtp_spec.OptionError, match="cache_tokens=64 is for texts side by side"):
        check_batch(1, 64, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("most", [3, 24])
def test_the_same_text_on_the_gpu(tmp_path: Path, most: int) -> None:
    demo, dice = mtp_spec.load(device="cuda", max_batch=most), random.Random(most)
    asked: list[tuple[Any, dict[str, Any]]] = []
    for number in range(2 * most):
        options = {**SAMPLING[number % len(SAMPLING)], "speculation": dice.choice([*SHAPES, "auto", 5])}
        prompt = dice.choice(("One day a fox", "List five animals", "The king said", "Rain " * 90))
        asked.append((prompt, {**options, "max_new_tokens": dice.randrange(1, 70), "seed": number}))
    handles = [demo.submit(prompt, **options) for prompt, options in asked]
    for handle, (prompt, options) in zip(handles, asked, strict=True):
        alone = demo.generate(prompt, **{**options, "speculation": None})
        assert handle.result().token_ids == alone.token_ids
    lm = mtp_spec.load(checkpoint(tmp_path, "three modules"), device="cuda", max_batch=most)
    check(lm, wishes(2 * most, 7))
