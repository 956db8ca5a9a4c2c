"""`defaults="checkpoint"`: what generation_config.json says of sampling, for options that the caller leaves out."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

import mtp_spec
import tiny
from lms import lm_of
from mtp_spec import CheckpointError, OptionError, SamplingParams
from mtp_spec.chat import loop
from mtp_spec.cli.main import main
from mtp_spec.sampling.defaults import Defaults

MAKERS = {"do_sample": True, "temperature": 0.3, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.2,
          "eos_token_id": 1}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny.make(tmp_path_factory.mktemp("tiny") / "model", seed=1).folder
    (made / "generation_config.json").write_text(json.dumps(MAKERS))
    return made


def found(tmp_path: Path, given: Any) -> dict[str, Any]:
    file = tmp_path / "generation_config.json"
    file.write_text(given if isinstance(given, str) else json.dumps(given))
    return Defaults(file, "checkpoint", 96).applied({})


def test_the_makers_defaults_hold_where_the_caller_says_nothing(folder: Path) -> None:
    lm, made = mtp_spec.load(folder, max_batch=2), mtp_spec.load(folder, defaults="checkpoint", max_batch=2)
    common: dict[str, Any] = {"max_new_tokens": 16, "seed": 3}
    spelled = {"temperature": 0.3, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.2}
    expected = lm.generate([4, 2], **common, **spelled).token_ids
    assert expected != lm.generate([4, 2], **common).token_ids
    for shape in (None, 3):
        ways = [lm.generate([4, 2], defaults="checkpoint", speculation=shape, **common),
                made.generate([4, 2], speculation=shape, **common), made.generate([[4, 2]], **common)[0],
                made.submit([4, 2], speculation=shape, **common).result()]  # fmt: skip
        stream = made.stream([4, 2], speculation=shape, **common)
        list(stream)
        assert [out.token_ids for out in [*ways, stream.result]] == [expected] * 5
    # what the caller gives wins, and the library's own can be had back
    hot = {**common, **spelled, "temperature": 1.5}
    assert made.generate([4, 2], temperature=1.5, **common).token_ids == lm.generate([4, 2], **hot).token_ids
    own = made.generate([4, 2], defaults="library", **common).token_ids
    assert own == lm.generate([4, 2], **common).token_ids


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"eos_token_id": 1, "max_length": 20, "transformers_version": "4"}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0, "top_p": 0.9}),
        ({"top_p": 0.95}, {"temperature": 1.0, "top_p": 0.95}),
        ({"temperature": 0.6, "top_k": None}, {"temperature": 0.6}),
        ({"repetition_penalty": 1.05}, {"repetition_penalty": 1.05}),
        ({"presence_penalty": 1.5, "frequency_penalty": 0.1}, {"presence_penalty": 1.5, "frequency_penalty": 0.1}),
        ({"max_new_tokens": 9, "min_new_tokens": 2}, {"max_new_tokens": 9, "min_new_tokens": 2}),
        ({"stop_strings": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"suppress_tokens": [3, 5]}, {"logit_bias": {3: -math.inf, 5: -math.inf}}),
        ({"num_beams": 1, "typical_p": 1.0, "eta_cutoff": 0.0, "bad_words_ids": None, "min_length": 0}, {}),
    ],
    ids=str,
)
def test_what_a_file_says(tmp_path: Path, given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found(tmp_path, given) == expected
    SamplingParams(**expected)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("{", "JSON"),
        ("[]", "no object"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": True}, "temperature=True"),
        ('{"temperature": NaN}', "temperature=nan"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": 1.5}, r"top_k=1\.5"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"do_sample": "yes"}, "do_sample='yes'"),
        ({"do_sample": 1}, "do_sample=1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"stop_strings": [""]}, "stop="),
        ({"suppress_tokens": [96]}, "logit_bias"),
        ({"suppress_tokens": 3}, "suppress_tokens=3"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size=3"),
        ({"typical_p": 0.9}, "typical_p"),
        ({"forced_eos_token_id": 1}, "forced_eos_token_id=1"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
    ],
    ids=str,
)
def test_impossible_values_are_named_with_their_file(tmp_path: Path, given: Any, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"generation_config.json.*{name}"):
        found(tmp_path, given)


def test_a_bad_file_matters_to_those_who_ask_for_it(folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "model"))
    file = copied / "generation_config.json"
    file.write_text(json.dumps({**MAKERS, "top_p": 7}))
    lm = mtp_spec.load(copied)
    assert len(lm.generate([1], max_new_tokens=2, seed=0).token_ids) == 2
    with pytest.raises(CheckpointError, match=r"generation_config\.json: top_p=7"):
        lm.generate([1], defaults="checkpoint")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: top_p=7"):
        mtp_spec.load(copied, defaults="checkpoint")
    file.unlink()
    with pytest.raises(OptionError, match=r"has no generation_config\.json"):
        mtp_spec.load(copied, defaults="checkpoint")
    with pytest.raises(OptionError, match="defaults='makers'"):
        mtp_spec.load(copied, defaults="makers")
    with pytest.raises(OptionError, match="defaults=None"):
        lm.generate([1], defaults=None)
    with pytest.raises(OptionError, match="this model has no folder"):
        lm_of(lm.model, None, 64).generate([1], defaults="checkpoint")


def test_on_the_command_line_and_in_a_chat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    common = ["generate", "The fox", "--json", "--seed", "3", "--max-new-tokens", "60"]
    texts = []
    for more in (["--defaults", "checkpoint"], ["--temperature", "0.7"], []):
        main([*common, *more])
        texts.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert texts[0] == texts[1] != texts[2]
    asked: list[SamplingParams] = []
    monkeypatch.setattr(loop, "open_chat", lambda session, **_: asked.append(session.params))
    monkeypatch.setattr(loop, "greet", lambda chat: None)
    monkeypatch.setattr(loop, "converse", lambda chat: None)
    for options in ({"defaults": "checkpoint"}, {"defaults": "checkpoint", "temperature": 0.2}, {}):
        loop.run_chat(mtp_spec.load(measure=False), options)
    assert [params.temperature for params in asked] == [0.7, 0.2, 0.8]
