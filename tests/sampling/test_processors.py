"""Logits processors: every row is shown its own past, and the text stays that of plain decoding."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import mtp_spec
import tiny
from mtp_spec import OptionError, Speculation
from mtp_spec.acceptance import RULES

SHAPES: list[Any] = [3, Speculation(branching=(3, 2, 1)), Speculation(depth=8, adaptive=True),
                     Speculation(branching=(3, 3, 3), budget=7)]  # fmt: skip
STOP = 95


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tiny.Tiny:
    return tiny.make(tmp_path_factory.mktemp("tiny") / "model", seed=1)


@pytest.fixture(scope="module")
def lm(made: tiny.Tiny) -> mtp_spec.LM:
    return mtp_spec.load(made.folder, dtype="bfloat16")


def no_repeats(ids: list[int], logits: Tensor) -> Tensor:
    """No token of the last six, and one class of tokens that the ids so far decide."""
    logits[ids[-6:]] = -torch.inf
    logits[sum(ids) % 3 :: 3] += 4.0
    return logits


class NoRepeats:
    """The same with a state: the sum and the last ids."""

    def __init__(self) -> None:
        self.advanced: list[tuple[Any, int]] = []
        self.asked = 0

    def start(self, prompt_ids: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        return sum(prompt_ids), tuple(prompt_ids[-6:])

    def advance(self, state: tuple[int, tuple[int, ...]], token: int) -> tuple[int, tuple[int, ...]]:
        self.advanced.append((state, token))
        return state[0] + token, (*state[1], token)[-6:]

    def apply(self, state: tuple[int, tuple[int, ...]], logits: Tensor) -> Tensor:
        self.asked += 1
        out = logits.clone()
        out[list(state[1])] = -torch.inf
        out[state[0] % 3 :: 3] += 4.0
        return out


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_text_with_and_without_speculation(lm: mtp_spec.LM, shape: Any, temperature: float) -> None:
    options: dict[str, Any] = {"max_new_tokens": 24, "temperature": temperature, "logprobs": 1, "presence_penalty": 0.2}
    plain = lm.generate([1, 2], speculation=None, logits_processor=no_repeats, seed=0, **options)
    for processor in (no_repeats, NoRepeats(), [no_repeats, lambda ids, logits: logits.double()]):
        out = lm.generate([1, 2], speculation=shape, logits_processor=processor, seed=0, **options)
        assert out.token_ids == plain.token_ids
        assert out.logprobs == plain.logprobs
    ids = [1, 2, *plain.token_ids]
    assert all(ids[i] not in ids[max(0, i - 6) : i] for i in range(2, len(ids)))
    assert plain.token_ids != lm.generate([1, 2], speculation=None, seed=0, **options).token_ids


@pytest.mark.parametrize("name", RULES)
def test_every_rule_keeps_to_what_a_processor_allows(lm: mtp_spec.LM, name: str) -> None:
    shape = Speculation(branching=(1, 1) if RULES[name].chains_only else (2, 2), acceptance=name)
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 1.0, "seed": 0}
    out = lm.generate([1, 2], speculation=shape, logits_processor=NoRepeats(), **options)
    ids = [1, 2, *out.token_ids]
    assert out.stats.accepted > 0
    assert all(ids[i] not in ids[max(0, i - 6) : i] for i in range(2, len(ids)))


def test_a_state_is_computed_once_for_all_rows_of_a_path(lm: mtp_spec.LM) -> None:
    processor = NoRepeats()
    tree = Speculation(branching=(2, 2))
    out = lm.generate([1, 2], speculation=tree, logits_processor=processor, max_new_tokens=30, seed=0)
    assert out.stats.accepted > 0
    # drafts and targets ask about the same paths
    assert len(processor.advanced) < processor.asked
    assert len(processor.advanced) == len(set(processor.advanced))


def test_what_follows_the_end_is_not_asked_about(lm: mtp_spec.LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm, "stop_ids", lambda: frozenset([STOP]))
    asked: list[list[int]] = []

    def towards_the_end(ids: list[int], logits: Tensor) -> Tensor:
        asked.append(ids)
        assert STOP not in ids
        logits[STOP] = logits.max() + (3.0 if len(ids) > 8 else -9.0)
        return logits

    for name in ("coupled", *RULES):
        shape = Speculation(branching=(1,) * 4 if name == "block" else (2, 2, 1, 1), acceptance=name)
        out = lm.generate([1, 2], speculation=shape, logits_processor=towards_the_end, temperature=1.0, seed=0)
        assert out.finish_reason == "stop"
        assert STOP not in out.token_ids[:-1]
    assert max(map(len, asked)) > 8


def test_paths_without_a_token_end_the_draft_and_only_there(lm: mtp_spec.LM) -> None:
    plain = lm.generate([1, 2], speculation=None, max_new_tokens=12, seed=0)

    def only_plain(ids: list[int], logits: Tensor) -> Tensor:
        return logits if ids[2:] == plain.token_ids[: len(ids) - 2] else torch.full_like(logits, -torch.inf)

    for shape in SHAPES:
        out = lm.generate([1, 2], speculation=shape, max_new_tokens=12, logits_processor=only_plain, seed=0)
        assert out.token_ids == plain.token_ids
    with pytest.raises(mtp_spec.MTPSpecError, match="logits_processor"):
        lm.generate([1, 2], logits_processor=lambda ids, logits: logits - torch.inf, speculation=None)


def test_streams_lists_and_samples_take_it(lm: mtp_spec.LM) -> None:
    options: dict[str, Any] = {"max_new_tokens": 10, "logits_processor": NoRepeats()}
    first, second = lm.generate([[1, 2], [3]], seed=0, **options)
    assert [event.token_id for event in lm.stream([1, 2], seed=0, **options)] == first.token_ids
    assert lm.generate([3], n=2, seed=second.seed, **options)[0].token_ids == second.token_ids


def test_it_comes_where_transformers_has_it(made: tiny.Tiny) -> None:
    """After the repetition penalty: the two do not commute."""
    ids = list(range(40, 60))
    lm = mtp_spec.load(made.folder, dtype="float32")
    shifted = lambda ids, logits: logits - logits.mean() + len(ids) % 5  # noqa: E731
    ours = lm.generate(ids, temperature=0, max_new_tokens=30, repetition_penalty=1.8, logits_processor=shifted)
    theirs = made.main.generate(
        torch.tensor([ids]), max_new_tokens=30, do_sample=False, repetition_penalty=1.8, pad_token_id=0,
        logits_processor=[lambda ids, scores: shifted(ids[0].tolist(), scores[0])[None]],
    )  # fmt: skip
    assert ours.token_ids == theirs[0, len(ids) :].tolist()


class Half:
    def start(self, prompt_ids: Sequence[int]) -> int:
        return 0


@pytest.mark.parametrize("value", ["json", 3, Half(), [no_repeats, None]], ids=["text", "number", "half", "list"])
def test_what_is_no_processor_is_refused(lm: mtp_spec.LM, value: Any) -> None:
    with pytest.raises(OptionError, match="logits_processor="):
        lm.generate([1], logits_processor=value)


@pytest.mark.parametrize(
    "result", [None, torch.zeros(3), torch.zeros(96, dtype=torch.int64)], ids=["none", "short", "integers"]
)
def test_what_is_no_row_is_refused(lm: mtp_spec.LM, result: Any) -> None:
    with pytest.raises(OptionError, match=r"logits_processor returned .* shape \(96,\)"):
        lm.generate([1], logits_processor=lambda ids, logits: result, seed=0)


def test_a_row_of_its_own_is_left_alone(lm: mtp_spec.LM) -> None:
    own = torch.linspace(-1, 1, 96)
    kept = own.clone()
    lm.generate([1], logits_processor=lambda ids, logits: own, max_new_tokens=5, temperature=0.7, top_k=3, seed=0)
    assert torch.equal(own, kept)


@pytest.mark.parametrize("speculation", [None, 4])
def test_an_error_in_the_middle_of_a_step_is_the_one_that_is_told(lm: mtp_spec.LM, speculation: int | None) -> None:
    whole = lm.generate([5, 6, 7], max_new_tokens=12, temperature=0, speculation=speculation)
    for last in range(3, 9):

        def fails(ids: list[int], logits: torch.Tensor, last: int = last) -> torch.Tensor:
            if len(ids) > 3 + last:
                raise LookupError("a processor's own error")
            return logits

        options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0, "speculation": speculation}
        stream, told = lm.stream([5, 6, 7], logits_processor=fails, seed=0, **options), list[int]()
        with pytest.raises(LookupError, match="own error"):
            told += [event.token_id for event in stream]
        assert list(stream) == []
        handle = lm.submit([5, 6, 7], logits_processor=fails, seed=0, **options)

        async def listen(handle: mtp_spec.Handle = handle) -> list[int]:
            return [event.token_id async for event in handle]

        with pytest.raises(LookupError, match="own error"):
            asyncio.run(listen())
        assert told == whole.token_ids[: len(told)]


@pytest.mark.parametrize("speculation", [None, 3, Speculation(adaptive=True, drafters=("mtp", "text"))])
def test_an_iterator_without_more_is_an_error_and_no_end_of_the_text(lm: mtp_spec.LM, speculation: Any) -> None:
    for count in range(4, 12):
        options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0, "speculation": speculation}

        def biases(count: int = count) -> Any:
            left = iter(range(count))
            return lambda ids, logits: logits.index_add(0, torch.tensor([next(left)]), torch.ones(1))

        with pytest.raises(mtp_spec.MTPSpecError, match=r"raised StopIteration: .*give next\(\) a default"):
            list(lm.stream([5, 6, 7], logits_processor=biases(), **options))
        handle = lm.submit([5, 6, 7], logits_processor=biases(), **options)

        async def listen(handle: mtp_spec.Handle = handle) -> None:
            await asyncio.wait_for(handle, 60)

        with pytest.raises(mtp_spec.MTPSpecError, match="raised StopIteration"):
            asyncio.run(listen())
