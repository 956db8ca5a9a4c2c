"""Texts side by side: each is what it is alone, whoever its neighbours are and whenever they come and go."""

from __future__ import annotations

import asyncio
import random
import threading
import time
import warnings
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mtp_spec
import small
import tiny
from lms import lm_of
from mtp_spec.model.cuda.checkpoint import load_device_model

SHAPES: list[Any] = [
    None, 1, 3, "auto", mtp_spec.Speculation(branching=(3, 2, 1)), mtp_spec.Speculation(4, (2, 2, 2, 1), budget=9)
]  # fmt: skip
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0}, {"temperature": 0.8}, {"temperature": 1.2, "top_p": 0.9, "min_p": 0.02, "top_k": 40},
    {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.4, "logit_bias": {5: 1.5, 7: float("-inf")}},
]  # fmt: skip
RULES = ("rejection", "hybrid", "block", "typical")


@pytest.fixture(scope="module", params=["v3", "v3_two_modules", "v3_yarn"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("tiny") / "model", request.param, seed=1).folder


@pytest.fixture(scope="module")
def lm(folder: Path) -> mtp_spec.LM:
    return mtp_spec.load(folder, dtype="bfloat16", max_batch=7)


def wishes(count: int, seed: int) -> list[tuple[list[int], dict[str, Any]]]:
    """Random prompts and options."""
    dice = random.Random(seed)
    found = []
    for _ in range(count):
        prompt = [dice.randrange(96) for _ in range(dice.choice((1, 3, 20, 63, 64, 130, 250)))]
        speculation = dice.choice([*SHAPES, mtp_spec.Speculation(3, acceptance=dice.choice(RULES))])
        options = {"max_new_tokens": dice.randrange(1, 14), "seed": dice.randrange(9), "logprobs": dice.randrange(3),
                   "speculation": speculation, **dice.choice(SAMPLING)}  # fmt: skip
        found.append((prompt, options))
    return found


def assert_same(one: mtp_spec.Generation, other: mtp_spec.Generation) -> None:
    assert one.token_ids == other.token_ids
    assert one.logprobs == other.logprobs
    assert one.finish_reason == other.finish_reason
    assert one.stats.steps == other.stats.steps or other.stats.planned.steps
    assert one.stats.accepted == other.stats.accepted or other.stats.planned.steps


@pytest.mark.parametrize("seed", range(3))
def test_a_text_is_the_same_beside_any_others(lm: mtp_spec.LM, seed: int) -> None:
    asked = wishes(16, seed)
    handles = [lm.submit(prompt, **options) for prompt, options in asked]
    for handle, (prompt, options) in zip(handles, asked, strict=True):
        assert_same(handle.result(), lm.generate(prompt, **options))


def test_rows_one_by_one_are_the_same_too(by_torch: None, folder: Path) -> None:
    lm = mtp_spec.load(folder, dtype="float32", max_batch=4)
    assert lm.technique == "single"
    asked = wishes(6, 11)
    handles = [lm.submit(prompt, **options) for prompt, options in asked]
    for handle, (prompt, options) in zip(handles, asked, strict=True):
        assert_same(handle.result(), lm.generate(prompt, **options))


def test_neighbours_that_fail_or_leave(lm: mtp_spec.LM) -> None:
    asked, dice, gone = wishes(14, 5), random.Random(5), 0

    def fails(ids: list[int], logits: Tensor) -> Tensor:
        if len(ids) > 5:
            raise LookupError("a processor's own error")
        return logits

    def forbids(ids: list[int], logits: Tensor) -> Tensor:
        return torch.full_like(logits, -torch.inf) if len(ids) > 4 else logits

    handles = []
    for prompt, options in asked:
        handles.append(lm.submit(prompt, **options))
        broken = lm.submit([1, 2, 3], speculation=2, max_new_tokens=40, logits_processor=dice.choice((fails, forbids)))
        left = lm.submit([4, 5], max_new_tokens=60, speculation=dice.choice(SHAPES))
        if dice.random() < 0.5:
            with pytest.raises((LookupError, mtp_spec.MTPSpecError), match=r"own error|no token is left"):
                broken.result()
        gone += left.cancel()
        if left.cancelled():
            with pytest.raises(CancelledError):
                left.result()
    assert gone
    for handle, (prompt, options) in zip(handles, asked, strict=True):
        assert_same(handle.result(), lm.generate(prompt, **options))


def test_who_comes_later_does_not_wait_for_the_others_to_end(lm: mtp_spec.LM) -> None:
    reached, go = threading.Event(), threading.Event()

    def waits(ids: list[int], logits: Tensor) -> Tensor:
        if len(ids) == 6:
            reached.set()
            go.wait(60)
        return logits

    first = lm.submit([1, 2], max_new_tokens=100, logits_processor=waits, speculation=None, seed=0)
    assert reached.wait(60)
    second = lm.submit([3, 4], max_new_tokens=2, seed=0)
    go.set()
    assert second.result(60).finish_reason == "length"
    assert not first.done()
    assert len(first.result().token_ids) == 100


def test_a_long_prompt_does_not_hold_up_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("state", "passes", "draft"):
        monkeypatch.setattr(f"mtp_spec.cpu.{module}.MOST_ROWS", 16)
    monkeypatch.setattr("mtp_spec.cpu.backend.PROMPT_ROWS", 17)
    lm = mtp_spec.load(tiny.make(tmp_path / "model").folder, dtype="bfloat16", max_batch=3)
    seen: dict[str, list[int]] = {"long": [], "short": []}

    def watch(name: str) -> Any:
        def look(ids: list[int], logits: Tensor) -> Tensor:
            seen[name].append(len(ids))
            return logits

        return look

    gate = threading.Event()
    lm.submit([9], max_new_tokens=1, logits_processor=lambda ids, row: (gate.wait(60), row)[1], seed=0)
    long = lm.submit([5] * 160, max_new_tokens=2, logits_processor=watch("long"), speculation=None, seed=0)
    short = lm.submit([6], max_new_tokens=30, logits_processor=watch("short"), speculation=None, seed=0)
    gate.set()
    long.result()
    assert len(seen["short"]) >= 160 // 16 - 4, "the short text stood still while the long prompt was read"
    assert len(short.result().token_ids) == 30


def test_lists_and_samples(lm: mtp_spec.LM) -> None:
    options: dict[str, Any] = {"max_new_tokens": 9, "temperature": 1.0, "seed": 3, "speculation": 2}
    prompts = [[1, 2], [3] * 70, [4]]
    several = lm.generate(prompts, n=3, **options)
    for prompt, samples in zip(prompts, several, strict=True):
        for sample in samples:
            assert sample.token_ids == lm.generate(prompt, **{**options, "seed": sample.seed}).token_ids


def test_a_list_raises_the_error_of_one_and_leaves_nothing_behind(lm: mtp_spec.LM) -> None:
    def fails(ids: list[int], logits: Tensor) -> Tensor:
        raise LookupError("a processor's own error")

    with pytest.raises(LookupError, match="own error"):
        lm.generate([[1], [2]], logits_processor=fails)
    options = {"max_new_tokens": 2, "seed": 0}
    assert lm.generate([[1], [2]], **options)[0].token_ids == lm.generate([1], **options).token_ids


def test_a_request_that_cannot_be_served_is_refused_at_once(lm: mtp_spec.LM) -> None:
    running = lm.submit([1], max_new_tokens=20, seed=0)
    with pytest.raises(mtp_spec.PromptError, match="300 tokens and the context is 256"):
        lm.submit([1] * 300)
    with pytest.raises(mtp_spec.OptionError, match="n=2"):
        lm.submit([1], n=2)
    with pytest.raises(mtp_spec.PromptError, match="one prompt"):
        lm.submit([[1], [2]])
    assert len(running.result().token_ids) == 20


def test_from_asyncio(lm: mtp_spec.LM) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "seed": 4}

    async def follow(prompt: list[int]) -> list[int]:
        return [event.token_id async for event in lm.submit(prompt, **options)]

    async def all_of_them() -> None:
        *texts, last = await asyncio.gather(*(follow([i, i + 1]) for i in range(9)), lm.submit([50], **options))
        assert texts == [lm.generate([i, i + 1], **options).token_ids for i in range(9)]
        assert isinstance(last, mtp_spec.Generation)
        assert last.token_ids == lm.generate([50], **options).token_ids
        told = {"logprobs": 1, "speculation": 2, **options}  # "auto" need not draft the same steps twice
        done = lm.submit([2, 3], **told)
        text, expected = await done, list(lm.stream([2, 3], **told))
        for _ in range(2):  # made when they are asked for, the same every time; the text stays what it is
            assert [event async for event in done] == expected
        assert text.token_ids == [event.token_id for event in expected]
        assert text.logprobs is not None
        assert len(text.logprobs) == len(expected)
        handle = lm.submit([1], max_new_tokens=200, seed=0)
        async for _ in handle:
            handle.cancel()
            break
        with pytest.raises(asyncio.CancelledError):
            await handle
        slow = lm.submit([1], max_new_tokens=200, seed=0)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(slow, 0.001)
        assert slow.cancelled()

    asyncio.run(all_of_them())


def test_closing_ends_every_text_and_the_worker(folder: Path) -> None:
    with mtp_spec.load(folder, dtype="bfloat16", max_batch=2) as lm:
        lm.generate([1], max_new_tokens=3)  # the engine's own threads stay
        before = set(threading.enumerate())
        handles = [lm.submit([i], max_new_tokens=200, seed=0) for i in range(5)]
    assert all(handle.done() for handle in handles)
    assert any(handle.cancelled() for handle in handles)
    # the model itself can go on, with a new worker
    assert len(lm.submit([1], max_new_tokens=3, seed=0).result().token_ids) == 3
    lm.close()
    assert set(threading.enumerate()) <= before


def test_closing_while_a_processor_submits_another_text(folder: Path) -> None:
    lm, begun, closing = mtp_spec.load(folder, dtype="bfloat16"), threading.Event(), threading.Event()
    handles = list[mtp_spec.Handle]()

    def processor(ids: list[int], row: Tensor) -> Tensor:
        begun.set()
        closing.wait(30)
        handles.append(lm.submit([2], max_new_tokens=3))
        return row

    text = lm.submit([1], logits_processor=processor)
    assert begun.wait(30)
    closer = threading.Thread(target=lm.close, daemon=True)
    closer.start()
    while not text.done():  # cancelled by the closer, which now waits for the processor
        time.sleep(0.001)
    closing.set()
    closer.join(30)
    assert not closer.is_alive()
    assert len(handles[0].result(30).token_ids) == 3
    lm.close()


def test_waiting_in_the_worker_for_itself_is_an_error(lm: mtp_spec.LM) -> None:
    other = lm.submit([4], max_new_tokens=40)

    async def awaited() -> None:
        await lm.submit([1], max_new_tokens=2)

    async def followed() -> None:
        async for _ in lm.submit([1], max_new_tokens=2):
            pass

    waits = (
        lambda: lm.generate([[1], [2]], max_new_tokens=2), lambda: lm.submit([1]).result(), other.result,
        lambda: asyncio.run(awaited()), lambda: asyncio.run(followed()),
    )  # fmt: skip
    for wait in waits:

        def processor(ids: list[int], row: Tensor, wait: Any = wait) -> Tensor:
            wait()
            return row

        with pytest.raises(mtp_spec.MTPSpecError, match="waits for a text of the model that it runs in"):
            lm.submit([1, 2], max_new_tokens=4, logits_processor=processor).result(60)
    assert len(other.result().token_ids) == 40
    assert other.result() == other.result()  # nothing is waited for once it has ended
    alone = lm.generate([1, 2], max_new_tokens=4, seed=0)

    def patient(ids: list[int], row: Tensor) -> Tensor:
        lm.generate([1], max_new_tokens=1)  # a text alone is written by the thread that asks for it
        return row

    assert lm.submit([1, 2], max_new_tokens=4, seed=0, logits_processor=patient).result().token_ids == alone.token_ids


def test_a_worker_that_has_ended_says_why(folder: Path) -> None:
    lm = mtp_spec.load(folder, dtype="bfloat16", max_batch=2)

    def leaves(ids: list[int], row: Tensor) -> Tensor:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        lm.submit([1, 2], max_new_tokens=4, logits_processor=leaves).result(60)
    with pytest.raises(mtp_spec.MTPSpecError, match=r"ended with SystemExit\(3\): call close\(\)"):
        lm.submit([1])
    lm.close()
    assert len(lm.generate([[1], [2]], max_new_tokens=4)) == 2


def test_a_model_that_nobody_holds_ends_its_worker(tmp_path: Path) -> None:
    folder = tiny.make(tmp_path / "model").folder
    before = {thread.ident for thread in threading.enumerate()}
    assert len(mtp_spec.load(folder, dtype="bfloat16").submit([1], max_new_tokens=3, seed=0).result().token_ids) == 3
    for thread in threading.enumerate():
        if thread.ident not in before:
            thread.join(30)
            assert not thread.is_alive()


def test_on_the_kernels_texts_take_turns_by_default(tmp_path: Path) -> None:
    model = load_device_model(small.make_fp8(tmp_path / "model"), "cpu")
    lm = lm_of(model, None, 100)
    prompts, options = [[1, 2], [3], [4, 5, 6]], {"max_new_tokens": 6, "speculation": 2}
    listed = lm.generate(prompts, seed=0, **options)
    texts = [text.token_ids for text in listed]
    asked = [(prompt, {**options, "seed": text.seed}) for prompt, text in zip(prompts, listed, strict=True)]
    assert [lm.generate(prompt, **own).token_ids for prompt, own in asked] == texts
    assert [lm.submit(prompt, **own).result().token_ids for prompt, own in asked] == texts


@pytest.mark.parametrize("count", [1, 4, 16, 64])
def test_many_at_once(tmp_path: Path, count: int) -> None:
    lm = mtp_spec.load(tiny.make(tmp_path / "model").folder, dtype="bfloat16", max_batch=count)
    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of few drafts, which are to be expected here
        texts = lm.generate([[i, 2 * i % 96] for i in range(count)], **options)
    for i in range(0, count, 9):
        assert texts[i].token_ids == lm.generate([i, 2 * i % 96], seed=texts[i].seed, **options).token_ids


@pytest.mark.parametrize("name", ["v3", "v3_two_modules"])
def test_only_needed_rows_go_through_last_layers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain decoding needs the hidden state of a prompt's last row, a draft that of the last module's last row."""
    lm, asked = mtp_spec.load(tiny.make(tmp_path / "model", name, seed=1).folder), list[tuple[int, int]]()

    def spied(compute: Any, module: int) -> Any:
        def run(*args: Any) -> Any:
            hidden, logits = compute(*args)
            asked.append((args[0] if module else -1, len(hidden)))
            return hidden, logits

        return run

    for part in ("state", "draft"):
        monkeypatch.setattr(f"mtp_spec.cpu.{part}.MOST_ROWS", 64)
    for method, module in (("scored_rows", 0), ("scored_mtp_rows", 1)):
        monkeypatch.setattr(lm.model, method, spied(getattr(lm.model, method), module))
    prompt = [(5 * i) % 96 for i in range(100)]
    lm.generate(prompt, max_new_tokens=1)  # "auto" may draft
    assert asked == [(-1, 64), (-1, 36)]
    asked.clear()
    lm.generate(prompt[1:], max_new_tokens=1, speculation=None)
    assert asked == [(-1, 0), (-1, 1)]
    asked.clear()
    lm.generate(prompt[2:], max_new_tokens=3, speculation=1)
    seen = [count for module, count in asked if module == len(lm.model.mtp) - 1]
    assert seen[:2] == ([1, 1] if len(lm.model.mtp) == 1 else [0, 0])
