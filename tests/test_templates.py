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
