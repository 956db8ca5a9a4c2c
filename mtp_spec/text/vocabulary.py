"""Reads a folder's vocabulary into `tokenizers`: from tokenizer.json, tiktoken ranks or a SentencePiece model.

Code of the folder is never executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from warnings import warn

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mtp_spec.model.errors import CheckpointError
from mtp_spec.text.files import CONFIG, NEEDED, extra_listed, read_json
from mtp_spec.text.sentencepiece import read_sentencepiece
from mtp_spec.text.tiktoken import is_tiktoken, read_tiktoken

TOKENIZER = "tokenizer.json"
# vocabulary files in other formats: a folder with one of them is meant for text
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model")
UNREAD = ("tekken.json", "vocab.json", "vocab.txt", "merges.txt")
# model types whose tokenizer.json transformers uses unchanged, whatever class is named
AS_STORED = ("glm4_moe_lite", "glm4_moe", "kimi_k25")
REBUILT = ("LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer")
# further ones that transformers 5 builds from the vocabulary, which are not built here
NOT_REBUILT = (
    "BertTokenizer", "BlenderbotTokenizer", "CLIPTokenizer", "CodeGenTokenizer", "CodeLlamaTokenizer",
    "CohereTokenizer", "DebertaTokenizer", "GPTNeoXTokenizer", "GemmaTokenizer", "HerbertTokenizer", "LukeTokenizer",
    "MBart50Tokenizer", "NllbTokenizer", "OpenAIGPTTokenizer", "Qwen3_5Tokenizer", "ReformerTokenizer",
    "RobertaTokenizer", "SeamlessM4TTokenizer", "WhisperTokenizer",
)  # fmt: skip
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def vocabulary_file(folder: Path) -> Path | None:
    """Returns the file that a folder's vocabulary is read from, None if it has none.

    Raises:
        CheckpointError: it has one in an unsupported format.
    """
    ranks = sorted(folder.glob("*.tiktoken"))
    for file in (folder / TOKENIZER, folder / "tiktoken.model", *ranks, *(folder / name for name in SENTENCEPIECE)):
        if file.is_file():
            return file
    for name in UNREAD:
        if (folder / name).is_file():
            raise CheckpointError(
                f"{folder} has {name} and no {TOKENIZER}: save one beside it, once, with transformers: "
                f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
            )
    return None


def read_vocabulary(
    file: Path, config: Mapping[str, Any], named: Mapping[str, str]
) -> tuple[Tokenizer, Mapping[str, str]]:
    """Returns the tokenizer that transformers builds from the same files, and all named special tokens.

    Args:
        config: the contents of tokenizer_config.json.
        named: its special tokens.

    Raises:
        CheckpointError: the file cannot be read, or the settings name tokens that it lacks.
    """
    if file.name == TOKENIZER:
        raw = _read_json(file, config, named)
    elif is_tiktoken(file):
        raw = read_tiktoken(file, config)
    else:
        raw, own = read_sentencepiece(file, config)
        named = {**own, **named}
    for name in NEEDED:
        if name in named and raw.token_to_id(named[name]) is None:
            raise CheckpointError(
                f"{file.parent / CONFIG}: {name} is {named[name]!r}, which {file.name} does not have: correct either"
            )
    # a token with a name is special, whatever the vocabulary says of it
    for token in raw.get_added_tokens_decoder().values():
        if token.content in named.values() and not token.special:
            token.special = True
            raw.add_tokens([token])
    return raw, named


def _read_json(file: Path, config: Mapping[str, Any], named: Mapping[str, str]) -> Tokenizer:
    try:
        raw = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{file} is not a readable tokenizer ({error}): download it again") from error
    folder, tokens = file.parent, _listed(config, file, raw)
    rebuilt = _rebuilt(raw, file, config)
    if rebuilt is not None:
        tokens = tokens or raw.get_added_tokens_decoder()
        raw = rebuilt
    raw.no_truncation()
    raw.no_padding()
    if isinstance(raw.model, models.BPE):
        raw.model.dropout = None  # for training only: it splits text at random
    raw.encode_special_tokens = bool(config.get("split_special_tokens"))
    _add(raw, tokens, {*named.values(), *extra_listed(config, folder)}, folder)
    return raw


def _listed(config: Mapping[str, Any], file: Path, raw: Tokenizer) -> dict[int, AddedToken]:
    """Returns the added tokens of tokenizer_config.json by id; in older folders also those of added_tokens.json."""
    given, where = config.get("added_tokens_decoder"), f"{file.parent / CONFIG}: added_tokens_decoder"
    try:
        if given is None:
            known = {token.content for token in raw.get_added_tokens_decoder().values()}
            older, where = read_json(file.parent / "added_tokens.json"), str(file.parent / "added_tokens.json")
            given = {number: {"content": text} for text, number in older.items() if text not in known}
        numbered = sorted((int(number), token) for number, token in given.items())
        return {number: AddedToken(**token) for number, token in numbered}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where} holds what is no token ({error}): download it again") from error


def _add(raw: Tokenizer, tokens: Mapping[int, AddedToken], special: set[str], folder: Path) -> None:
    """Adds the tokens that tokenizer_config.json defines differently from tokenizer.json; the former wins."""
    present = {repr(token) for token in raw.get_added_tokens_decoder().values()}
    for number, token in tokens.items():
        if repr(token) in present:
            continue
        token.special = token.special or token.content in special
        is_new = raw.token_to_id(token.content) is None
        raw.add_tokens([token])
        if is_new and raw.token_to_id(token.content) != number:
            raise CheckpointError(
                f"{folder / CONFIG}: added_tokens_decoder gives {token.content!r} the id {number}, and {TOKENIZER} has "
                "neither this token nor its place: download both files again"
            )
    # an ordinary piece of the vocabulary becomes special; a missing token would get a new id
    plain = special - {token.content for token in raw.get_added_tokens_decoder().values()}
    raw.add_tokens([AddedToken(text, special=True) for text in sorted(plain) if raw.token_to_id(text) is not None])


def _rebuilt(raw: Tokenizer, file: Path, config: Mapping[str, Any]) -> Tokenizer | None:
    """Returns the tokenizer that transformers builds from the vocabulary for a few classes, None for the others.

    Those classes split text in their own way and use only vocabulary and post-processor of tokenizer.json.
    """
    model = read_json(file.parent / "config.json")
    name = str(config.get("tokenizer_class") or model.get("tokenizer_class") or "").removesuffix("Fast")
    if model.get("model_type") in AS_STORED or not isinstance(raw.model, models.BPE):
        return None
    if name in NOT_REBUILT:
        warn(
            f"{file.parent / CONFIG}: tokenizer_class is {name}, which transformers 5 builds from the vocabulary "
            f"alone; here {file.name} is used as it stands, so ids may differ from those there: compare them",
            stacklevel=7,
        )
    if name not in REBUILT:
        return None
    pieces = json.loads(raw.to_str())["model"]
    vocab, merges = pieces["vocab"], [tuple(m.split(" ") if isinstance(m, str) else m) for m in pieces["merges"]]
    prefix = config.get("add_prefix_space")
    if name == "LlamaTokenizer":
        if '"ByteLevel"' in file.read_text(encoding="utf-8"):
            return None
        prefix = prefix is None or prefix
        new = Tokenizer(models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True))
        legacy = config.get("legacy", False)
        scheme = "never" if not prefix else "always" if legacy else "first"
        new.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
        strip = [decoders.Strip(" ", 1, 0)] if prefix else []
        new.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    elif name == "GPT2Tokenizer":
        new = Tokenizer(models.BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix=""))
        new.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix))
        new.decoder = decoders.ByteLevel()
    else:
        new = Tokenizer(models.BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix=""))
        new.normalizer = normalizers.NFC()
        cut = pre_tokenizers.Split(Regex(QWEN2), behavior="isolated")
        new.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(bool(prefix), use_regex=False)])
        new.decoder = decoders.ByteLevel()
    if raw.post_processor is not None:
        new.post_processor = raw.post_processor
    return new
