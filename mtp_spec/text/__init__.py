"""Text to token ids and back: a checkpoint's own tokenizer, its chat templates, and decoding token by token."""

from mtp_spec.text.files import end_ids
from mtp_spec.text.stream import TextStream
from mtp_spec.text.tokenizer import Tokenizer, open_tokenizer

__all__ = ["TextStream", "Tokenizer", "end_ids", "open_tokenizer"]
