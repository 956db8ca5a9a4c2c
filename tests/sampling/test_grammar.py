"""Texts that follow a grammar, with and without speculation."""

from __future__ import annotations

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import mtp_spec
from mtp_spec import OptionError, Speculation
from mtp_spec.acceptance import RULES
from mtp_spec.cli.main import main
from mtp_spec.sampling.grammar import Grammars

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "legs": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "quick", "shy"]}, "maxItems": 2},
    },
    "required": ["name", "legs", "tags"],
    "additionalProperties": False,
}
SENTENCE = r"(yes|no), because [a-z ]{5,30}\."
FORMATS: dict[str, dict[str, Any]] = {
    "schema": {"type": "json_schema", "schema": SCHEMA},
    "regex": {"type": "regex", "regex": SENTENCE},
    "lark": {"type": "lark", "lark": 'start: ("fox" | "owl") (" and " ("fox" | "owl"))* "."'},
}
SHAPES: list[Any] = ["auto", Speculation(branching=(3, 2, 1))]
QUESTION = [{"role": "user", "content": "Describe a fox"}]
installed = pytest.mark.skipif(find_spec("llguidance") is None, reason="mtp-spec[grammar] is not installed")


@pytest.fixture(scope="module")
def lm() -> mtp_spec.LM:
    return mtp_spec.load()


def follows(kind: str, text: str) -> None:
    if kind == "schema":
        value = json.loads(text)
        assert set(value) == {"name", "legs", "tags"}
        assert len(value["name"]) <= 12
        assert 0 <= value["legs"] <= 99
        assert set(value["tags"]) <= {"red", "quick", "shy"}
    else:
        assert re.fullmatch(SENTENCE if kind == "regex" else r"(fox|owl)( and (fox|owl))*\.", text)


@installed
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_text_follows_the_grammar_and_stops(lm: mtp_spec.LM, kind: str, temperature: float) -> None:
    options: dict[str, Any] = {"response_format": FORMATS[kind], "temperature": temperature, "seed": 3,
                               "max_new_tokens": 150, "frequency_penalty": 0.5}  # fmt: skip
    plain = lm.chat(QUESTION, speculation=None, **options)
    follows(kind, plain.text)
    assert plain.finish_reason == "stop"
    for shape in SHAPES:
        out = lm.chat(QUESTION, speculation=shape, **options)
        assert (out.token_ids, out.text, out.finish_reason) == (plain.token_ids, plain.text, "stop")
    assert out.stats.tokens_per_step > 1.2


@installed
@pytest.mark.parametrize("name", RULES)
def test_every_rule_follows_it(lm: mtp_spec.LM, name: str) -> None:
    shape = Speculation(branching=(1, 1, 1) if RULES[name].chains_only else (2, 2), acceptance=name)
    out = lm.chat(QUESTION, speculation=shape, response_format=FORMATS["regex"], temperature=1.0, seed=0)
    follows("regex", out.text)
    assert out.finish_reason == "stop"
    assert out.stats.accepted > 0


@installed
def test_streams_samples_and_further_processors(lm: mtp_spec.LM) -> None:
    options: dict[str, Any] = {"response_format": {"type": "regex", "regex": "[0-9]{4}"}, "temperature": 1.5}
    prompt = "In the year "
    nines = [token for token in range(lm.config.vocab_size) if "9" in lm.decode([token])]

    def no_nine(ids: list[int], logits: Any) -> Any:
        logits[nines] = -float("inf")
        return logits

    three = lm.generate(prompt, n=3, seed=0, **options)
    assert all(re.fullmatch("[0-9]{4}", one.text) for one in three)
    assert "".join(event.text for event in lm.stream(prompt, seed=three[2].seed, **options)) == three[2].text
    without = lm.generate(prompt, n=2, seed=0, logits_processor=no_nine, **options)
    assert all(re.fullmatch("[0-8]{4}", one.text) for one in without)


@installed
def test_usual_layouts_of_json_are_in_the_grammar(lm: mtp_spec.LM) -> None:
    """The bound on blanks leaves every way in which json.dumps writes."""
    assert lm.tokenizer is not None
    processor = Grammars(lm.tokenizer, lm.config.vocab_size, lm.stop_ids()).processor({"type": "json_object"})
    for indent in (None, 2, 4):
        for separators in (None, (",", ":")):
            text = json.dumps({"a": [1, {"b": None}], "c": {}}, indent=indent, separators=separators)
            state = processor.start([])
            for token in lm.tokenizer.raw.encode(text, add_special_tokens=False).ids:
                state = processor.advance(state, token)
            assert state.matcher.is_accepting()


@installed
@pytest.mark.parametrize(
    "value",
    [
        "json",
        {"type": "yaml"},
        {"type": "regex"},
        {"type": "json_object", "schema": {}},
        {"type": "json_schema", "schema": "{}"},
        {"type": ["regex"]},
        {"type": "json_schema", "schema": {"type": "odd"}},
        {"type": "json_schema", "schema": {"const": b"a"}},
        {"type": "regex", "regex": "[a"},
        {"type": "lark", "lark": "start: missing"},
    ],
    ids=str,
)
def test_what_is_no_grammar_is_refused(lm: mtp_spec.LM, value: Any) -> None:
    with pytest.raises(OptionError, match="response_format"):
        lm.generate("x", response_format=value)


def test_without_the_package_its_name_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = mtp_spec.load()  # one that has not compiled a grammar
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(OptionError, match=r"pip install 'mtp-spec\[grammar\]'"):
        lm.generate("x", response_format={"type": "json_object"})


@installed
def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    main(["generate", "Describe a fox", "--json-schema", str(file), "--frequency-penalty", "0.5"])
    follows("schema", capsys.readouterr().out)
    main(["generate", "Is a fox red?", "--regex", SENTENCE])
    follows("regex", capsys.readouterr().out.strip())
    file.write_text("{")
    with pytest.raises(SystemExit):
        main(["generate", "x", "--json-schema", str(file)])
    assert "--json-schema" in capsys.readouterr().err
