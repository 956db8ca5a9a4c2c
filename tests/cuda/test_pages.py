"""Texts side by side on a GPU lease pages and share beginnings: what is reused, who waits, and not a bit that changes.

On a CPU by the kernels' references, on a GPU (`pytest -m gpu`) as they are.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import mtp_spec
from device_models import FEW, SAMPLING, OnceThenAgain, checkpoint
from lms import assert_same, device, lm_of, runtime
from mtp_spec.api import LM
from mtp_spec.cuda.backend import DeviceRunner
from mtp_spec.cuda.pages import EXTRA_ROWS, DevicePages, room_of
from mtp_spec.cuda.prefill import Reader
from mtp_spec.cuda.state import SLACK, prefill_rows
from mtp_spec.model.cache import PAGE, pages_for
from mtp_spec.model.cuda.checkpoint import load_device_model
from mtp_spec.speculation import Speculation
from scripted import RING

CONTEXT = 400
OPTIONS: dict[str, Any] = {"top_k": 4, "logit_bias": FEW, "seed": 2, "max_new_tokens": 5}
LONG = [(7 * i + i // 9) % 150 for i in range(170)]
RULE = Speculation(2, acceptance="rejection")  # a text with steps of its own, which depends on what is drafted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model"), "two modules", num_hidden_layers=2, eos_token_ids=(159,))


def batch_lm(folder: Path, most: int, cache_tokens: int | None = None, device: str = "cpu") -> LM:
    model = load_device_model(folder, device)
    return lm_of(model, None, CONTEXT, max_batch=most, cache_tokens=cache_tokens)


def store(lm: LM) -> DevicePages:
    return device(lm).pool.pages


def together(lm: LM, alone: LM, asked: list[tuple[list[int], dict[str, Any]]]) -> list[int]:
    """Submits all of them, compares each with itself alone, and returns how much was reused of each."""
    handles = [lm.submit(prompt, **{**OPTIONS, **options}) for prompt, options in asked]
    texts = [handle.result(300) for handle in handles]
    for text, (prompt, options) in zip(texts, asked, strict=True):
        assert_same(text, alone.generate(prompt, **{**OPTIONS, **options}))
    return [text.stats.reused_tokens for text in texts]


def test_a_beginning_is_read_once(folder: Path) -> None:
    lm, alone = batch_lm(folder, 4), batch_lm(folder, 1)
    reused = together(lm, alone, [
        (LONG, {"speculation": 2, "logprobs": 2}),
        (LONG, {"speculation": None, "temperature": 0.0}),
        (LONG[:128], {"speculation": Speculation(branching=(2, 2)), "logprobs": 2}),  # its own last token is read
        ([*LONG[:130], 1, 2, 3], {"speculation": RULE}),
        ([9, *LONG[1:66]], {"speculation": 2}),
    ])  # fmt: skip
    assert reused == [0, 128, 64, 128, 0]
    # and later, when the first ones have gone
    prompt = [*LONG, 5]
    assert together(lm, alone, [(prompt, {**SAMPLING[2], "speculation": shape}) for shape in (RULE, 2)]) == [128, 128]
    assert store(lm).idle > 0


def test_pages_without_the_modules_slots(folder: Path) -> None:
    """A text that does not draft leaves pages for others such, until one that drafts has read them too."""
    lm, alone = batch_lm(folder, 4), batch_lm(folder, 1)
    assert together(lm, alone, [(LONG, {"speculation": None})]) == [0]
    assert together(lm, alone, [(LONG, {"speculation": None}), (LONG, {"speculation": RULE})]) == [128, 0]
    assert together(lm, alone, [(LONG, {"speculation": RULE}), (LONG, {"speculation": None})]) == [128, 128]


@pytest.mark.parametrize("speculation", [None, RULE, Speculation(4, adaptive=True)], ids=str)
def test_what_a_text_has_written_is_shared(
    folder: Path,
    scripted: Any,
    monkeypatch: pytest.MonkeyPatch,
    speculation: Any,
) -> None:
    """Pages of the answer too, but for what the modules may not have seen of it."""
    scripted([0] * (RING + 4) + [4, 1])
    monkeypatch.setattr("mtp_spec.cuda.sequence.WAITING", RING)
    lm, alone = batch_lm(folder, 2), batch_lm(folder, 1)
    drafts = speculation is not None
    for first, count, known in ((1, 20, 64 if drafts else 128), (2, 60, 128)):
        prompt = [first, *LONG[:109]]
        written = lm.submit(prompt, **{**OPTIONS, "speculation": speculation, "max_new_tokens": count}).result(300)
        question = [*prompt, *written.token_ids, 4]
        # texts of the rule depend on what is drafted: equal texts mean equal slots of the modules
        assert together(lm, alone, [(question, {"speculation": RULE if drafts else None})]) == [known]


def test_prompts_that_are_read_in_chunks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("pool", "group"):
        monkeypatch.setattr(f"mtp_spec.cuda.{place}.check_room", lambda *_: None)
    lm, alone = batch_lm(folder, 3), batch_lm(folder, 1)
    runtime(lm).graphs = OnceThenAgain()
    long = [(11 * i + i // 7) % 150 for i in range(290)]
    reused = together(lm, alone, [
        (long, {"speculation": 2}), (long[:280], {"speculation": RULE}),
        ([*long[:70], 8], {"speculation": 2, **SAMPLING[2]}),
    ])  # fmt: skip
    assert reused == [0, 256, 64]


def test_who_finds_no_pages_waits(folder: Path) -> None:
    need = pages_for(40 + 5 + SLACK + 18)
    lm, alone = batch_lm(folder, 6, need * PAGE * 2), batch_lm(folder, 1)
    running: list[int] = []
    admit = DeviceRunner.admit

    def watched(runner: DeviceRunner, sequence: Any, others: Any) -> bool:
        found = admit(runner, sequence, others)
        if found:
            running.append(len(others))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceRunner, "admit", watched)
        asked = [([n, *LONG[: 30 + n]], {"speculation": n % 2 or None}) for n in range(4)]
        together(lm, alone, asked)
    assert max(running) == 1  # two at a time
    pages = store(lm)
    assert pages.free + pages.idle == pages.total == 2 * need
    with pytest.raises(mtp_spec.MTPSpecError, match=r"may need 10 pages .* \(300 of the prompt, up to 100 new"):
        lm.submit([1] * 300, max_new_tokens=100)


def test_pages_come_back_whatever_happens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, alone = batch_lm(folder, 3, 14 * PAGE), batch_lm(folder, 1)
    for model in (lm.model, alone.model):
        model.embed_tokens[159] = float("nan")  # a text that reads it has no number left
    dice = random.Random(1)
    options = {**OPTIONS, "logit_bias": {**FEW, 159: -float("inf")}}
    for speculation in (2, RULE):
        lost = [lm.submit([*LONG[:70], 159, *LONG[: dice.randrange(9)]], speculation=2)]
        left = [lm.submit([*LONG[:20], n], **{**options, "max_new_tokens": 90}, speculation=2) for n in range(2)]
        kept = [(LONG[:73], {**options, "speculation": speculation})]
        handles = [lm.submit(prompt, **own) for prompt, own in kept]
        for handle in left:
            handle.cancel()
        for handle in lost:
            with pytest.raises(mtp_spec.MTPSpecError, match="no token can be drawn"):
                handle.result(300)
        for handle, (prompt, own) in zip(handles, kept, strict=True):
            assert_same(handle.result(300), alone.generate(prompt, **own))
    lm.close()
    pages = store(lm)
    assert pages.free + pages.idle == pages.total == 14
    assert sorted(pages._rows) == list(range(3 + EXTRA_ROWS))
    monkeypatch.setattr(Reader, "whole", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lm.submit([1, 2], **options).result(300)
    monkeypatch.setattr(DevicePages, "lease", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lm.submit([1, 2], **options).result(300)
    lm.close()
    assert pages.free + pages.idle == pages.total


def test_room_holds_every_padded_pass() -> None:
    class Asked:
        limit = 1

        def __init__(self, count: int) -> None:
            self.ids = [0] * count

    for count in range(1, 330):
        room = room_of(Asked(count), 10_000)
        for reused in range(0, count, PAGE):
            first = reused
            while first < count:
                rows = prefill_rows(count - first)
                assert first + rows <= room
                first += rows


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["v3", "three modules"])
def test_shared_pages_on_the_gpu(tmp_path: Path, kind: str) -> None:
    folder = checkpoint(tmp_path, kind)
    lm, alone, dice = batch_lm(folder, 8, 60 * PAGE, "cuda"), batch_lm(folder, 1, None, "cuda"), random.Random(3)
    base = [dice.randrange(150) for _ in range(380)]
    reused = 0
    for _ in range(3):
        asked: list[tuple[list[int], dict[str, Any]]] = []
        for number in range(16):
            prompt = [*base[: dice.randrange(1, 330)], *([number] * dice.randrange(3))]
            shape = dice.choice([None, 2, 3, RULE, "auto", Speculation(branching=(3, 2))])
            options = {"speculation": shape, "seed": number, "max_new_tokens": dice.randrange(1, 50)}
            asked.append((prompt, {**dice.choice(SAMPLING), **options}))
        handles = [lm.submit(prompt, **options) for prompt, options in asked]
        texts = [handle.result(300) for handle in handles]
        reused += sum(text.stats.reused_tokens for text in texts)
        for text, (prompt, options) in zip(texts, asked, strict=True):
            assert text.token_ids == alone.generate(prompt, **options).token_ids
    assert reused > 3 * PAGE * 16
