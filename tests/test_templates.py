"""Chat templates: ids as transformers' apply_chat_template gives them, and markers that stay the template's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as RawTokenizer
from transformers import AutoTokenizer

import mtp_spec
from chat_templates import CONVERSATIONS, MARKERS, TEMPLATES
from mtp_spec.text import Tokenizer

DEMO = Path(mtp_spec.__file__).parent.parent / "configs" / "demo"


def folder_with(folder: Path, special: bool = False, templates: Any = None, **config: Any) -> Path:
    """Writes the demonstration's tokenizer with the markers of many models; a third are not special, or all."""
    raw = RawTokenizer.from_file(str(DEMO / "tokenizer.json"))
    raw.add_tokens([
        AddedToken(marker, special=special or number % 3 == 0 or "begin" in marker, normalized=False)
        if marker not in ("<think>", "</think>") else AddedToken(marker, normalized=False)
        for number, marker in enumerate(MARKERS)
    ])  # fmt: skip
    folder.mkdir(exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    stored = json.loads((DEMO / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**stored, **config}))
    shutil.copy(DEMO / "config.json", folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_with(tmp_path_factory.mktemp("markers"))


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def both(ours: Tokenizer, theirs: Any, source: str, messages: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """Returns the ids that either makes, or None for an error."""
    try:
        wanted = theirs.apply_chat_template(messages, chat_template=source, return_dict=False, **options)
    except Exception:  # whatever a template raises
        wanted = None
    rest = dict(options)
    own = {name: rest.pop(name) for name in ("tools", "continue_final_message") if name in rest}
    own["add_generation_prompt"] = rest.pop("add_generation_prompt", False)
    try:
        got = ours.chat_ids(messages, template={**rest, "chat_template": source}, **own)
    except mtp_spec.MTPSpecError:
        got = None
    return got, wanted


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_transformers(name: str, ours: Tokenizer, theirs: Any) -> None:
    made = 0
    for kind, (messages, options) in CONVERSATIONS.items():
        got, wanted = both(ours, theirs, TEMPLATES[name], messages, options)
        assert got == wanted, kind
        made += wanted is not None
    assert made >= 2, "a template that refuses everything tests nothing"


def markers_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    added = tokenizer.raw.get_added_tokens_decoder()
    return [added[token].content for token in ids if token in added]


def asked_with(text: str, place: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns a conversation that holds a text in a place, and the options of its ids."""
    user, model = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
    if place == "user":
        return [{"role": "user", "content": f"a{text}b"}], {}
    if place == "system":
        return [{"role": "system", "content": f"{text} is"}, user], {}
    if place == "parts":
        half = len(text) // 2
        return [
            {"role": "user", "content": [{"type": "text", "text": part} for part in ("a" + text[:half], text[half:])]}
        ], {}
    if place == "assistant":
        return [user, {"role": "assistant", "content": f"{text}no"}, user], {}
    if place == "tool":
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        said = {"role": "assistant", "tool_calls": [call]}
        return [user, said, {"role": "tool", "name": text, "tool_call_id": text, "content": text}], {}
    if place == "tools":
        tool = {"type": "function", "function": {"name": "f", "description": text, "parameters": {text: text}}}
        return [user, model, user], {"tools": [tool]}
    return [user, model, user], {"template": {"date_string": text, "documents": [{"title": text, "text": "t"}]}}


TRIED = ("<|user|>", MARKERS[3], "<|im_start|>", "[INST]", "</think>", "<|eos|>", "<|endoftext|>", "<|role_sep|>")
PLACES = ("user", "system", "parts", "assistant", "tool", "tools", "argument")
# of an assistant's turn; an assistant's message may hold them
THOUGHTS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>",
            "</arg_value>", "<tool_response>", "</tool_response>")  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_no_message_makes_a_marker(name: str, place: str, ours: Tokenizer) -> None:
    for marker in TRIED:
        ids, texts = [], []
        for text in (marker, "w" * len(marker)):
            messages, options = asked_with(text, place)
            options["template"] = {**options.get("template", {}), "chat_template": TEMPLATES[name]}
            try:
                texts.append(ours.chat_text(messages, **options))
                ids.append(ours.chat_ids(messages, **options))
            except mtp_spec.MTPSpecError as error:
                if name == "looks at its own" and "cannot be told apart" in str(error):
                    return
                ids.append(None)
        thought = marker in THOUGHTS or (marker == "[INST]" and name != "mistral")  # pairs that open no turn here
        if ids[0] is None or (place == "assistant" and thought):
            continue
        assert markers_of(ours, ids[0]) == markers_of(ours, ids[1])
        assert ours.raw.decode(ids[0], skip_special_tokens=False) == texts[0]
