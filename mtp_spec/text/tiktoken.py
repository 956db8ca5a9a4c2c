"""Reads tiktoken ranks (tiktoken.model of Moonlight and Kimi) as a tokenizer of `tokenizers`.

A file has one token a line, in base64, with its rank, which is its id. The regular expression that splits text into
words is `pat_str` in the folder's Python code: it is read from there as text, and the code is not run.
"""

from __future__ import annotations

import ast
from base64 import b64decode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from mtp_spec.model.errors import CheckpointError
from mtp_spec.text.files import CONFIG

PATTERN = "pat_str"


def is_tiktoken(file: Path) -> bool:
    """Whether a file contains ranks; a SentencePiece model may have the same name."""
    if file.suffix == ".tiktoken" or file.name == "tiktoken.model":
        return True
    with file.open("rb") as opened:
        try:
            _token(opened.readline())
        except ValueError:
            return False
    return True


def read_tiktoken(file: Path, config: Mapping[str, Any]) -> Tokenizer:
    """Returns the tokenizer of a file of ranks, with the added tokens of tokenizer_config.json.

    Raises:
        CheckpointError: a line is not a rank, no pattern is found, or an added token is invalid.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            ranks.update([_token(line)] if line else [])
        except ValueError as error:
            raise CheckpointError(f"{file}, line {number} is no token and rank ({error}): download it again") from error
    pattern = _pattern(file.parent)
    added = _added(config, file.parent)
    letters = _letters()
    vocab = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = [("".join(letters[byte] for byte in a), "".join(letters[byte] for byte in b)) for a, b in _merges(ranks)]
    taken = set(vocab.values())
    for number, token in added.items():
        if number in taken or token.content in vocab:
            raise CheckpointError(
                f"{file.parent / CONFIG}: added_tokens_decoder gives {token.content!r} the id {number}, and "
                f"{file.name} has that token or id already: download both files again"
            )
        vocab[token.content] = number
    raw = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    try:
        cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{file.parent}: {PATTERN} is no regular expression ({error}): {pattern!r}") from error
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    raw.add_tokens(list(added.values()))
    return raw


def _token(line: bytes) -> tuple[bytes, int]:
    token, rank = line.split()
    return b64decode(token, validate=True), int(rank)


def _added(config: Mapping[str, Any], folder: Path) -> dict[int, AddedToken]:
    given = config.get("added_tokens_decoder") or {}
    try:
        # tiktoken matches them before anything else
        return {int(number): AddedToken(**{**token, "normalized": False}) for number, token in given.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / CONFIG}: added_tokens_decoder holds what is no token ({error}): download it again"
        ) from error


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Returns the pair that forms each token, in the order of merging."""
    pairs = []
    for token, rank in ranks.items():
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(ranks[a], ranks[b], a, b) for a, b in halves if a in ranks and b in ranks]
        pairs += [(rank, *pair) for pair in sorted(known)]
    return [(a, b) for _, _, _, a, b in sorted(pairs, key=lambda one: one[:3])]


def _letters() -> list[str]:
    """Returns the character that stands for each byte in a byte-level vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)]


def _pattern(folder: Path) -> str:
    for file in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, OSError):
            continue
        values: dict[str, str] = {}
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            names += [target.attr for target in targets if isinstance(target, ast.Attribute)]
            names += [node.arg] if isinstance(node, ast.keyword) and node.arg else []
            text = _text(getattr(node, "value", None), values) if names else None
            if text is not None:
                more = isinstance(node, ast.AugAssign)
                values |= {name: values.get(name, "") + text if more else text for name in names}
        for name, text in values.items():
            if name.lower() == PATTERN:
                return text
    raise CheckpointError(
        f"{folder} has tiktoken ranks, and no Python file with a {PATTERN} that says how texts are cut: download the "
        "model's tokenization_*.py too (it is read, not run), or a tokenizer.json"
    )


def _text(node: ast.AST | None, values: Mapping[str, str]) -> str | None:
    """Returns the string value of a constant expression."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.Name):
        return values.get(node.id)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts, between = [_text(node.left, values), _text(node.right, values)], ""
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join":
        if len(node.args) != 1 or not isinstance(node.args[0], ast.List | ast.Tuple):
            return None
        parts, joined = [_text(one, values) for one in node.args[0].elts], _text(node.func.value, values)
        if joined is None:
            return None
        between = joined
    else:
        return None
    return None if None in parts else between.join(part for part in parts if part is not None)
