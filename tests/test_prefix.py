"""Caches handed from one text to the next: fewer tokens are read, and not a bit of what follows changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mtp_spec
import tiny
from mtp_spec.cache.prefix import Prefix

OPTIONS: dict[str, Any] = {"temperature": 0.9, "seed": 5, "logprobs": 3}
SHAPES = [None, 3, mtp_spec.Speculation(branching=(3, 2, 1)), mtp_spec.Speculation(4, adaptive=True)]


@pytest.fixture(scope="module", params=["v3", "v3_two_modules", "v3_yarn"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("tiny") / "model", request.param, seed=2).folder


def finished(stream: mtp_spec.TokenStream, tokens: int | None = None) -> mtp_spec.TokenStream:
    """Runs a stream, or its first tokens."""
    for number, _ in enumerate(stream, start=1):
        if number == tokens:
            break
    return stream


def assert_reused(lm: mtp_spec.LM, stream: mtp_spec.TokenStream, tokens: range) -> None:
    """So many; where rows run one by one only whole chunks are, of which so short a text has none."""
    reused = stream.result.stats.reused_tokens
    assert reused in tokens if lm.technique == "batched" else reused == 0


def assert_same_bits(one: mtp_spec.TokenStream, other: mtp_spec.TokenStream) -> None:
    assert one.result.token_ids == other.result.token_ids
    assert one.result.logprobs == other.result.logprobs


def assert_same_caches(one: mtp_spec.TokenStream, other: mtp_spec.TokenStream) -> None:
    """Caches of the main model and its modules, after both streams ended."""
    first, second = one.decoder.prefix(), other.decoder.prefix()  # type: ignore[union-attr]
    assert first is not None
    assert second is not None
    assert first.cache.length == second.cache.length
    drafted = min(first.drafted, second.drafted)
    pairs = [(first.cache, second.cache, first.cache.length)]
    pairs += [(a, b, drafted) for a, b in zip(first.mtp_caches, second.mtp_caches, strict=True)]
    for a, b, length in pairs:
        assert all(torch.equal(x[:length], y[:length]) for x, y in zip(a.slots, b.slots, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_second_turn_is_bitwise_that_of_a_fresh_prefill(folder: Path, shape: Any) -> None:
    lm = mtp_spec.load(folder, dtype="bfloat16")
    first = finished(lm.stream([3, 1, 4, 1, 5, 9, 2, 6], max_new_tokens=20, speculation=shape, **OPTIONS))
    question = [3, 1, 4, 1, 5, 9, 2, 6, *first.result.token_ids, 11, 12, 13]
    options = {"max_new_tokens": 12, "speculation": shape, **OPTIONS}
    fresh, second = lm.stream(question, **options), lm.stream(question, after=first, **options)
    assert_same_bits(finished(second), finished(fresh))
    assert_same_caches(second, fresh)
    stats = second.result.stats
    modules = 0 if shape is None else len(lm.model.mtp)
    assert stats.prompt_tokens == len(question)
    # all but the last token, which no row had read, and what the modules had not seen of it
    assert_reused(lm, second, range(len(question) - 4 - modules, len(question) - 2 - modules))
    third = [*question, *second.result.token_ids, 7]
    assert_same_bits(finished(lm.stream(third, after=second, **options)), finished(lm.stream(third, **options)))


@pytest.mark.parametrize("rule", ["rejection", "block", "traversal"])
def test_drafts_are_the_same_too(folder: Path, rule: str) -> None:
    """These rules' texts depend on what is drafted: equal texts mean equal modules' caches."""
    lm = mtp_spec.load(folder, dtype="bfloat16")
    options = {**OPTIONS, "max_new_tokens": 16, "speculation": mtp_spec.Speculation(3, acceptance=rule)}
    first = finished(lm.stream([1, 2, 3, 4, 5], **options))
    question = [1, 2, 3, 4, 5, *first.result.token_ids, 8, 9]
    second = finished(lm.stream(question, after=first, **options))
    assert_same_bits(second, finished(lm.stream(question, **options)))
    assert_reused(lm, second, range(17, len(question)))


def test_rows_that_depend_on_their_neighbours_are_reused_in_whole_chunks(by_torch: None, tmp_path: Path) -> None:
    lm = mtp_spec.load(tiny.make(tmp_path / "model").folder, dtype="float32", max_context=200)
    assert lm.technique == "single"
    short = finished(lm.stream(list(range(60)), max_new_tokens=4, **OPTIONS))
    assert finished(lm.stream([*range(60), 5], after=short, max_new_tokens=2)).result.stats.reused_tokens == 0


@pytest.mark.parametrize("speculation", [None, 2])
def test_whole_chunks_of_a_long_prompt(
    by_torch: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speculation: int | None
) -> None:
    lm = mtp_spec.load(tiny.make(tmp_path / "model", "v3_two_modules", seed=4).folder, dtype="float32")
    for module in ("mtp_spec.cpu.engine", "mtp_spec.api"):
        monkeypatch.setattr(f"{module}.PREFILL_CHUNK", 32)
    monkeypatch.setattr("mtp_spec.cpu.draft.CHUNK", 32)
    prompt = [(7 * i) % 96 for i in range(97)]
    options = {**OPTIONS, "max_new_tokens": 12, "speculation": speculation}
    first = finished(lm.stream(prompt, **options))
    question = [*prompt, *first.result.token_ids, 1, 2]
    second, fresh = finished(lm.stream(question, after=first, **options)), finished(lm.stream(question, **options))
    assert_same_bits(second, fresh)
    # the answer's tokens were rows of their own; two modules had not seen the last chunk's end
    assert second.result.stats.reused_tokens == (96 if speculation is None else 64)
    short = question[:50]
    assert_same_bits(finished(lm.stream(short, after=second, **options)), finished(lm.stream(short, **options)))


def test_any_earlier_text_will_do(tmp_path: Path) -> None:
    lm = mtp_spec.load(tiny.make(tmp_path / "model", "v3_two_modules", seed=3).folder, dtype="bfloat16")
    options = {**OPTIONS, "max_new_tokens": 10}
    prompt = [5, 6, 7, 8, 9, 10, 11, 12]
    whole = finished(lm.stream(prompt, speculation=3, **options))
    stopped = finished(lm.stream(prompt, speculation=3, **options), tokens=7)
    plain = finished(lm.stream([*prompt, *whole.result.token_ids], speculation=None, after=whole, **options))
    unused = lm.stream(prompt, **options)
    other = finished(lm.stream([90, 91], speculation=3, **options))
    for question in (prompt, prompt[:4], [*prompt, *whole.result.token_ids[:9], 3], [40], [90, 91, 92]):
        for speculation in (3, None):
            fresh = finished(lm.stream(question, speculation=speculation, **options))
            for earlier in (whole, stopped, plain, unused, other):
                again = finished(lm.stream(question, speculation=speculation, after=earlier, **options))
                assert_same_bits(again, fresh)
                assert_same_caches(again, fresh)
    # a text without drafts keeps what the modules had read before it
    question = [*prompt, *whole.result.token_ids, 3]
    drafted = finished(lm.stream(question, speculation=3, after=plain, **options))
    assert_reused(lm, drafted, range(len(prompt) + 1, len(question)))


def test_a_step_cut_short_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = mtp_spec.load(tiny.make(tmp_path / "model").folder, dtype="bfloat16")
    stream = lm.stream([1, 2, 3, 4], max_new_tokens=20, speculation=2, **OPTIONS)
    next(stream)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mtp_spec.model.cache.LatentCache.commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finished(stream)
    again = finished(lm.stream([1, 2, 3, 4, 5], max_new_tokens=8, after=stream, **OPTIONS))
    assert again.result.stats.reused_tokens == 0
    assert_same_bits(again, finished(lm.stream([1, 2, 3, 4, 5], max_new_tokens=8, **OPTIONS)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_earlier_stream_goes_on(folder: Path, shape: Any) -> None:
    lm = mtp_spec.load(folder, dtype="bfloat16")
    options = {"max_new_tokens": 20, "speculation": shape, **OPTIONS}
    alone = finished(lm.stream([3, 1, 4, 1, 5], **options))
    first = finished(lm.stream([3, 1, 4, 1, 5], **options), 4)
    finished(lm.stream([3, 1, 4, 1, 5, 9, 2], after=first, **options))
    assert_same_bits(finished(first), alone)
    assert_same_caches(first, alone)


def test_only_streams_of_this_model(tmp_path: Path) -> None:
    folder = tiny.make(tmp_path / "model").folder
    lm, other = (mtp_spec.load(folder, dtype="bfloat16") for _ in range(2))
    for wrong in ("text", other.stream([1])):
        with pytest.raises(mtp_spec.OptionError, match="after"):
            lm.stream([1, 2], after=wrong)  # type: ignore[arg-type]


def test_what_is_shared() -> None:
    cache = mtp_spec.model.cache.LatentCache.alone(1, 64, 4, torch.float32)
    cache.length = 20
    prefix = Prefix(list(range(21)), 12, cache, [cache, cache], 17, 1)
    long = [*range(21), 50]
    assert prefix.shared(long, False, 1) == 20
    assert prefix.shared(long, True, 1) == 17
    assert prefix.shared(long[:10], False, 1) == 9
    assert prefix.shared(long[:10], True, 1) == 8
    assert prefix.shared([9, *long], True, 1) == 0
    assert prefix.shared(long, False, 4) == 12
    assert prefix.shared(long, True, 4) == 8


def test_the_bundled_model_reuses_every_token() -> None:
    lm = mtp_spec.load()
    said = [{"role": "user", "content": "Tell me a story about a fox"}]
    options = {"max_new_tokens": 24, **OPTIONS}
    first = finished(lm.stream(said, **options))
    said += [{"role": "assistant", "content": first.result.text}, {"role": "user", "content": "And then?"}]
    second, fresh = finished(lm.stream(said, after=first, **options)), finished(lm.stream(said, **options))
    assert_same_bits(second, fresh)
    assert_reused(lm, second, range(25, second.result.stats.prompt_tokens))
