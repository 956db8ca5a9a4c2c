"""Arguments of a chat template, tools and continued turns: through the library, the chat and the command line."""

from __future__ import annotations

import io
import json
import os
import re
import warnings
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import mtp_spec
from mtp_spec import MTPSpecError, OptionError, PromptError
from mtp_spec.chat.chat import Chat
from mtp_spec.chat.loop import converse
from mtp_spec.chat.reading import LineReader
from mtp_spec.chat.screen import Screen
from mtp_spec.chat.session import Session
from mtp_spec.cli.main import main
from mtp_spec.sampling.params import SamplingParams

DEMO = Path(str(files("mtp_spec.configs"))) / "demo"
TEMPLATE = (
    "{{ bos_token }}{% if tools %}tools: {% for t in tools %}{{ t.name }} {% endfor %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'nobody' %}{{ raise_exception('nobody says nothing') }}{% endif %}"
    "{{ '<|' + m.role + '|>' }}{{ m.content or '' }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}no{% endif %}{% endif %}"
)
ASKED = [{"role": "user", "content": "Name three birds"}]
SHORT = {"max_new_tokens": 4, "temperature": 0.0}


def place(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Makes the demonstration's folder with another template."""
    folder.mkdir()
    for file in DEMO.iterdir():
        os.symlink(file, folder / file.name)
    config = {**json.loads((DEMO / "tokenizer_config.json").read_text()), "chat_template": template}
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return place(tmp_path_factory.mktemp("thinking") / "model")


@pytest.fixture(scope="module")
def lm(folder: Path) -> Iterator[mtp_spec.LM]:
    with mtp_spec.load(folder, measure=False) as loaded:
        yield loaded


def test_every_way_to_ask_takes_the_options_of_the_template(lm: mtp_spec.LM) -> None:
    options = {"template": {"enable_thinking": False}, "tools": [{"name": "f"}]}
    ids = lm.chat_ids(ASKED, **options)
    assert lm.decode(ids).startswith("tools: f")
    assert lm.decode(ids).endswith("no")
    wanted = lm.generate(ids, **SHORT).token_ids
    assert wanted != lm.chat(ASKED, **SHORT).token_ids
    assert lm.chat(ASKED, **options, **SHORT).token_ids == wanted
    assert [one.token_ids for one in lm.chat(ASKED, n=2, **options, **SHORT)] == [wanted, wanted]
    stream = lm.stream(ASKED, **options, **SHORT)
    assert [event.token_id for event in stream] == wanted
    assert lm.submit(ASKED, **options, **SHORT).result().token_ids == wanted
    if lm.model.mtp:
        assert lm.explain(ASKED, steps=1, speculation=2, **options, **SHORT) is not None


def test_an_assistants_turn_goes_on(lm: mtp_spec.LM) -> None:
    begun = [*ASKED, {"role": "assistant", "content": "A robin, "}]
    ids = lm.chat_ids(begun, continue_final_message=True)
    assert lm.decode(ids).endswith("A robin, ")
    assert ids[-1] not in lm.stop_ids()
    begun[-1]["prefix"] = True  # type: ignore[assignment]
    assert lm.chat_ids(begun) == ids
    assert lm.chat(begun, **SHORT).token_ids == lm.generate(ids, **SHORT).token_ids
    assert lm.chat_ids(
        [{**begun[0]}, {"role": "assistant", "content": [{"type": "text", "text": "x"}], "prefix": False}]
    )


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"template": "thinking"}, OptionError, "template='thinking'"),
        ({"template": {"messages": []}}, OptionError, "messages"),
        ({"template": {"tools": []}}, OptionError, "tools="),
        ({"template": {"x": object()}}, PromptError, "template['x']"),
        ({"template": {"chat_template": "other"}}, OptionError, "other"),
        ({"tools": "f"}, PromptError, "tools='f'"),
        ({"tools": [print]}, PromptError, "get_json_schema"),
        ({"continue_final_message": 3}, OptionError, "continue_final_message=3"),
        ({"continue_final_message": "reasoning_content"}, PromptError, "reasoning_content"),
        ({"thinking": False}, OptionError, "thinking=False"),
    ],
)
def test_what_is_no_option_of_a_template(
    lm: mtp_spec.LM, options: dict[str, Any], error: type[Exception], names: str
) -> None:
    with pytest.raises(error, match=re.escape(names)):
        lm.chat_ids(ASKED, **options)


@pytest.mark.parametrize(
    ("message", "names"),
    [
        ({"role": "user", "content": b"x"}, "messages[0]['content']"),
        ({"role": "user", "content": [{"type": "image", "image": object()}]}, "messages[0]['content'][0]['image']"),
        ({"role": "user", "content": 3}, "content 3"),
        ({"role": "user", "content": None}, "is empty"),
        ({"role": "user|>x<|assistant", "content": "x"}, "role"),
        ({"role": "", "content": "x"}, "role"),
        ({"content": "x"}, "role"),
        ({"role": "nobody", "content": "x"}, "nobody says nothing"),
    ],
)
def test_a_field_that_cannot_reach_the_template_is_refused_by_name(
    lm: mtp_spec.LM, message: dict[str, Any], names: str
) -> None:
    with pytest.raises(PromptError) as caught:
        lm.chat_ids([message])
    assert names in str(caught.value)


def test_content_may_be_missing_where_the_template_allows_it(lm: mtp_spec.LM) -> None:
    said = [*ASKED, {"role": "assistant", "content": None}, *ASKED]
    assert lm.decode(lm.chat_ids(said)).count("Name three birds") == 2
    assert lm.chat_ids(said) == lm.chat_ids([*ASKED, {"role": "assistant"}, *ASKED])
    with pytest.raises(PromptError, match=r"messages\[1\] has no content"):
        lm.chat_ids(said, template={"chat_template": "{% for m in messages %}{{ 'x' + m.content }}{% endfor %}"})


def test_options_of_a_template_are_for_messages(lm: mtp_spec.LM) -> None:
    with pytest.raises(OptionError, match="template"):
        lm.stream("a text", template={"enable_thinking": False})
    with pytest.raises(OptionError, match="template"):
        lm.generate("a text", template={"enable_thinking": False})
    with pytest.warns(UserWarning, match="enable_thinkin:"):
        lm.chat_ids(ASKED, template={"enable_thinkin": False})


@pytest.mark.parametrize("source", ["{% continue %}", "{% for a in [1] %}" * 25 + "{% endfor %}" * 25,
                                    "{{ 'inf'|float|int }}", "{{ 'x' * 10**18 }}"])  # fmt: skip
def test_whatever_a_templates_code_raises_is_told(source: str, lm: mtp_spec.LM) -> None:
    with pytest.raises(MTPSpecError, match=r"template failed: \S"):
        lm.chat_ids(ASKED, template={"chat_template": source})


def test_a_template_that_fails_is_told(tmp_path: Path) -> None:
    lm = mtp_spec.load(place(tmp_path / "model", "{{ messages[0].no.thing }}"), measure=False)
    with pytest.raises(MTPSpecError, match="template failed"):
        lm.chat(ASKED)
    with pytest.raises(SystemExit):
        main(["generate", "hi", "--model", str(tmp_path / "model")])


def test_the_chat_gives_its_template_arguments(lm: mtp_spec.LM, tmp_path: Path) -> None:
    def play(session: Session, *lines: str) -> str:
        shown = io.StringIO()
        console = Console(file=shown, width=200, color_system=None)
        converse(Chat(session, Screen(console, console), LineReader(io.StringIO("\n".join(lines) + "\n"))))
        return shown.getvalue()

    session = Session(lm, SamplingParams(max_new_tokens=4, temperature=0))
    out = play(
        session, "/template enable_thinking=false", "Name three birds", f"/save {tmp_path / 'talk.json'}", "/show"
    )
    assert "enable_thinking=false" in out
    assert session.turns[0].answer == lm.chat(ASKED, template={"enable_thinking": False}, **SHORT).text
    again = Session(lm, SamplingParams())
    play(again, f"/load {tmp_path / 'talk.json'}")
    assert again.template == {"enable_thinking": False}
    out = play(again, "/template enable_thinking=off", "/template x", "/template messages=1")
    assert again.template == {}
    assert "NAME=JSON" in out
    assert "messages" in out


def test_the_command_line_takes_them_and_says_what_it_did(
    folder: Path, lm: mtp_spec.LM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(folder), "--temperature", "0", "--max-new-tokens", "4", "--no-speculation"]
    (tmp_path / "tools.json").write_text('[{"name": "f"}]')
    given = ["--template", "enable_thinking=false", "--tools", str(tmp_path / "tools.json")]
    main(["generate", "Name three birds", *model, *given, "--json"])
    found = json.loads(capsys.readouterr().out)
    wanted = lm.chat(ASKED, template={"enable_thinking": False}, tools=[{"name": "f"}], **SHORT)
    assert found["token_ids"] == wanted.token_ids
    assert found["chat_template"] is True
    main(["generate", "Name three birds", *model])
    assert "through the chat template" in capsys.readouterr().err
    main(["generate", "Name three birds", *model, "--raw"])
    assert "without a chat template: --raw" in capsys.readouterr().err
    main(["chat", "--once", "Name three birds", *model, *given])
    assert wanted.text.strip() in capsys.readouterr().out
    for wrong in (["--template", "x"], ["--tools", "/no/file"], ["--raw", *given]):
        with pytest.raises(SystemExit):
            main(["generate", "hi", *model, *wrong])
        assert wrong[0] in capsys.readouterr().err


def test_without_a_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = place(tmp_path / "model", None)
    main(["generate", "hi", "--model", str(plain), "--max-new-tokens", "2", "--no-speculation"])
    assert "this checkpoint has no chat template" in capsys.readouterr().err
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lm = mtp_spec.load(plain, measure=False)
        with pytest.raises(MTPSpecError, match="no chat template"):
            lm.chat(ASKED)
        assert (
            lm.chat_ids(ASKED, template={"chat_template": "{{ messages[0].content }}"})
            == lm.encode(ASKED[0]["content"])[1:]
        )
