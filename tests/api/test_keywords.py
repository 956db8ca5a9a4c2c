"""Options of `LM`'s methods: typed by name, and a `SamplingParams` in place of the single ones."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, Literal, get_type_hints

import pytest
from typing_extensions import Unpack

import mtp_spec
from mtp_spec import LM, OptionError, SamplingParams, Speculation
from mtp_spec.chat.session import Session
from mtp_spec.distributed.consistency import request_facts
from mtp_spec.keywords import ChatIdsOptions, ChatOptions, GenerateOptions, StreamOptions, TemplateOptions
from mtp_spec.sampling.params import expanded_options
from mtp_spec.text import Tokenizer

PROMPT = "The fox went to"
ASKED = [{"role": "user", "content": "Name three birds"}]
SINGLE: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.9, "top_k": 40, "seed": 5, "frequency_penalty": 0.3}
PARAMS = SamplingParams(**SINGLE)
OTHERS = {"sampling": SamplingParams | None, "speculation": Speculation | Literal["auto"] | int | None,
          "defaults": Literal["library", "checkpoint"]}  # fmt: skip


@pytest.fixture(scope="module")
def lm() -> Iterator[LM]:
    with mtp_spec.load(max_batch=2, measure=False) as loaded:
        yield loaded


def test_the_types_have_the_fields_of_sampling_params_and_the_others() -> None:
    own = {field.name: get_type_hints(SamplingParams)[field.name] for field in fields(SamplingParams)}
    template = get_type_hints(TemplateOptions)
    assert get_type_hints(StreamOptions) == {**own, **OTHERS, **template}
    several = {**own, **OTHERS, "seed": int | Sequence[int] | None}
    assert get_type_hints(GenerateOptions) == several
    assert get_type_hints(ChatOptions) == {**several, **template}
    parameters = get_type_hints(Tokenizer.chat_ids)
    taken = list(inspect.signature(Tokenizer.chat_ids).parameters)[2:]
    assert get_type_hints(ChatIdsOptions) == {name: parameters[name] for name in taken}
    kinds = (GenerateOptions, ChatOptions, StreamOptions, TemplateOptions, ChatIdsOptions)
    assert not any(kind.__required_keys__ for kind in kinds)


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        (LM.generate, GenerateOptions),
        (LM.chat, ChatOptions),
        (LM.stream, StreamOptions),
        (LM.submit, StreamOptions),
        (LM.explain, StreamOptions),
        (LM.chat_ids, ChatIdsOptions),
    ],
)
def test_every_method_names_its_options(method: Any, kind: type) -> None:
    assert get_type_hints(method)["options"] == Unpack[kind]


@pytest.mark.parametrize("speculation", [None, 2])
def test_sampling_is_its_parameters_one_by_one(lm: LM, speculation: int | None) -> None:
    expected = lm.generate(PROMPT, speculation=speculation, **SINGLE)
    stream = lm.stream(PROMPT, sampling=PARAMS, speculation=speculation)
    assert [event.token_id for event in stream] == expected.token_ids
    ways = [lm.generate(PROMPT, sampling=PARAMS, speculation=speculation), stream.result,
            lm.submit(PROMPT, sampling=PARAMS, speculation=speculation).result()]  # fmt: skip
    assert [(way.token_ids, way.seed) for way in ways] == [(expected.token_ids, 5)] * 3
    answer = lm.chat(ASKED, speculation=speculation, **SINGLE)
    assert lm.chat(ASKED, sampling=PARAMS, speculation=speculation).token_ids == answer.token_ids
    assert lm.submit(ASKED, sampling=PARAMS, speculation=speculation).result().token_ids == answer.token_ids
    assert lm.generate(PROMPT, sampling=None, speculation=speculation, **SINGLE).token_ids == expected.token_ids


def test_sampling_in_lists_and_samples(lm: LM) -> None:
    texts = lm.generate([PROMPT, "The sea"], n=2, **SINGLE)
    again = lm.generate([PROMPT, "The sea"], n=2, sampling=PARAMS)
    assert [[one.token_ids for one in own] for own in again] == [[one.token_ids for one in own] for own in texts]
    assert [one.seed for one in again[0]] == [one.seed for one in texts[0]]
    drawn = lm.generate([PROMPT, PROMPT], sampling=SamplingParams(max_new_tokens=2))
    assert drawn[0].seed != drawn[1].seed
    assert [one.seed for one in lm.chat(ASKED, n=2, sampling=PARAMS)] == [one.seed for one in texts[0]]


def test_sampling_in_explain(lm: LM) -> None:
    given = lm.explain(PROMPT, steps=2, sampling=PARAMS, speculation=2)
    assert given.steps == lm.explain(PROMPT, steps=2, speculation=2, **SINGLE).steps


def test_sampling_says_all_and_leaves_nothing_to_defaults(lm: LM) -> None:
    assert lm.defaults.checkpoint() == {"temperature": 0.7}
    wanted = lm.generate(PROMPT, **SINGLE).token_ids
    assert lm.generate(PROMPT, sampling=PARAMS, defaults="checkpoint").token_ids == wanted
    with pytest.raises(OptionError, match="defaults='makers' is not possible"):
        lm.generate(PROMPT, sampling=PARAMS, defaults="makers")


def test_a_chat_draws_with_its_parameters(lm: LM) -> None:
    session = Session(lm, PARAMS, Speculation(2))
    draw, stream = session.ask(ASKED[0]["content"])
    assert [event.token_id for event in stream] == lm.chat(ASKED, **SINGLE).token_ids
    assert draw.params == PARAMS


@pytest.mark.parametrize("name", ["generate", "chat", "stream", "submit", "explain"])
def test_what_sampling_excludes_and_what_it_is(lm: LM, name: str) -> None:
    call = getattr(lm, name)
    prompt = ASKED if name == "chat" else PROMPT
    with pytest.raises(OptionError, match=r"temperature=0.5 is not possible beside sampling=SamplingParams") as caught:
        call(prompt, sampling=PARAMS, temperature=0.5)
    assert "leave sampling out" in str(caught.value)
    with pytest.raises(OptionError, match=r"seed=\[1, 2\] is not possible beside sampling="):
        call(prompt, sampling=PARAMS, seed=[1, 2])
    with pytest.raises(OptionError, match=r"sampling=\{'top_k': 1\} is not possible: allowed is mtp_spec.SamplingPara"):
        call(prompt, sampling={"top_k": 1})
    with pytest.raises(OptionError, match="unknown option 'samplng': did you mean 'sampling'"):
        call(prompt, samplng=PARAMS)
    with pytest.raises(OptionError, match="unknown option 'temprature': did you mean 'temperature'"):
        call(prompt, sampling=PARAMS, temprature=0.5)


def test_options_of_the_template_stand_beside_sampling(lm: LM) -> None:
    messages = [*ASKED, {"role": "assistant", "content": "A wren, "}]
    ids = lm.chat_ids(messages, continue_final_message=True, add_generation_prompt=False)
    wanted = lm.generate(ids, **SINGLE).token_ids
    assert lm.chat(messages, sampling=PARAMS, continue_final_message=True).token_ids == wanted
    with pytest.raises(OptionError, match=r"sampling=.* is unknown to chat_ids"):
        lm.chat_ids(ASKED, sampling=PARAMS)


def test_ranks_compare_what_a_sampling_says() -> None:
    """A function has no value to compare, but whether there is one differs."""
    plain = request_facts([[1]], expanded_options({"sampling": PARAMS}))
    processed = SamplingParams(**SINGLE, logits_processor=lambda ids, logits: logits)
    assert plain["temperature"] == "0.9"
    assert plain["logits_processor"] == "None"
    assert request_facts([[1]], expanded_options({"sampling": processed}))["logits_processor"] == "given"
