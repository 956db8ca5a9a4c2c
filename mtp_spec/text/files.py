"""The small files next to a tokenizer: settings, special tokens, end-of-sequence tokens and chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtp_spec.model.errors import CheckpointError
from mtp_spec.model.files.json_object import read_object

CONFIG = "tokenizer_config.json"
# the names that every template may use; a folder may add others that end with _token
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# the model's sequences begin and end with these, so the vocabulary must have them
NEEDED = ("bos_token", "eos_token")


def read_json(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, an empty one if there is no such file."""
    return read_object(file) if file.is_file() else {}


def read_config(folder: Path) -> dict[str, Any]:
    """Returns tokenizer_config.json, with special_tokens_map.json if the former lists no tokens of its own."""
    config = read_json(folder / CONFIG)
    if config.get("added_tokens_decoder") is None:
        config |= read_json(folder / "special_tokens_map.json")
    for name in ("add_bos_token", "add_eos_token", "split_special_tokens"):
        if not isinstance(config.get(name, False), bool | None):
            raise CheckpointError(f"{folder / CONFIG}: {name} is {config[name]!r}, allowed are true and false")
    if not isinstance(config.get("tokenizer_class", ""), str | None):
        raise CheckpointError(f"{folder / CONFIG}: tokenizer_class is {config['tokenizer_class']!r}: give a name")
    return config


def special_tokens(config: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Returns the texts of named special tokens, as chat templates use them."""
    others = [
        key for key, value in config.items()
        if key.endswith("_token")
        and (isinstance(value, str) or (isinstance(value, dict) and value.get("__type") == "AddedToken"))
    ]  # fmt: skip
    found = {}
    for name in dict.fromkeys([*NAMED, *others]):
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if value is not None and not isinstance(text, str):
            raise CheckpointError(f"{folder / CONFIG}: {name} is {value!r}: a text is needed")
        if text is not None:
            found[name] = text
    extra = config.get("extra_special_tokens")
    return found | (extra_named(extra, folder) if isinstance(extra, dict) else {})


def extra_named(extra: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Returns the texts of extra_special_tokens that have names."""
    texts = {}
    for name, value in extra.items():
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise CheckpointError(f"{folder / CONFIG}: extra_special_tokens.{name} is {text!r}: a text is needed")
        texts[name] = text
    return texts


def extra_listed(config: Mapping[str, Any], folder: Path) -> list[str]:
    """Returns the texts of special tokens without names."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        return []
    texts: list[Any] = [None]
    if isinstance(extra, list):
        texts = [one.get("content") if isinstance(one, dict) else one for one in extra]
    if not all(isinstance(text, str) for text in texts):
        raise CheckpointError(f"{folder / CONFIG}: extra_special_tokens is {extra!r:.80}: a list of texts is needed")
    return texts


def end_ids(folder: Path, vocab_size: int | None = None) -> frozenset[int]:
    """Returns the end-of-sequence tokens of generation_config.json.

    Raises:
        CheckpointError: they are not ids, or are beyond a vocabulary of `vocab_size`.
    """
    file = folder / "generation_config.json"
    given = read_json(file).get("eos_token_id")
    ids = [] if given is None else given if isinstance(given, list) else [given]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise CheckpointError(f"{file}: eos_token_id is {given!r}: give an id or a list of ids")
        if vocab_size is not None and token >= vocab_size:
            raise CheckpointError(
                f"{file}: eos_token_id {token} is beyond the vocabulary of {vocab_size} that config.json states: no "
                "text could end with it; correct the id"
            )
    return frozenset(ids)


def read_templates(config: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Returns the chat templates by name; a single one is called default.

    Files, chat_template.jinja and those in additional_chat_templates/, replace what tokenizer_config.json has, as in
    transformers.
    """
    found = [("default", folder / "chat_template.jinja")] if (folder / "chat_template.jinja").is_file() else []
    others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    named = dict([*found, *((file.name.removesuffix(".jinja"), file) for file in others)])
    if named:
        return {name: _read_text(file) for name, file in named.items()}
    return _configured(config.get("chat_template"), folder / CONFIG)


def _configured(given: Any, file: Path) -> dict[str, str]:
    if given is None:
        return {}
    named: dict[Any, Any] = {"default": given}
    if isinstance(given, list):
        if not all(isinstance(one, dict) for one in given):
            raise CheckpointError(f'{file}: chat_template lists {given!r:.60}: give {{"name": ..., "template": ...}}')
        named = {one.get("name"): one.get("template") for one in given}
    elif isinstance(given, dict):
        named = given
    if not all(isinstance(name, str) and isinstance(text, str) for name, text in named.items()):
        raise CheckpointError(f"{file}: chat_template is no text, nor are it templates with names: download it again")
    return named


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not a readable template ({error}): download it again") from error
