"""Prompts that begin alike share what was computed: fewer tokens are read, and not a bit of what follows changes.

One contract on three backends: the CPU engine, the GPU's kernels by their references, and (`pytest -m gpu`) the GPU.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mtp_spec
import tiny
from device_models import OnceThenAgain, checkpoint, device_lm
from lms import device, host, lm_of, runtime
from mtp_spec.api import LM
from mtp_spec.chat.session import Session
from mtp_spec.cpu.passes import MOST_ROWS
from mtp_spec.cuda import backend
from mtp_spec.model.cache import PAGE
from mtp_spec.model.checkpoint.folder import load_checkpoint
from mtp_spec.sampling.params import SamplingParams
from mtp_spec.speculation import Speculation
from short_demo import short_demo

# forbidding most tokens makes random drafts right now and then
FEW = {token: -float("inf") for token in range(6, 90)}
OPTIONS: dict[str, Any] = {"top_k": 4, "logit_bias": FEW, "seed": 5, "max_new_tokens": 12, "logprobs": 2}
PROMPT = [(7 * i + i // 9) % 90 for i in range(150)]
RULE = Speculation(3, acceptance="rejection")  # whose text depends on what is drafted
SHAPES: list[Any] = [None, Speculation(branching=(3, 2, 1)), Speculation(4, adaptive=True), RULE]


@pytest.fixture(scope="module", params=["cpu", "references", pytest.param("cuda", marks=pytest.mark.gpu)])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LM, LM]:
    """Two models of the same weights: one to share prefixes, and one that forgets what it has read."""
    return models(request.param, tmp_path_factory.mktemp("model"))


def models(backend: str, folder: Path, modules: str = "two") -> tuple[LM, LM]:
    if backend == "cpu":
        made = tiny.make(folder / "model", f"v3_{modules}_modules", seed=2).folder
        return mtp_spec.load(made, measure=False), mtp_spec.load(made, measure=False)
    made = checkpoint(folder, f"{modules} modules", num_hidden_layers=2)
    device = "cuda" if backend == "cuda" else "cpu"
    return device_lm(made, device, 400), device_lm(made, device, 400)


def finished(stream: mtp_spec.TokenStream, tokens: int | None = None) -> mtp_spec.TokenStream:
    """Runs a stream, or its first tokens."""
    for number, _ in enumerate(stream, start=1):
        if number == tokens:
            break
    return stream


def assert_same_bits(one: mtp_spec.TokenStream, other: mtp_spec.TokenStream) -> None:
    assert one.result.token_ids == other.result.token_ids
    assert one.result.logprobs == other.result.logprobs


def shared(lm: LM, tokens: int = 2 * PAGE) -> int:
    """Returns how many of a beginning's tokens are shared: by torch, where rows depend on their pass, whole chunks."""
    return tokens if lm.backend.technique == "batched" else tokens // MOST_ROWS * MOST_ROWS


def shared_pages(lm: LM) -> Any:
    return device(lm).pool.pages if lm.backend.captured else host(lm).pages(False)


def fresh_text(lm: LM, prompt: list[int], **options: Any) -> mtp_spec.TokenStream:
    """Writes a text that shares nothing."""
    pages = shared_pages(lm)
    pages.forget()
    stream = finished(lm.stream(prompt, **options))
    assert stream.result.stats.reused_tokens == 0
    return stream


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_second_turn_is_bitwise_that_of_a_fresh_prefill(pair: tuple[LM, LM], shape: Any) -> None:
    lm, other = pair
    options, prompt = {**OPTIONS, "speculation": shape}, [SHAPES.index(shape), *PROMPT]
    turn = finished(lm.stream(prompt, **options))
    for after in (turn, None):  # naming the earlier stream is not needed
        question = [*prompt, *turn.result.token_ids, 7, 3]
        second = finished(lm.stream(question, after=after, **options))
        assert_same_bits(second, fresh_text(other, question, **options))
        assert second.result.stats.reused_tokens == shared(lm)
        assert second.result.stats.prompt_tokens == len(question)


def test_any_earlier_text_will_do(pair: tuple[LM, LM]) -> None:
    lm, other = pair
    prompt = [50, *PROMPT]
    whole = fresh_text(other, prompt, speculation=2, **OPTIONS).result.token_ids
    reused = set[int]()
    questions: tuple[list[int], ...] = (prompt, [*prompt[:70], 40], [*prompt, *whole[:5], 3], prompt[:30])
    speculations: tuple[Any, ...] = (2, None)
    others: list[Any] = [(2, 40), (2, 3), (Speculation(2, adaptive=True), 4), (None, 1), (2, 0)]
    if lm.backend.captured and lm.model.device.type == "cpu":  # the references take a second for each text: one of each
        questions, speculations, others = questions[1:3], (2,), [(2, 3), (None, 1)]
    for question in questions:
        for speculation in speculations:
            expected = fresh_text(other, question, speculation=speculation, **OPTIONS)
            for earlier, tokens in others:
                first = lm.stream(prompt, speculation=earlier, **OPTIONS)
                if tokens:
                    finished(first, tokens)
                again = finished(lm.stream(question, speculation=speculation, after=first, **OPTIONS))
                assert_same_bits(again, expected)
                reused.add(again.result.stats.reused_tokens)
    assert reused >= {shared(lm, PAGE), shared(lm)}


def test_the_earlier_stream_goes_on_where_there_is_room(pair: tuple[LM, LM]) -> None:
    lm, other = pair
    prompt = [60, *PROMPT[:20]]
    for shape in SHAPES:
        options = {**OPTIONS, "speculation": shape}
        first = finished(lm.stream(prompt, **options), 3)
        assert finished(lm.stream([*prompt, 9], after=first, **options)).result.token_ids
        assert_same_bits(finished(first), fresh_text(other, prompt, **options))


def test_an_unfinished_stream_makes_room(pair: tuple[LM, LM]) -> None:
    """Its context is all that there is, so the next turn of a chat takes its pages over."""
    lm, other = pair
    options = {**OPTIONS, "speculation": 2, "max_new_tokens": 300}
    first = finished(lm.stream([61, *PROMPT[:80]], **options), 3)
    question, few = [61, *PROMPT[:80], 9], {**options, "max_new_tokens": 4}
    second = finished(lm.stream(question, after=first, **few))
    assert second.result.stats.reused_tokens == shared(lm, PAGE)
    assert_same_bits(second, fresh_text(other, question, **few))
    if not first.sequence.alive or first.sequence.lease is None or not first.sequence.lease._pages:
        with pytest.raises(mtp_spec.MTPSpecError, match="left for the one after it"):
            finished(first)


@pytest.mark.parametrize("backend", ["cpu", "references"])
def test_texts_do_not_wait_for_a_stream_that_nobody_reads(tmp_path: Path, backend: str) -> None:
    """Its caller may be the one who waits for them."""
    lm, other = models(backend, tmp_path)
    options = {**OPTIONS, "speculation": 2}
    stream = finished(lm.stream([64, *PROMPT], **{**options, "max_new_tokens": lm.max_context - 151}), 3)
    for _ in range(2):
        prompts = [[first, *PROMPT] for first in (65, 66)]
        for prompt, handle in [(prompt, lm.submit(prompt, **options)) for prompt in prompts]:
            assert handle.result(60).token_ids == other.generate(prompt, **options).token_ids
        stream.close()  # then they have its pages
    lm.close()


def test_without_memory_of_their_own_texts_wait_for_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where a second pool of pages may not fit."""
    lm, other = models("references", tmp_path)
    options, asked = {**OPTIONS, "speculation": 2}, threading.Event()
    stream = finished(lm.stream([64, *PROMPT], **{**options, "max_new_tokens": lm.max_context - 151}), 3)
    expected = other.generate([65, *PROMPT], **options)

    def pool(*_: Any) -> None:
        asked.set()
        raise mtp_spec.MTPSpecError("A sequence beside others needs 2 GB of GPU memory and 1 GB are free")

    monkeypatch.setattr(backend, "Pool", pool)
    handle = lm.submit([65, *PROMPT], **options)
    assert asked.wait(30)
    assert not handle.done()
    with pytest.raises(mtp_spec.MTPSpecError, match="A sequence beside others needs"):
        lm.generate([66, *PROMPT], **options)  # by itself it does not wait
    stream.close()
    assert handle.result(60).token_ids == expected.token_ids
    lm.close()


def test_a_text_without_drafts_keeps_what_the_modules_had_read(pair: tuple[LM, LM]) -> None:
    lm, other = pair
    prompt = [62, *PROMPT]
    drafted = finished(lm.stream(prompt, speculation=3, **OPTIONS))
    question = [*prompt, *drafted.result.token_ids]
    plain = finished(lm.stream([*question, 2], speculation=None, **OPTIONS))
    last = [*question, 2, *plain.result.token_ids, 3]
    again = finished(lm.stream(last, **{**OPTIONS, "speculation": RULE}))
    assert_same_bits(again, fresh_text(other, last, **{**OPTIONS, "speculation": RULE}))
    assert again.result.stats.reused_tokens == shared(lm)


def test_processors(pair: tuple[LM, LM]) -> None:
    lm, other = pair
    prompt, options = [63, *PROMPT], {**OPTIONS, "speculation": 2, "logits_processor": lambda ids, logits: logits}
    first = finished(lm.stream(prompt, **options))
    question = [*prompt, *first.result.token_ids, 9]
    second = finished(lm.stream(question, **options))
    assert_same_bits(second, fresh_text(other, question, **options))
    assert second.result.stats.reused_tokens == shared(lm)


def test_only_streams_of_this_model(pair: tuple[LM, LM]) -> None:
    lm, other = pair
    for wrong in ("text", other.stream([1])):
        with pytest.raises(mtp_spec.OptionError, match="after"):
            lm.stream([1, 2], after=wrong)


@pytest.mark.parametrize("backend", ["cpu", "references"])
def test_a_stream_that_nobody_holds_gives_its_pages_back(tmp_path: Path, backend: str) -> None:
    lm, _ = models(backend, tmp_path)
    for _ in range(3):
        finished(lm.stream(PROMPT, **{**OPTIONS, "max_new_tokens": 200}), 2)
    pages = shared_pages(lm)
    assert pages.free + pages.idle == pages.total


@pytest.mark.parametrize("backend", ["cpu", "references"])
def test_a_step_cut_short_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    lm, other = models(backend, tmp_path)
    stream = lm.stream(PROMPT, speculation=2, **OPTIONS)
    next(stream)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mtp_spec.model.cache.LatentCache.commit", interrupted)
        patch.setattr("mtp_spec.cuda.group.Group.launch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finished(stream)
    assert list(stream) == []
    question = [*PROMPT, 5]
    again = finished(lm.stream(question, after=stream, **OPTIONS))
    assert_same_bits(again, fresh_text(other, question, **OPTIONS))


@pytest.mark.parametrize("backend", ["cpu", "references"])
def test_numbers_that_are_none_are_not_left(tmp_path: Path, backend: str) -> None:
    lm, other = models(backend, tmp_path)
    weights = lm.model.checkpoint_slots()["model.embed_tokens.weight"]
    broken = [*PROMPT[:140], 89, *[4] * 20]
    kept = weights[89].clone()
    weights[89] = float("nan")
    with pytest.raises(mtp_spec.MTPSpecError, match="no token can be drawn"):
        finished(lm.stream(broken, speculation=2, **OPTIONS))
    weights[89] = kept
    question = [*PROMPT[:140], 1]
    again = finished(lm.stream(question, speculation=2, **OPTIONS))
    assert_same_bits(again, fresh_text(other, question, speculation=2, **OPTIONS))


def test_rows_that_depend_on_their_pass_are_reused_in_whole_chunks(
    by_torch: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch a prompt's row has the bits of its chunk: whole chunks are shared, and a text's own tokens never."""
    for module in ("state", "passes", "draft", "backend"):
        monkeypatch.setattr(f"mtp_spec.cpu.{module}.MOST_ROWS", 128)
    made = tiny.make(tmp_path / "model", "v3_two_modules", seed=4).folder
    lm, other = (lm_of(load_checkpoint(made, dtype=torch.float32), None, 256) for _ in range(2))
    assert lm.technique == "single"
    for speculation in (None, 2):
        prompt = [10 if speculation else 11, *PROMPT]
        options = {**OPTIONS, "speculation": speculation}
        first = finished(lm.stream(prompt, **options))
        for question in ([*prompt, *first.result.token_ids, 1, 2], prompt[:100]):
            second = finished(lm.stream(question, **options))
            assert_same_bits(second, fresh_text(other, question, **options))
            assert second.result.stats.reused_tokens == (128 if len(question) > 130 else 0)


def test_capturing_leaves_what_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtp_spec.cuda.group.check_room", lambda *_: None)
    monkeypatch.setattr("mtp_spec.cuda.pool.check_room", lambda *_: None)
    lm, other = models("references", tmp_path)
    runtime(lm).graphs = OnceThenAgain()
    turn, question = lm.stream(PROMPT, speculation=2, **OPTIONS), PROMPT
    for shape in (RULE, Speculation(3, adaptive=True), RULE):  # new steps, beside pages that hold a text
        question = [*question, *finished(turn).result.token_ids, 9]
        turn = lm.stream(question, speculation=shape, **OPTIONS)
        assert_same_bits(finished(turn), fresh_text(other, question, speculation=shape, **OPTIONS))
        assert turn.result.stats.reused_tokens == 2 * PAGE


@pytest.mark.parametrize("backend", ["cpu", "references"])
def test_a_chat_reads_its_new_turn(backend: str) -> None:
    def load() -> LM:
        return device_lm(short_demo(), context=300) if backend == "references" else mtp_spec.load(max_context=300)

    lm, question = load(), "Tell me about a fox who " * 10
    session = Session(lm, SamplingParams(max_new_tokens=3, temperature=0.0), 1)
    draw, answer = session.ask(question)
    session.keep(draw, finished(answer), interrupted=False)
    plain = session.draw(replace(draw, speculation=None))  # as /parity does
    session.follow(finished(plain))
    assert answer.result.stats.reused_tokens == 0
    assert plain.result.stats.reused_tokens >= shared(lm, PAGE)
    draw, answer = session.ask("And then?")
    assert finished(answer).result.stats.reused_tokens >= shared(lm, PAGE)
    expected = finished(load().stream(draw.messages, max_new_tokens=3, temperature=0.0))
    assert answer.result.token_ids == expected.result.token_ids
