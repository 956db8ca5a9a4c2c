"""Stop strings with special tokens, stop tokens, end-of-sequence ignored, a least length: exact with drafts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mtp_spec
import tiny
from mtp_spec import OptionError, Speculation
from mtp_spec.acceptance import RULES
from mtp_spec.cli.main import main
from mtp_spec.speculation import ACCEPTANCE_RULES
from mtp_spec.text import Tokenizer
from mtp_spec.text.stopping import StopChecker

DEMO = Path(str(files("mtp_spec.configs"))) / "demo"
EOS, USER = 1, 2
SHAPES: list[Any] = [None, 3, Speculation(branching=(2, 2, 1)), Speculation(8, adaptive=True)]
HEATS = [0.0, 0.8]
installed = pytest.mark.skipif(find_spec("llguidance") is None, reason="mtp-spec[grammar] is not installed")


@pytest.fixture(scope="module")
def lm() -> mtp_spec.LM:
    return mtp_spec.load(measure=False, max_batch=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tiny.Tiny:
    return tiny.make(tmp_path_factory.mktemp("tiny") / "model", seed=1)


@pytest.fixture(scope="module")
def small(made: tiny.Tiny) -> mtp_spec.LM:
    return mtp_spec.load(made.folder, dtype="float32", max_batch=3, measure=False)


def everything(out: mtp_spec.Generation) -> tuple[Any, ...]:
    return out.text, out.token_ids, out.finish_reason, out.logprobs, out.seed


def all_ways(lm: mtp_spec.LM, prompt: Any, shapes: Sequence[Any] = tuple(SHAPES), **options: Any) -> Any:
    """Returns the text of plain decoding, after comparing all shapes with it, alone, streamed and in a batch."""
    options = {"seed": 5, "logprobs": 1, **options}
    plain = lm.generate(prompt, speculation=None, **options)
    for shape in shapes:
        stream = lm.stream(prompt, speculation=shape, **options)
        events = list(stream)
        assert "".join(event.text for event in events) == plain.text
        assert [event.token_id for event in events] == plain.token_ids
        beside = [lm.submit(other, speculation=3, seed=1, max_new_tokens=6) for other in ([7, 8], [9])]
        ways = [stream.result, lm.generate(prompt, speculation=shape, **options),
                lm.submit(prompt, speculation=shape, **options).result()]  # fmt: skip
        for out in ways:
            assert everything(out) == everything(plain), shape
        for handle in beside:
            handle.result()
    return plain


class Dictated:
    """Lets the model write some tokens, then others as it likes."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = ids

    def start(self, prompt_ids: Sequence[int]) -> int:
        return 0

    def advance(self, state: int, token: int) -> int:
        return state + 1

    def apply(self, state: int, logits: torch.Tensor) -> torch.Tensor:
        only = torch.full_like(logits, -math.inf)
        only[self.ids[min(state, len(self.ids) - 1)]] = 0.0
        return only


def body(lm: mtp_spec.LM) -> list[int]:
    return [*lm.encode("Hello there.")[1:], USER, *lm.encode("I am the user now.")[1:], EOS]


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("<|user|>", "Hello there."),
        ("there.<|user|>", "Hello "),
        ("<|user|>I am", "Hello there."),
        (".<|user|>I", "Hello there"),
        ("user|>I", "Hello there."),
        ("now.<|eos|>", "Hello there.I am the user "),
        (["zzz", "user now", "<|user|>"], "Hello there."),
        ("there.I am", "Hello "),  # what is shown counts too
        ("<|assistant|>", "Hello there.I am the user now."),
    ],
)
def test_stop_strings_with_special_tokens(lm: mtp_spec.LM, stop: Any, text: str) -> None:
    out = all_ways(lm, "x", stop=stop, max_new_tokens=60, logits_processor=Dictated(body(lm)))
    assert (out.text, out.finish_reason) == (text, "stop")
    assert out.text == lm.decode(out.token_ids) or lm.decode(out.token_ids).startswith(out.text)
    assert len(out.logprobs) == len(out.token_ids)
    question = [{"role": "user", "content": "x"}]
    assert lm.chat(question, stop=stop, max_new_tokens=60, logits_processor=Dictated(body(lm))).text == text


def naive(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str], least: int) -> tuple[str, int] | None:
    """Returns the text before the first stop string, and after how many tokens it was complete."""
    for count in range(1, len(ids) + 1):
        places = []
        for skip in (True, False):
            texts = [tokenizer.raw.decode([token], skip_special_tokens=skip) for token in ids[:count]]
            shown = [tokenizer.raw.decode([token], skip_special_tokens=True) for token in ids[:count]]
            whole, begin = "".join(texts), sum(map(len, texts[:least]))
            for stop in stops:
                at = whole.find(stop, begin)
                if at >= 0:
                    number, left = 0, at
                    while left >= len(texts[number]):
                        left -= len(texts[number])
                        number += 1
                    places.append("".join(shown[:number]) + shown[number][:left])
        if places:
            return min(places, key=len), count
    return None


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_stop_string_in_any_text(data: st.DataObject) -> None:
    tokenizer = Tokenizer(DEMO)
    letters = [tokenizer.raw.encode(letter, add_special_tokens=False).ids[0] for letter in "ab."]
    special = data.draw(st.sampled_from([[], [2, 3]]))
    ids = data.draw(st.lists(st.sampled_from([*letters, *special]), min_size=1, max_size=12))
    part = st.sampled_from(["a", "b", ".", "<|user|>", "<|assistant|>", "<|us", "er|>", "|"])
    stops = data.draw(st.lists(st.lists(part, min_size=1, max_size=4).map("".join), min_size=1, max_size=2))
    least = data.draw(st.integers(0, 3))
    expected = naive(tokenizer, ids, stops, least)
    found = []
    for streams, together in ((True, False), (False, False), (False, True), (True, True)):
        finisher, pieces, count, ended = (
            StopChecker(tokenizer, frozenset(), stops, len(ids), least),
            list[str](),
            0,
            False,
        )
        while not ended:
            step = ids[count : count + (data.draw(st.integers(1, 5)) if together else 1)]
            if together and finisher.pass_by(step):
                count += len(step)
            else:
                for token in step:
                    count += 1
                    if ended := finisher.push(token):
                        break
            if streams and data.draw(st.booleans()):
                pieces += finisher.ready()
        whole = finisher.whole()
        pieces += finisher.ready()
        found.append(("".join(pieces), len(pieces), count, finisher.reason))
        assert whole in (None, found[-1][:2])
    assert found[1:] == found[:-1]
    text, tokens, count, reason = found[0]
    if expected is None:
        assert (text, tokens, reason) == (tokenizer.decode(ids), len(ids), "length")
    else:
        assert (text, count, reason) == (*expected, "stop")
        assert tokens >= min(least, len(ids))


@pytest.mark.parametrize("temperature", HEATS)
def test_stop_tokens_end_the_text_before_them(small: mtp_spec.LM, temperature: float) -> None:
    options: dict[str, Any] = {"max_new_tokens": 24, "temperature": temperature, "ignore_eos": True}
    whole = all_ways(small, [4, 2], **options)
    assert len(whole.token_ids) == 24
    for at in (1, 5, 12):
        token = whole.token_ids[at]
        first = whole.token_ids.index(token)
        forms: list[Any] = [[token], token, (token, token), {token}, torch.tensor([token])]
        for given_ids in forms:
            out = small.generate([4, 2], seed=5, stop_token_ids=given_ids, **options)
            assert (out.token_ids, out.finish_reason) == (whole.token_ids[:first], "stop")
        out = all_ways(small, [4, 2], stop_token_ids=[token], **options)
        assert out.token_ids == whole.token_ids[:first]
        stream = small.stream([4, 2], seed=5, stop_token_ids=[token], speculation=3, **options)
        list(stream)
        assert stream.sequence.tokens == [4, 2, *whole.token_ids[: first + 1]]


def test_the_models_own_ends_count_beside_stop_tokens(lm: mtp_spec.LM) -> None:
    options: dict[str, Any] = {"max_new_tokens": 60, "logits_processor": Dictated(body(lm))}
    assert all_ways(lm, "x", stop_token_ids=[0], **options).finish_reason == "stop"
    ignored = all_ways(lm, "x", ignore_eos=True, **options)
    assert (len(ignored.token_ids), ignored.finish_reason) == (60, "length")
    assert ignored.token_ids[-2:] == [EOS, EOS]
    out = all_ways(lm, "x", ignore_eos=True, stop_token_ids=[USER], **options)
    assert (out.text, out.finish_reason) == ("Hello there.", "stop")
    assert USER not in out.token_ids
    assert all_ways(lm, "x", ignore_eos=True, stop="<|eos|>", **options).text == "Hello there.I am the user now."


def likes_the_end(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    logits[[EOS, 7]] += 6.0
    return logits


@pytest.mark.parametrize("temperature", HEATS)
@pytest.mark.parametrize("least", [1, 2, 9, 30])
def test_a_text_has_its_least_length(
    small: mtp_spec.LM, monkeypatch: pytest.MonkeyPatch, least: int, temperature: float
) -> None:
    monkeypatch.setattr(small, "stop_ids", lambda: frozenset([EOS]))
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": temperature, "logit_bias": {EOS: 6.0, 7: 5.0},
                               "frequency_penalty": 0.2}  # fmt: skip
    short = small.generate([3, 1], seed=5, stop_token_ids=[7], **options)
    assert len(short.token_ids) < 9
    out = all_ways(small, [3, 1], stop_token_ids=[7], min_new_tokens=least, **options)
    assert least <= len(out.token_ids) <= 30
    assert not {EOS, 7} & set(out.token_ids)
    if len(short.token_ids) >= least:
        assert out.token_ids == short.token_ids
    with_more = all_ways(small, [3, 1], stop_token_ids=[7], min_new_tokens=least, **options,
                         logits_processor=likes_the_end)  # fmt: skip
    assert len(with_more.token_ids) >= least


@pytest.mark.parametrize("rule", ACCEPTANCE_RULES)
def test_every_rule_keeps_the_least_length(small: mtp_spec.LM, monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    monkeypatch.setattr(small, "stop_ids", lambda: frozenset([EOS]))
    chain = rule in RULES and RULES[rule].chains_only
    shape = Speculation(branching=(1, 1, 1) if chain else (2, 2, 1), acceptance=rule)
    for seed in range(6):
        out = small.generate([3, 1], seed=seed, speculation=shape, max_new_tokens=20, min_new_tokens=12,
                             logit_bias={EOS: 9.0})  # fmt: skip
        assert len(out.token_ids) >= 12
        assert EOS not in out.token_ids


def test_the_least_length_is_transformers(made: tiny.Tiny, small: mtp_spec.LM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, ended = [5, 9, 3], 0
    free = small.generate(prompt, temperature=0, max_new_tokens=24, ignore_eos=True, speculation=None).token_ids
    for end in (free[2], free[9], free[-1]):
        monkeypatch.setattr(small, "stop_ids", lambda end=end: frozenset([end]))
        for least in (0, 3, 11):
            theirs = made.main.generate(
                torch.tensor([prompt]), max_new_tokens=24, min_new_tokens=least, do_sample=False, eos_token_id=end,
                pad_token_id=0,
            )[0, len(prompt) :].tolist()  # fmt: skip
            ours = all_ways(small, prompt, temperature=0.0, max_new_tokens=24, min_new_tokens=least, shapes=SHAPES[1:3])
            ended += theirs[-1:] == [end]
            assert ours.token_ids == [token for token in theirs if token != end]
    assert ended


@pytest.mark.parametrize(("least", "text"), [
    (0, "Hello"), (1, "Hello there.I am"), (4, "Hello there.I am"), (8, "Hello there.I am the user now."),
])  # fmt: skip
def test_a_stop_string_within_the_least_length_is_text(lm: mtp_spec.LM, least: int, text: str) -> None:
    ids = body(lm)
    words = [lm.decode([token]) for token in ids]
    assert words[:2] == ["Hello", " there"]
    assert words.index(" the") < 8
    out = all_ways(lm, "x", stop=[" the"], max_new_tokens=60, min_new_tokens=least, logits_processor=Dictated(ids))
    expected = "".join(words[:least]) + "".join(words[least:]).partition(" the")[0]
    assert out.text == expected
    assert len(out.token_ids) >= least


def test_the_length_ends_a_text_whatever_its_least(small: mtp_spec.LM) -> None:
    out = all_ways(small, [4, 2], max_new_tokens=9, min_new_tokens=9)
    assert (len(out.token_ids), out.finish_reason) == (9, "length")


@installed
def test_a_grammar_that_ends_too_early_is_an_error_that_names_it(lm: mtp_spec.LM) -> None:
    options: dict[str, Any] = {"response_format": {"type": "regex", "regex": "[0-9]{3}"}, "seed": 0}
    for shape in SHAPES:
        with pytest.raises(mtp_spec.MTPSpecError, match=r"min_new_tokens=30 forbids the end .*response_format"):
            lm.generate("In the year ", speculation=shape, min_new_tokens=30, **options)
    assert len(lm.generate("In the year ", min_new_tokens=1, **options).text) == 3
    with pytest.raises(OptionError, match=r"ignore_eos=True.*response_format"):
        lm.generate("In the year ", ignore_eos=True, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_token_ids": [96]}, r"stop_token_ids=\[96\].*from 0 to 95"),
        ({"stop_token_ids": [-1]}, "stop_token_ids=-1"),
        ({"stop_token_ids": [1.5]}, r"stop_token_ids=1\.5"),
        ({"stop_token_ids": [True]}, "stop_token_ids=True"),
        ({"stop_token_ids": "eos"}, "stop_token_ids='eos'"),
        ({"stop_token_ids": {"a": 1}}, "stop_token_ids="),
        ({"stop_token_ids": 1.0}, r"stop_token_ids=1\.0"),
        ({"ignore_eos": 1}, "ignore_eos=1"),
        ({"ignore_eos": "yes"}, "ignore_eos='yes'"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1"),
        ({"min_new_tokens": 1.5}, r"min_new_tokens=1\.5"),
        ({"min_new_tokens": 11, "max_new_tokens": 10}, "min_new_tokens=11.*max_new_tokens, 10"),
        ({"min_new_tokens": 1, "stop_token_ids": list(range(96))}, "every token ends the text"),
        ({"stop_token_id": [1]}, "did you mean 'stop_token_ids'"),
    ],
    ids=str,
)
def test_impossible_values(small: mtp_spec.LM, options: dict[str, Any], message: str) -> None:
    for call in (small.generate, small.stream, small.submit):
        with pytest.raises(OptionError, match=message):
            call([1], **options)


def test_a_least_length_without_room_is_refused(small: mtp_spec.LM) -> None:
    with pytest.raises(mtp_spec.PromptError, match="250 tokens and min_new_tokens is 7 and the context is 256"):
        small.generate([1] * 250, max_new_tokens=20, min_new_tokens=7)
    assert len(small.generate([1] * 250, max_new_tokens=20, min_new_tokens=6, seed=0).token_ids) == 6


def test_after_continues_with_every_option(small: mtp_spec.LM) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 6, "stop_token_ids": [7, 9], "seed": 2}
    first = small.stream([4, 2, 8] * 24, **options)
    list(first)
    longer = [*[4, 2, 8] * 24, *first.result.token_ids, 5]
    following = small.stream(longer, after=first, **options)
    list(following)
    assert (following.result.stats.reused_tokens > 0) == (small.technique == "batched")
    assert everything(following.result) == everything(small.generate(longer, speculation=None, **options))


def test_on_the_command_line(lm: mtp_spec.LM, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["generate", "The fox", "--raw", "--seed", "3", "--max-new-tokens", "20", "--json"]
    main([*common, "--ignore-eos"])
    whole = json.loads(capsys.readouterr().out)
    assert len(whole["token_ids"]) == 20
    token = whole["token_ids"][6]
    main([*common, "--ignore-eos", "--stop-token-ids", f"{token},0", "--min-new-tokens", "0"])
    assert json.loads(capsys.readouterr().out)["token_ids"] == whole["token_ids"][: whole["token_ids"].index(token)]
    main([*common, "--min-new-tokens", "20", "--stop", "<|user|>"])
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) == 20
    wrong = ((["--stop-token-ids", "a"], "--stop-token-ids"), (["--min-new-tokens", "21"], "min_new_tokens"))
    for arguments, name in wrong:
        with pytest.raises(SystemExit) as stopped:
            main([*common, *arguments])
        assert stopped.value.code == 2
        assert name in capsys.readouterr().err
