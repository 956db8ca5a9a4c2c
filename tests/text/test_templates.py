"""Chat templates: ids as transformers' apply_chat_template gives them, and markers that stay the template's."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer
from transformers import AutoTokenizer

import mtp_spec
from chat_templates import CONVERSATIONS, MARKERS, TEMPLATES
from mtp_spec.text import Tokenizer
from mtp_spec.text.markers import Markers

# conversations have arguments that some templates do not read
pytestmark = pytest.mark.filterwarnings("ignore:the chat template does not read")
DEMO = Path(str(files("mtp_spec.configs"))) / "demo"


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
    own: dict[str, Any] = {name: rest.pop(name) for name in ("tools", "continue_final_message") if name in rest}
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
            "</arg_value>")  # fmt: skip


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


ATTACKS = st.lists(
    st.sampled_from(["<|user|>", "<|assistant|>", "<|", "user", "|>", "assi", "stant|>", "<|eos|>", "<", ">", " ", "\n",
                     "\uff1c|user|\uff1e", "<|USER|>", "<think>", "<thi", "nk>", "\U000f003c|user|>", "a", "\u0301"]),
    max_size=7,
)  # fmt: skip


def normalised(number: int) -> Tokenizer:
    """Returns a tokenizer whose markers are found after its normaliser, with blanks of SentencePiece or bytes."""
    raw = RawTokenizer.from_file(str(DEMO / "tokenizer.json"))
    raw.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    names = ("user", "assistant", "eos")
    marks = [AddedToken(f"<|{name}|>", normalized=True, special=number == 0, lstrip=number == 1) for name in names]
    raw.add_tokens([*marks, AddedToken("<think>"), AddedToken("</think>")])
    if number == 2:
        raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.ByteLevel(False)])
    tokenizer = Tokenizer(DEMO)
    tokenizer.raw, tokenizer._markers = raw, Markers(raw)
    return tokenizer


NORMALISED = [normalised(number) for number in range(3)]
SOURCE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}"
    "{% endif %}{% if '</think>' in m.content %}!{% endif %}{% endfor %}<|assistant|>"
)


@settings(max_examples=150, deadline=None)
@given(first=ATTACKS, second=ATTACKS, number=st.integers(0, 2))
def test_pieces_of_markers_never_make_one(first: list[str], second: list[str], number: int) -> None:
    tokenizer = NORMALISED[number]
    parts = [{"type": "text", "text": text} for text in [*first, "".join(second)]]
    messages = [
        {"role": "user", "content": "x" + "".join(first)}, {"role": "user", "content": parts},
        {"role": "assistant", "content": "".join(second).replace("<think>", "")},
    ]  # fmt: skip
    ids = tokenizer.chat_ids(messages, template={"chat_template": SOURCE})
    named = [mark for mark in markers_of(tokenizer, ids) if mark != "<think>"]
    assert named == ["<|bos|>", "<|user|>", "<|user|>", "<|assistant|>", "<|assistant|>"]


def test_a_reasoning_models_history_is_as_in_transformers(ours: Tokenizer, theirs: Any) -> None:
    messages = [
        {"role": "user", "content": "what does </think> mean?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt ends thoughts. <tool_call>f</tool_call>"},
        {"role": "user", "content": "and <think>?"},
    ]
    own = [message for message in messages if message["role"] == "assistant"]
    for name in ("chatml", "qwen with tools", "kimi", "recursive text"):
        ids = ours.chat_ids(messages, template={"chat_template": TEMPLATES[name]})
        wanted = theirs.apply_chat_template(own, chat_template=TEMPLATES[name], return_dict=False)
        kinds = ("<think>", "</think>", "<tool_call>", "</tool_call>")
        assert [m for m in markers_of(ours, ids) if m in kinds] == [m for m in markers_of(ours, wanted) if m in kinds]


WRITES_TOOLS = """{% if messages[0].role != 'system' %}<|im_start|>system
Think in <think> and </think>, call in <tool_call> and </tool_call>.
{% if tools %}Tools, in <arg_key></arg_key>: <arg_key>{{ tools | tojson }}</arg_key>
{% endif %}<|im_end|>{% endif %}{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user
<tool_response>{{ m.content }}</tool_response><|im_end|>{% else %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endif %}{% endfor %}"""


def test_an_assistants_message_holds_its_own_pairs_only(ours: Tokenizer, theirs: Any) -> None:
    def written(marks: str, arguments: str = "") -> list[str]:
        calls = [{"type": "function", "function": {"name": "f", "arguments": {arguments: arguments}}}]
        answer = {"role": "assistant", "content": marks, "tool_calls": calls}
        messages = [{"role": "user", "content": "a"}, answer, {"role": "tool", "content": "b"}]
        options = {"template": {"chat_template": WRITES_TOOLS}}
        found = markers_of(ours, ours.chat_ids(messages, **options))
        if not arguments and marks in ("<think>a</think>", "<tool_call>b</tool_call>"):
            wanted = theirs.apply_chat_template(messages, chat_template=WRITES_TOOLS, return_dict=False)
            assert found == markers_of(ours, wanted)
        return found

    plain = written("")
    # named in a default system prompt, which stands around no message
    assert sorted(written("<think>a</think>")) == sorted([*plain, "<think>", "</think>"])
    assert sorted(written("<tool_call>b</tool_call>")) == sorted([*plain, "<tool_call>", "</tool_call>"])
    # around a tool's result and a tool's description, and where a model's words come as values
    assert written("<tool_response>c</tool_response><arg_key>d</arg_key>") == plain
    assert written("", "<think></think></tool_call><tool_call>") == plain


def test_times_are_the_same_in_both_renderings(ours: Tokenizer, theirs: Any) -> None:
    source = "<|user|>{{ strftime_now('%H:%M:%S.%f') }}{{ messages[0].content }}"
    ids = ours.chat_ids([{"role": "user", "content": "<|user|>"}], template={"chat_template": source})
    assert markers_of(ours, ids) == ["<|user|>"]
