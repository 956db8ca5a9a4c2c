"""SentencePiece models, read by transformers' converter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mtp_spec.model.errors import CheckpointError


def read_sentencepiece(file: Path, config: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """Returns the tokenizer that transformers builds from a SentencePiece model, and its special tokens by name.

    Raises:
        CheckpointError: transformers or sentencepiece is not installed, or they cannot read the file.
    """
    try:
        import google.protobuf  # noqa: F401
        import sentencepiece  # noqa: F401
        import transformers
    except ImportError as error:
        raise CheckpointError(
            f"{file.parent} has {file.name}, a SentencePiece model, and no tokenizer.json: install what reads it with "
            f'pip install "mtp-spec[sentencepiece]" ({error}), or copy a tokenizer.json into the folder'
        ) from error
    base = transformers.PreTrainedTokenizerFast
    name = str(config.get("tokenizer_class") or "")
    kind = getattr(transformers, name.removesuffix("Fast"), base) if name else base
    if not (isinstance(kind, type) and issubclass(kind, base)):
        kind = base
    try:
        made = kind.from_pretrained(str(file.parent), local_files_only=True)
        return Tokenizer.from_str(made.backend_tokenizer.to_str()), dict(made.special_tokens_map)
    except Exception as error:  # three libraries, any exception
        raise CheckpointError(
            f"{file} is no SentencePiece model that can be read ({error}): download it again"
        ) from error
