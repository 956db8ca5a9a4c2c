"""Caches handed from one text to the next on a GPU: fewer tokens are read, and not a bit of what follows changes.

On a CPU by the kernels' references, on a GPU (`pytest -m gpu`) as they are.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_device import OnceThenAgain, checkpoint, device_lm
from test_prefix import assert_same_bits, finished

import mtp_spec
from mtp_spec.api import LM
from mtp_spec.chat.session import Session
from mtp_spec.cuda.engine import DeviceDecoder
from mtp_spec.sampling.params import SamplingParams
from mtp_spec.speculation import Speculation

# forbidding most tokens makes random drafts right now and then
FEW = {token: -float("inf") for token in range(6, 160)}
OPTIONS: dict[str, Any] = {"top_k": 4, "logit_bias": FEW, "seed": 5, "max_new_tokens": 12}
PROMPT = [9, 8, 7, 6, 5, 4, 3, 2]
RULE = Speculation(3, acceptance="rejection")
SHAPES: list[Any] = [None, Speculation(branching=(3, 2, 1)), Speculation(4, adaptive=True), RULE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model"), "two modules", num_hidden_layers=2)


def same(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    return logits


def states(lm: LM) -> int:
    assert lm.runtime is not None
    return len(lm.runtime._states)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_second_turn_is_that_of_a_fresh_reading(folder: Path, shape: Any) -> None:
    lm, fresh = device_lm(folder), device_lm(folder)
    options = {**OPTIONS, "logprobs": 2, "speculation": shape}
    turn, question = lm.stream(PROMPT, **options), PROMPT
    for _ in range(2):
        finished(turn)
        earlier, question = question, [*question, *turn.result.token_ids, 7, 3]
        turn = lm.stream(question, after=turn, **options)
        assert_same_bits(finished(turn), finished(fresh.stream(question, **options)))
        modules = 0 if shape is None else len(lm.model.mtp)
        # all but the two that are new, the last one drawn, and what the last step's tokens had not been shown to
        assert len(question) - 3 >= turn.result.stats.reused_tokens >= len(earlier) + 12 - 5 - 2 * modules
    assert states(lm) == 1


def test_any_earlier_text_will_do(folder: Path) -> None:
    lm, fresh = device_lm(folder), device_lm(folder)
    options, reused = {**OPTIONS, "max_new_tokens": 6, "logprobs": 1}, set[int]()
    whole = finished(fresh.stream(PROMPT, speculation=2, **options)).result.token_ids
    for question in (PROMPT, [*PROMPT[:4], 40], [*PROMPT, *whole[:5], 3]):
        for speculation in (2, None):
            expected = finished(fresh.stream(question, speculation=speculation, **options))
            for earlier, tokens in ((2, 40), (2, 3), (Speculation(2, adaptive=True), 4), (None, 1), (2, 0)):
                first = lm.stream(PROMPT, speculation=earlier, **{**options, "logprobs": 0})
                if tokens:
                    finished(first, tokens)
                again = finished(lm.stream(question, speculation=speculation, after=first, **options))
                assert_same_bits(again, expected)
                reused.add(again.result.stats.reused_tokens)
    assert len(reused) > 4
    # a stream that was finished leaves its caches to who comes next, and all others to who comes after them
    assert states(lm) == 1


def test_a_text_without_drafts_keeps_what_the_modules_had_read(folder: Path) -> None:
    lm, fresh = device_lm(folder), device_lm(folder)
    drafted = finished(lm.stream(PROMPT, speculation=3, **OPTIONS))
    question = [*PROMPT, *drafted.result.token_ids]
    plain = finished(lm.stream([*question, 2], speculation=None, after=drafted, **OPTIONS))
    last = [*question, 2, *plain.result.token_ids, 3]
    options = {**OPTIONS, "speculation": RULE}  # whose text depends on what is drafted
    again = finished(lm.stream(last, after=plain, **options))
    assert_same_bits(again, finished(fresh.stream(last, **options)))
    assert len(question) > again.result.stats.reused_tokens > len(question) - 10


def test_processors_and_caches_that_another_text_has_used(folder: Path) -> None:
    lm, fresh = device_lm(folder), device_lm(folder)
    options = {**OPTIONS, "speculation": 2, "logits_processor": same}
    first = finished(lm.stream(PROMPT, **options))
    question = [*PROMPT, *first.result.token_ids, 9]
    second, expected = lm.stream(question, after=first, **options), finished(fresh.stream(question, **options))
    assert_same_bits(finished(second), expected)
    assert second.result.stats.reused_tokens > len(PROMPT)
    for _ in range(2):  # the first one's caches have gone, and then the second one's
        assert finished(lm.stream(question, after=first, **options)).result.stats.reused_tokens == 0
    assert_same_bits(finished(lm.stream(question, after=second, **options)), expected)
    assert states(lm) == 1


def test_who_was_left_cannot_go_on(folder: Path) -> None:
    lm = device_lm(folder)
    for options in (OPTIONS, {**OPTIONS, "logits_processor": same}):
        first = finished(lm.stream(PROMPT, **options), 3)
        second = lm.stream([*PROMPT, 9], after=first, **options)
        with pytest.raises(mtp_spec.MTPSpecError, match="left for the one that came after it"):
            finished(first)
        del first  # its end does not free what is another's
        assert isinstance(second.decoder, DeviceDecoder)
        assert second.decoder.state.busy
        assert_same_bits(finished(second), finished(lm.stream([*PROMPT, 9], **options)))


def test_numbers_that_are_none_are_not_left(folder: Path) -> None:
    lm, fresh = device_lm(folder), device_lm(folder)
    lm.model.embed_tokens[159] = float("nan")
    broken = lm.stream([*PROMPT, 159, 4, 4, 4, 4, 4, 4, 4], speculation=2, **OPTIONS)
    with pytest.raises(mtp_spec.MTPSpecError, match="no token can be drawn"):
        finished(broken)
    again = finished(lm.stream([*PROMPT, 1], speculation=2, after=broken, **OPTIONS))
    assert again.result.stats.reused_tokens == 0
    assert_same_bits(again, finished(fresh.stream([*PROMPT, 1], speculation=2, **OPTIONS)))


def test_capturing_leaves_what_is_reused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtp_spec.cuda.engine.check_room", lambda *_: None)
    lm, fresh = device_lm(folder), device_lm(folder)
    assert lm.runtime is not None
    lm.runtime.graphs = OnceThenAgain()
    turn, question = lm.stream(PROMPT, speculation=2, **OPTIONS), PROMPT
    for shape in (RULE, Speculation(3, adaptive=True), RULE):  # new steps, on a state that holds a text
        question = [*question, *finished(turn).result.token_ids, 9]
        turn = lm.stream(question, speculation=shape, after=turn, **OPTIONS)
        assert_same_bits(finished(turn), finished(fresh.stream(question, speculation=shape, **OPTIONS)))
        assert turn.result.stats.reused_tokens > len(PROMPT)


def test_a_chat_reads_its_new_turn() -> None:
    lm = device_lm(context=200)
    session = Session(lm, SamplingParams(max_new_tokens=3, temperature=0.0), 1)
    draw, answer = session.ask("Hello")
    session.keep(draw, finished(answer), interrupted=False)
    plain = session.draw(replace(draw, speculation=None))  # as /parity does
    session.follow(finished(plain))
    before = len(lm.chat_ids(draw.messages))
    assert (answer.result.stats.reused_tokens, plain.result.stats.reused_tokens) == (0, before - 1)
    draw, answer = session.ask("And then?")
    assert finished(answer).result.stats.reused_tokens >= before
    assert_same_bits(answer, finished(device_lm(context=200).stream(draw.messages, max_new_tokens=3, temperature=0.0)))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["v3", "three modules"])
def test_the_next_turn_on_the_gpu(tmp_path: Path, kind: str) -> None:
    folder = checkpoint(tmp_path, kind)
    lm, fresh = device_lm(folder, "cuda"), device_lm(folder, "cuda")
    question, turn = PROMPT, None
    for shape in [*SHAPES, *SHAPES[::-1]]:
        for tokens in (5, None):  # left in the middle, with steps on their way, then finished
            options = {**OPTIONS, "speculation": shape, "logprobs": 0 if tokens else 2}
            turn = finished(lm.stream(question, after=turn, **options), tokens)
            expected = finished(fresh.stream(question, **options))
            assert turn.result.token_ids == expected.result.token_ids[: len(turn.result.token_ids)]
            assert tokens or turn.result.logprobs == expected.result.logprobs
        question = [*question, *turn.result.token_ids, 9]
        assert turn.result.stats.reused_tokens > 0
    assert states(lm) == 1
